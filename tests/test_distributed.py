"""Two processes on one machine (gloo) against one that accumulates the same batches."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from multiprocessing import connection
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from safetensors.torch import load_file
from toys import tree

from mllm_factory import checkpoint, distributed, run, runs
from mllm_factory.distributed import World
from mllm_factory.errors import ConfigError

STEPS = 6


def settings(folder: Path, **trainer: Any) -> dict[str, Any]:
    """Batches with pictures and without take turns, so that of two processes one often has none."""
    node = tree(folder, data__train={"name": "toys:TextThenPictures", "n": 24, "batch": 1}, trainer__batch_size=1)
    node["metrics"] |= {
        "answer_loss": {"name": "answer_loss"},
        "ablation": {"name": "ablation", "score": node["metrics"]["exact_match"]},
    }
    node["tuning"]["backbone"] = {"name": "lora", "rank": 2, "targets": "all-linear"}
    node["trainer"] |= {"max_steps": STEPS, "timeout": 60.0, "bucket": 1, **trainer}
    return node


def together(node: dict[str, Any], log: Path, size: int = 2, expected: int | None = 0) -> list[str]:
    """Train in several processes; what each printed."""
    processes = begin(node, log, size)
    for process in processes:
        jobs.finish(process)
    texts = [log.with_suffix(f".{rank}").read_text() for rank in range(size)]
    if expected is not None:
        assert [p.exitcode for p in processes] == [expected] * size, "\n".join(texts)
    return texts


def begin(node: dict[str, Any], log: Path, size: int = 2) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        jobs.start(
            jobs.train, node, log=log.with_suffix(f".{rank}"), env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(size)
    ]


def weights(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(runs.folder_of(folder, step) / "model.safetensors")


def report(folder: Path) -> dict[str, float]:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that accumulates what two would share."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    jobs.run(settings(folder, accumulate=2), folder.with_suffix(".log"))
    return folder


@pytest.mark.slow
def test_two_processes_are_one_that_accumulates(alone: Path, tmp_path: Path) -> None:
    """Bit for bit; then stopped after step 2 and continued by two processes: the same again."""
    together(settings(tmp_path / "run", save_every=2, keep=None), tmp_path / "log")
    jobs.assert_same(weights(tmp_path / "run"), weights(alone), "weights")
    ours, theirs = jobs.lines(tmp_path / "run"), jobs.lines(alone)
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    assert {k: v for k, v in report(tmp_path / "run").items() if "train/" not in k and "memory" not in k} == {
        k: v for k, v in report(alone).items() if "train/" not in k and "memory" not in k
    }
    folder = tmp_path / "run"
    before = weights(folder), jobs.lines(folder), checkpoint.read_progress(runs.folder_of(folder, STEPS))
    for step in (4, 6):
        (runs.folder_of(folder, step) / "model.safetensors").unlink()
    texts = together(settings(folder, save_every=2, keep=None, timeout=60.0) | {"resume": "auto"}, tmp_path / "log")
    assert "step_000002" in texts[0]
    after = weights(folder), jobs.lines(folder), checkpoint.read_progress(runs.folder_of(folder, STEPS))
    for one in (before, after):
        assert one[2]["counts"].pop("seconds") > 0 and len(one[2]["random"]) == 2
    jobs.assert_same(before, after, "continued")


@pytest.mark.slow
def test_sharded_processes_are_one_that_accumulates(alone: Path, tmp_path: Path) -> None:
    """FSDP2 with evaluation (generation included) while it trains; its checkpoint continues and evaluates in one process."""
    folder = tmp_path / "run"
    together(settings(folder, strategy="fsdp", save_every=3, keep=None, eval_every=2), tmp_path / "log")
    ours, theirs = weights(folder), weights(alone)
    assert ours.keys() == theirs.keys() and {t.shape for t in ours.values()} == {t.shape for t in theirs.values()}
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-6, msg=name)
    losses = [[line["loss"] for line in jobs.lines(f) if "loss" in line] for f in (folder, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert {"eval/exact_match", "eval/ablation/vision/exact_match"} <= jobs.lines(folder)[2].keys()
    loss = report(folder)["answer_loss"]
    assert loss == pytest.approx(report(alone)["answer_loss"], rel=1e-6)

    node = checkpoint.read_config(runs.folder_of(folder, STEPS))
    run.evaluate({**node, "checkpoint": str(folder), "output_dir": str(tmp_path / "evaluated")})
    assert report(tmp_path / "evaluated")["answer_loss"] == pytest.approx(loss, rel=1e-6)
    assert report(tmp_path / "evaluated")["exact_match"] == report(folder)["exact_match"]

    (runs.folder_of(folder, 6) / "model.safetensors").unlink()  # from sharded to alone, and back
    text = jobs.run({**settings(folder, accumulate=2, save_every=1, keep=None), "resume": "auto"}, tmp_path / "log")
    assert "2 processes so far, 1 now: the order of samples and dropout go on differently" in text
    for step in (5, 6):
        (runs.folder_of(folder, step) / "model.safetensors").unlink()
    texts = together({**settings(folder, strategy="fsdp"), "resume": "auto"}, tmp_path / "log_back")
    assert "step_000004" in texts[0]
    for name, value in weights(folder).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_accumulating_in_two_processes_with_everything_on(tmp_path: Path, strategy: str) -> None:
    """All weights of the language model, tied embeddings, an encoder that learns, recomputed layers."""

    def node(folder: Path, **trainer: Any) -> dict[str, Any]:
        result = settings(folder, gradient_checkpointing=True, batch_size=2, **trainer)
        result["backbone"]["sizes"]["tie_word_embeddings"] = True
        result["tuning"] = {part: {"name": "full"} for part in ("vision", "projector", "backbone")}
        result["metrics"] = {"answer_loss": {"name": "answer_loss"}}
        return result

    jobs.run(node(tmp_path / "alone", accumulate=4), tmp_path / "log_alone")
    together(node(tmp_path / "run", accumulate=2, strategy=strategy), tmp_path / "log")
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "alone")
    assert ours.keys() == theirs.keys() and len(ours) == 26
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.slow
def test_what_goes_wrong_in_one_process_ends_all_soon(tmp_path: Path) -> None:
    began = time.monotonic()
    node = settings(tmp_path / "run")
    node["data"]["train"] = {"name": "toys:FailsLate", "n": 24, "at": 11}
    texts = together(node, tmp_path / "log", expected=2)
    assert sum("sample number 11 cannot be read: OSError: sample 11 is broken" in text for text in texts) == 1
    assert sum("stopped because another one did; the cause is in that one's output" in text for text in texts) == 1
    assert not any("Traceback" in text for text in texts)

    node = settings(tmp_path / "nan")
    node["projector"] = {"name": "toys:TurnsNan", "after": 0}
    texts = together(node, tmp_path / "log_nan", expected=2)
    assert all("the loss sum is nan" in text and "colour" in text and "no weight was changed" in text for text in texts)

    held = jobs.start(jobs.train, settings(tmp_path / "held", max_steps=10**6), log=tmp_path / "log_held")
    assert jobs.until(lambda: (tmp_path / "held" / "metrics.jsonl").exists(), held)
    texts = together(settings(tmp_path / "held"), tmp_path / "log_lock", expected=2)
    held.kill()
    assert all("another process is running in" in text for text in texts), "what the first finds, all say"

    processes = begin(settings(tmp_path / "killed", max_steps=10**6), tmp_path / "log_killed")
    assert jobs.until(lambda: (tmp_path / "killed" / "metrics.jsonl").exists(), processes[0])
    processes[1].kill()
    assert jobs.finish(processes[0], 60) == 2
    assert "stopped because another one did" in (tmp_path / "log_killed.0").read_text()

    node = settings(tmp_path / "stalled", timeout=3.0)
    node["data"]["train"] = {"name": "toys:Stalls", "n": 24, "at": 11}
    processes = begin(node, tmp_path / "log_stalled")
    ready = connection.wait([process.sentinel for process in processes], 180)
    ended = [process for process in processes if process.sentinel in ready]
    assert len(ended) == 1 and jobs.finish(ended[0]) == 2, "it waits no longer than it was told to"
    for process in processes:
        process.kill()
    texts = [(tmp_path / f"log_stalled.{rank}").read_text() for rank in range(2)]
    assert sum("stopped because another one did" in text for text in texts) == 1
    assert time.monotonic() - began < 900


@pytest.mark.slow
def test_torchrun_starts_it(alone: Path, tmp_path: Path) -> None:
    """As on several machines; the folder's name may differ by process, the first one's counts."""
    script = tmp_path / "job.py"
    script.write_text(
        "import json, os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import jobs\n"
        "tree = json.load(open(sys.argv[1]))\n"
        "tree['output_dir'] += os.environ['RANK']\n"
        "jobs.train(tree)\n"
    )
    (tmp_path / "tree.json").write_text(json.dumps(settings(tmp_path / "run")))
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
        str(tmp_path / "tree.json"),
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    jobs.assert_same(weights(tmp_path / "run0"), weights(alone), "weights")
    assert not (tmp_path / "run1").exists()


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("gpu", 1, "'gpu' is no device; use auto, cpu, cuda or cuda:<n>"),
        ("meta", 1, "'meta' is no device"),
        ("cpu:1", 1, "'cpu:1' is no device"),
        ("cuda:97", 1, r"cuda:97 was asked for but there are \d+ cuda devices"),
        ("cuda:0", 2, "2 processes cannot share cuda:0; use cuda"),
    ],
)
def test_devices_that_are_none_are_refused(name: str, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distributed._device(name, size)


def test_auto_is_the_cpu_where_there_is_no_cuda() -> None:
    if not torch.cuda.is_available():
        assert distributed._device("auto", 1) == torch.device("cpu")


def test_processes_that_do_not_find_each_other_are_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match="WORLD_SIZE=2 announces 2 processes but they do not find each other .* torchrun"
    ):
        run.train(tree(tmp_path))


def test_alone_everything_is_as_it_is() -> None:
    world = World(0, 1, torch.device("cpu"))
    value = torch.ones(2)
    assert distributed.total(value, world) is value and distributed.whole(value) is value
    assert distributed.gather(3, world) == [3] and distributed.lead(world, lambda: 4) == 4 and world.leads
    assert "WORLD_SIZE" not in os.environ
