"""What a sweep costs: a job of ``-m`` against the same training started by hand, and two jobs at a time against one after the other.

Every process has one thread. What each further job costs is timed side by side: a sweep of several jobs, one after the other, on
one core while the same trainings started by hand follow one another on the other, so that a machine that changes its speed slows
both; what counts is the time from the end of the first to the end of the last. Starting a sweep, which is paid once, is timed
alone, as are sweeps of one and of two jobs at a time. Every job must have the losses of the run started by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.harness import Result, compare

OVERHEAD, SPEEDUP = 1.05, 1.6
JOBS, STEPS = 4, 600
TRAINING = ["experiment=smoke", "metrics=null", "trainer.log_every=10", "trainer.save_every=200"]


def command(words: list[str], folder: Path) -> None:
    """Run ``train`` in a folder.

    Raises:
        CalledProcessError: it fails.
    """
    tool = str(Path(sys.executable).parent / "mllm-factory")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([tool, "train", *TRAINING, *words], cwd=folder, env=environment, check=True, capture_output=True)


def timed(words: list[str], folder: Path) -> float:
    """Seconds of a command."""
    started = time.perf_counter()
    command(words, folder)
    return time.perf_counter() - started


def spacing(ends: list[float]) -> float:
    """Seconds from one end to the next, in the mean."""
    return (max(ends) - min(ends)) / (len(ends) - 1)


def side_by_side(jobs: int, sweep: list[str], runs: list[list[str]], folder: Path, name: str) -> tuple[float, float]:
    """Seconds of each further job of a sweep, and of each further run by hand, both going on at the same time."""
    with ThreadPoolExecutor(1) as beside:
        started = beside.submit(command, [*sweep, f"hydra.sweep.dir={name}"], folder)
        ends = []
        for words in runs:
            command(words, folder)
            ends.append(time.time())
        started.result()
    records = [folder / name / str(n) / "job.json" for n in range(jobs)]
    return spacing([record.stat().st_mtime for record in records]), spacing(ends)


def losses(run: Path) -> list[float]:
    """The losses that a run logged."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def run(runs: int | None, small: bool) -> Result:
    """Sweeps and runs by hand side by side, then each alone, ``runs`` rounds."""
    result = Result("sweep", "the same training started by hand")
    jobs, steps = (2, 2) if small else (JOBS, STEPS)
    seeds, length = f"seed={','.join(map(str, range(1, jobs + 1)))}", f"trainer.max_steps={steps}"
    found: dict[str, list[float]] = {"further": [], "bare": [], "one": [], "alone": [], "all": [], "two": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command(["seed=1", "trainer.max_steps=2", "output_dir=first"], folder)  # fills the disk cache
        sweep = ["-m", seeds, length, "sweep.threads=1"]
        for n in range(runs or 3):
            hand = [[f"seed={k + 1}", length, f"output_dir=bare_{n}_{k}"] for k in range(jobs)]
            further, bare = side_by_side(jobs, [*sweep, "sweep.jobs=1"], hand, folder, f"beside_{n}")
            found["further"].append(further)
            found["bare"].append(bare)
            found["alone"].append(timed(["seed=1", length, f"output_dir=alone_{n}"], folder))
            one = ["-m", "seed=1", length, "sweep.threads=1", "sweep.jobs=1", f"hydra.sweep.dir=one_{n}"]
            found["one"].append(timed(one, folder))
            found["all"].append(timed([*sweep, "sweep.jobs=1", f"hydra.sweep.dir=all_{n}"], folder))
            found["two"].append(timed([*sweep, "sweep.jobs=2", f"hydra.sweep.dir=two_{n}"], folder))
        equal = all(
            losses(folder / f"{sweep}_{n}" / str(k)) == losses(folder / f"bare_{n}_{k}")
            for n in range(runs or 3)
            for sweep in ("beside", "all", "two")
            for k in range(jobs)
        )
    pairs = f"{jobs} jobs, two at a time against one after the other"
    result.rows = [
        compare("each further job of a sweep", "wall s", found["further"], found["bare"], "<=", OVERHEAD),
        compare("a sweep of one job", "wall s", found["one"], found["alone"]),
        compare(pairs, "wall s", found["two"], found["all"], ">=", SPEEDUP),
    ]
    result.checks["every job has the losses of the run by hand"] = equal
    result.facts["steps of each job"] = steps
    return result
