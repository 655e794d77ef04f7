"""An end that is announced by a signal: the step is finished, everything is saved, and the run goes on as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jobs
import pytest
from test_distributed import together
from toys import tree

from mllm_factory import ending, runs

STEPS, AT = 12, 17
"""Sample 17 of 40 is read in the first epoch, of 6 steps."""


def settings(folder: Path, flag: Path, number: int = signal.SIGTERM, **trainer: Any) -> dict[str, Any]:
    """Dropout, accumulation, and lines and checkpoints that are not due where the signal comes."""
    data = {"name": "toys:Announced", "n": 40, "at": AT, "flag": str(flag), "number": int(number)}
    node = tree(folder, data__train=data, resume="auto")
    node["tuning"]["backbone"] = {"name": "lora", "rank": 2, "dropout": 0.3, "targets": "all-linear"}
    node["metrics"] = {}
    node["trainer"] |= {
        "max_steps": STEPS,
        "batch_size": 3,
        "accumulate": 2,
        "log_every": 7,
        "save_every": 100,
        **trainer,
    }
    return node


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run to which nothing is sent."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    folder.parent.joinpath("flag").touch()
    jobs.run(settings(folder, folder.parent / "flag"), folder.with_suffix(".log"))
    return folder


@pytest.mark.parametrize(("workers", "name"), [(0, "SIGTERM"), (2, "SIGTERM"), (0, "SIGUSR2")])
def test_a_run_that_is_told_to_end_saves_and_goes_on_bit_for_bit(
    whole: Path, tmp_path: Path, workers: int, name: str
) -> None:
    number = signal.Signals[name]
    node = settings(tmp_path / "run", tmp_path / "flag", number, workers=workers)
    told = jobs.run(node, tmp_path / "log", expected=128 + number)
    (step,) = runs.steps(tmp_path / "run")
    assert 1 <= step <= 6 and f"{name}: step {step} of {STEPS} is saved; resume=auto goes on from it" in told
    assert not (tmp_path / "run" / "report.json").exists() and not jobs.lines(tmp_path / "run")
    assert f"resuming from {runs.folder_of(tmp_path / 'run', step)}" in jobs.run(node, tmp_path / "log")
    jobs.assert_same_end(tmp_path / "run", whole, STEPS)


@pytest.mark.slow
def test_processes_end_together_after_the_step_in_which_one_is_told(tmp_path: Path) -> None:
    """Only the process that reads the sample gets the signal; the other one's exit code is that of SIGTERM."""
    options = {"timeout": 60.0, "accumulate": 1}
    (tmp_path / "sent").touch()
    together(settings(tmp_path / "whole", tmp_path / "sent", **options), tmp_path / "log_whole")
    node = settings(tmp_path / "run", tmp_path / "flag", signal.SIGTERM, **options)
    texts = together(node, tmp_path / "log", expected=143)
    (step,) = runs.steps(tmp_path / "run")
    assert f"SIGTERM: step {step} of {STEPS} is saved" in texts[0] and "SIGTERM" not in texts[1]
    together(node, tmp_path / "log")
    jobs.assert_same_end(tmp_path / "run", tmp_path / "whole", STEPS)


def test_the_first_signal_is_told_and_all_of_them_are_held_back() -> None:
    before = [signal.getsignal(number) for number in ending.ANNOUNCED]
    with ending.noticed() as notice:
        assert notice() == 0
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert notice() == signal.SIGUSR1
    assert [signal.getsignal(number) for number in ending.ANNOUNCED] == before


def test_outside_of_the_main_thread_signals_are_left_alone() -> None:
    found: list[Any] = []

    def listen() -> None:
        with ending.noticed() as notice:
            found.append((notice(), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [(0, before)]


def children(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_killed_loader_worker_is_told_in_one_line_and_nothing_waits_for_the_others(tmp_path: Path) -> None:
    (tmp_path / "flag").touch()
    node = settings(tmp_path / "run", tmp_path / "flag", workers=2, max_steps=10**6, log_every=1)
    process = jobs.start(jobs.train, node, log=tmp_path / "log")
    assert jobs.until(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), process)
    workers = children(process.pid or 0)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGTERM)
    time.sleep(0.2)
    assert children(process.pid or 0) == workers, "only the process it works for ends a worker by SIGTERM"
    os.kill(workers[0], signal.SIGKILL)
    assert jobs.finish(process, 60) == 2
    told = (tmp_path / "log").read_text()
    assert "a loader worker was killed, most likely because memory was short" in told and "Traceback" not in told
    assert not Path(f"/proc/{workers[1]}").exists()


def test_memory_that_runs_out_is_told_in_one_line(tmp_path: Path) -> None:
    """The allocation fails for real, in torch's own words."""
    node = settings(tmp_path / "run", tmp_path / "flag")
    node["projector"] = {"name": "toys:Greedy"}
    told = jobs.run(node, tmp_path / "log", expected=2)
    assert re.search(r"memory ran out \(.*memory.*\); lower trainer.batch_size", told) and "Traceback" not in told
