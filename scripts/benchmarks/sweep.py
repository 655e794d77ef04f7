"""What a sweep costs: a job of ``-m`` against the same training started by hand, and two jobs at a time against one after the other.

Every process has one thread. What each further job costs is timed side by side: a sweep of several jobs, one after the other, on
one core while the same trainings started by hand follow one another on the other, and then once more with the cores exchanged, so
that neither a machine that changes its speed nor a core that is slower than the other counts; what counts is the time from the
end of the first to the end of the last. Starting a sweep, which is paid once, is timed alone, as are sweeps of one and of two
jobs at a time. Every job must have the losses of the run started by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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


@contextmanager
def on_core(number: int) -> Iterator[None]:
    """Within: this thread, and what it starts, stay on one of the cores that it may use, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[number % len(before)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def side_by_side(sweep: list[str], runs: list[list[str]], folder: Path, swept: Path, core: int) -> tuple[float, float]:
    """Seconds of each further job of a sweep, and of each further run by hand, both going on at the same time.

    Args:
        sweep: words of a sweep into ``swept``, which stays on ``core``; the runs stay on the next one.
        runs: words of each run by hand.
    """

    def sweeping() -> None:
        with on_core(core):
            command([*sweep, f"hydra.sweep.dir={swept}"], folder)

    with ThreadPoolExecutor(1) as beside:
        started = beside.submit(sweeping)
        ends = []
        with on_core(core + 1):
            for words in runs:
                command(words, folder)
                ends.append(time.time())
        started.result()
    records = [swept / str(n) / "job.json" for n in range(len(runs))]
    return spacing([record.stat().st_mtime for record in records]), spacing(ends)


def losses(run: Path) -> list[float]:
    """The losses that a run logged."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def run(runs: int | None, small: bool) -> Result:
    """Sweeps and runs by hand side by side, then each alone, ``runs`` rounds."""
    result = Result("sweep", "the same training started by hand")
    jobs, steps = (2, 2) if small else (JOBS, STEPS)
    seeds, length = f"seed={','.join(map(str, range(1, jobs + 1)))}", f"trainer.max_steps={steps}"
    found: dict[str, list[float]] = {"one": [], "alone": [], "all": [], "two": []}
    pairs: list[tuple[float, float]] = []
    folders: list[tuple[Path, Path]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command(["seed=1", "trainer.max_steps=2", "output_dir=first"], folder)  # fills the disk cache
        sweep = ["-m", seeds, length, "sweep.threads=1"]
        for n in range(runs or 3):
            for core in range(2):
                own = f"beside_{n}_{core}"
                hand = [[f"seed={k + 1}", length, f"output_dir={own}_bare_{k}"] for k in range(jobs)]
                pairs.append(side_by_side([*sweep, "sweep.jobs=1"], hand, folder, folder / own, core))
                folders += [(folder / own / str(k), folder / f"{own}_bare_{k}") for k in range(jobs)]
            found["alone"].append(timed(["seed=1", length, f"output_dir=alone_{n}"], folder))
            one = ["-m", "seed=1", length, "sweep.threads=1", "sweep.jobs=1", f"hydra.sweep.dir=one_{n}"]
            found["one"].append(timed(one, folder))
            found["all"].append(timed([*sweep, "sweep.jobs=1", f"hydra.sweep.dir=all_{n}"], folder))
            found["two"].append(timed([*sweep, "sweep.jobs=2", f"hydra.sweep.dir=two_{n}"], folder))
            folders += [
                (folder / f"{name}_{n}" / str(k), folder / f"beside_{n}_0_bare_{k}")
                for name in ("all", "two")
                for k in range(jobs)
            ]
        equal = all(losses(ours) == losses(by_hand) for ours, by_hand in folders)
    halves = [(pairs[i], pairs[i + 1]) for i in range(0, len(pairs), 2)]
    further, bare = ([(one[k] + other[k]) / 2 for one, other in halves] for k in (0, 1))
    title = f"{jobs} jobs, two at a time against one after the other"
    result.rows = [
        compare("each further job of a sweep", "wall s", further, bare, "<=", OVERHEAD),
        compare("a sweep of one job", "wall s", found["one"], found["alone"]),
        compare(title, "wall s", found["two"], found["all"], ">=", SPEEDUP),
    ]
    result.checks["every job has the losses of the run by hand"] = equal
    result.facts["steps of each job"] = steps
    return result
