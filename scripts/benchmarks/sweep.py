"""What a sweep costs: a job of ``-m`` against the same training started by hand, and two jobs at a time against one after the other.

Whole commands are timed in turns, every process with one thread. What each further job of a sweep costs is the time of a sweep of
several jobs less that of a sweep of one, so that starting the sweep itself, which is paid once, is not in it; it is in the rows
of whole sweeps. Every job must end with the loss of the run started by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Result, compare

OVERHEAD, SPEEDUP = 1.05, 1.6
JOBS, STEPS = 4, 600
TRAINING = ["experiment=smoke", "metrics=null", "trainer.log_every=10", "trainer.save_every=200"]


def timed(words: list[str], folder: Path) -> float:
    """Seconds of a command.

    Raises:
        CalledProcessError: it fails.
    """
    tool = str(Path(sys.executable).parent / "mllm-factory")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    subprocess.run([tool, "train", *TRAINING, *words], cwd=folder, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def losses(run: Path) -> list[float]:
    """The losses that a run logged."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def run(runs: int | None, small: bool) -> Result:
    """A run by hand, sweeps of one and of several jobs, and one with two at a time, in turns, ``runs`` rounds."""
    result = Result("sweep", "the same training started by hand")
    jobs, steps = (2, 2) if small else (JOBS, STEPS)
    seeds, length = f"seed={','.join(map(str, range(1, jobs + 1)))}", f"trainer.max_steps={steps}"
    found: dict[str, list[float]] = {"bare": [], "one": [], "all": [], "two": []}
    sweeps = {"one": ("seed=1", 1), "all": (seeds, 1), "two": (seeds, 2)}
    equal = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        timed(["seed=1", "trainer.max_steps=2", "output_dir=first"], folder)  # fills the disk cache
        for n in range(runs or 3):
            found["bare"].append(timed(["seed=1", length, f"output_dir=bare_{n}"], folder))
            bare = losses(folder / f"bare_{n}")
            for sweep, (values, width) in sweeps.items():
                words = ["sweep.threads=1", f"sweep.jobs={width}", f"hydra.sweep.dir={sweep}_{n}"]
                found[sweep].append(timed(["-m", values, length, *words], folder))
                equal = equal and losses(folder / f"{sweep}_{n}" / "0") == bare
    further = [(many - one) / (jobs - 1) for many, one in zip(found["all"], found["one"], strict=True)]
    result.rows = [
        compare("each further job of a sweep", "wall s", further, found["bare"], "<=", OVERHEAD),
        compare("a sweep of one job", "wall s", found["one"], found["bare"]),
        compare(f"a sweep of {jobs} jobs", "wall s", found["all"], [jobs * bare for bare in found["bare"]]),
        compare(
            f"{jobs} jobs, two at a time against one after the other",
            "wall s",
            found["two"],
            found["all"],
            ">=",
            SPEEDUP,
        ),
    ]
    result.checks["every job has the losses of the run by hand"] = equal
    result.facts["steps of each job"] = steps
    return result
