"""Runs in processes of their own: started within milliseconds from a server that has the libraries loaded."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["mllm_factory.run", "transformers.models.llama.modeling_llama", "peft"])
TIMING = ("samples_per_second", "seconds", "peak_memory_bytes")


def start(job: Callable[..., None], *given: Any, log: Path, env: Mapping[str, str] | None = None) -> BaseProcess:
    """Run ``job(*given)`` in a process of its own, with one thread and its output in ``log``."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    process = SERVER.Process(target=_child, args=(job, given, str(log), dict(env or {})))
    process.start()
    return process


def _child(job: Callable[..., None], given: tuple[Any, ...], log: str, env: dict[str, str]) -> None:
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as in a process started by hand; loader workers then end with it
    job(*given)


def train(tree: dict[str, Any]) -> None:
    """As the command line does it: a user's error is one line and exit code 2."""
    from mllm_factory import UserError, run

    try:
        run.train(tree)
    except UserError as error:
        print(f"ERROR {error}", flush=True)
        raise SystemExit(2) from None


def finish(process: BaseProcess, seconds: float = 300.0) -> int:
    """Wait for a process; its exit code."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"still running after {seconds} s")
    return process.exitcode


def run(tree: dict[str, Any], log: Path, expected: int = 0) -> str:
    """Train to the end; what was printed."""
    code = finish(start(train, tree, log=log))
    text = log.read_text()
    assert code == expected, f"exit code {code}\n{text}"
    return text


def until(condition: Callable[[], bool], process: BaseProcess, seconds: float = 300.0) -> bool:
    """Wait for a condition; False where the process ended before."""
    end = time.monotonic() + seconds
    while not condition():
        if process.exitcode is not None:
            return False
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.005)
    return True


def lines(folder: Path, timing: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what a clock says."""
    file = folder / "metrics.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return found if timing else [{k: v for k, v in line.items() if k not in TIMING} for line in found]


def assert_same_end(ours: Path, theirs: Path, step: int) -> None:
    """Two runs ended bit for bit alike: weights, optimizer, random generators, data position, losses."""
    a, b = (folder / "checkpoints" / f"step_{step:06d}" for folder in (ours, theirs))
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    progress = [torch.load(folder / "trainer.pt", weights_only=True) for folder in (a, b)]
    for one in progress:
        assert one["counts"].pop("seconds") > 0
    assert_same(*progress, "trainer.pt")
    assert lines(ours) == lines(theirs)


def assert_same(a: Any, b: Any, where: str) -> None:
    """Equal, down to the bits of tensors."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b) and a.dtype == b.dtype, where
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)), f"{where}: {a} {b}"
