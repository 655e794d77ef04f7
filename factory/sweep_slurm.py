"""Jobs of a sweep in Slurm's queue, which submitit fills: who may run a job, what Slurm starts again, and when a job is over.

Slurm may start the same submission again (its time limit, preemption, a lost machine, ``scontrol requeue``), may start it long
after the sweep's driver is gone, and may end it without a word. A submission therefore holds a ticket, which is also in job.json:
another one there means that the sweep was continued meanwhile. What it starts again goes on from its newest checkpoint. Whether a
job is over is asked of ``squeue``, because submitit asks ``sacct``, which many clusters do not have, and waits for ever without.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mllm_factory import sweep_job, sweep_jobs

_STATES = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT"
OVER = {*_STATES.split(" "), "gone"}
"""What Slurm says of a job that it does not start again; ``gone`` is ours, for one that it has forgotten."""

ENDED = ("done", "failed", "pruned")
"""How a job ends that is not to go on."""

ASK_SECONDS = (2.0, 30.0)
"""How often Slurm is asked at first, and at last: a tenth of the time that the sweep has taken."""

PATIENCE, LATE = 60.0, 15.0
"""Seconds that a job which was asked to end is waited for, and that a file system may be late with a result."""

_CPUS = 'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi'


def parameters(given: Mapping[str, Any], name: str, threads: int | None) -> dict[str, Any]:
    """Those of submitit's executor for one job a submission; what is given goes first.

    Args:
        given: ``sweep.options``.
        name: of the jobs in the queue.
        threads: cores to ask for; None: as many as Slurm gives.
    """
    cpus = {} if threads is None else {"cpus_per_task": threads}
    setup = [_CPUS, *given.get("slurm_setup", [])]  # srun does not take this over from sbatch since Slurm 22.05
    return {"name": name, **cpus, **given, "slurm_setup": setup}


def ticket(folder: Path) -> str:
    """Write a new one into a job's record: it takes what was submitted before its right to run."""
    drawn = uuid.uuid4().hex
    sweep_job.write(folder, {**sweep_job.read(folder), "ticket": drawn})
    return drawn


class Submission:
    """What submitit runs on a machine of the cluster, as often as Slurm starts it.

    Args:
        execute: runs the keeper of a job: work, environment -> exit code.
        ticket: what ``ticket`` gave.
        threads: variables that say how many threads a process has, where that is the job's cores / ``processes``.
        processes: of a job.
    """

    def __init__(self, execute: Callable[..., int], ticket: str, threads: Sequence[str], processes: int) -> None:
        self.execute, self.ticket, self.threads, self.processes = execute, ticket, tuple(threads), processes

    def __call__(self, work: Any, env: Mapping[str, str], driver: int, host: str) -> int:
        """Run a job, unless another submission has it or it has ended; the keeper's exit code."""
        folder = Path(work.folder)
        held = sweep_job.lock(folder, PATIENCE)
        if held is None:
            return sweep_job.HELD
        with held:
            record = sweep_job.read(folder)
            if record.get("ticket") != self.ticket or record["status"] in ENDED:
                return 0
            if record["status"] != "waiting":
                record = {**sweep_jobs.again(folder, record), "status": "waiting"}
            sweep_job.write(folder, {**record, "slurm_job": os.environ.get("SLURM_JOB_ID")})
        cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or 1)
        share = str(max(1, cores // self.processes))
        return self.execute(work, {**env, **dict.fromkeys(self.threads, share)}, driver, host)

    def checkpoint(self, work: Any, env: Mapping[str, str], driver: int, host: str) -> Any:
        """What submitit asks at the time limit, before it lets Slurm start the job again: None where nothing is to go on.

        Waits until the job has saved and ended, for Slurm does not wait long for it.
        """
        from submitit.core.utils import DelayedSubmission

        folder = Path(work.folder)
        record = sweep_job.read(folder)
        if record["status"] == "running":
            sweep_job.ask(record["pid"])
        if (held := sweep_job.lock(folder, PATIENCE)) is not None:
            held.close()
        if _status(folder) in ENDED or Path(work.stop).exists():
            return None
        return DelayedSubmission(self, work, env, driver, host)


class Queue:
    """What Slurm says of this user's jobs, asked for all of them at once and seldom."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._asked, self._lock = float("-inf"), threading.Lock()
        self._states: dict[str, str] | None = None

    def state(self, job: str, since: float, hurry: bool = False) -> str:
        """Of a job that was submitted at ``since``; empty where it is not known."""
        first, last = ASK_SECONDS
        now = time.monotonic()
        with self._lock:
            if now - self._asked >= (first if hurry else min(last, max(first, (now - self.began) / 10))):
                self._ask(now)
            if self._states is None:
                return ""
            return self._states.get(job, "gone" if self._asked >= since else "")

    def _ask(self, now: float) -> None:
        command = ["squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%i|%T"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self._asked = now
        found = [line.strip().partition("|") for line in done.stdout.splitlines()]
        self._states = {job: state for job, _, state in found} if done.returncode == 0 else None

    def wait(self, job: Any, work: Any) -> int:
        """The exit code of a submitted job's keeper, once the job has ended and Slurm does not start it again.

        Raises:
            RuntimeError: it ended without a result.
            Exception: of submitit, where the keeper could not be run.
        """
        since, over = time.monotonic(), float("inf")
        folder, stop = Path(work.folder), Path(work.stop)
        while True:
            stopped = stop.exists()
            state, left = self.state(job.job_id, since, hurry=stopped), _visible(job.paths.result_pickle)
            status = _status(folder)
            if left and (status in ENDED or state in OVER):
                return int(job.result())
            over = min(over, time.monotonic()) if state in OVER else float("inf")
            if time.monotonic() - over > LATE or (state in OVER and status == "waiting"):
                raise RuntimeError(f"Slurm's job {job.job_id} ended without a result ({state}; {job.paths.stderr})")
            if stopped and (status == "waiting" or state == "PENDING"):  # what runs sees the stop file, and ends gently
                subprocess.run(["scancel", "--state=PENDING", job.job_id], capture_output=True, check=False)
            time.sleep(1.0)


def calls(executor: Any, execute: Callable[..., int], threads: Sequence[str], processes: int) -> Callable[..., int]:
    """What runs one job after the other in the queue of a submitit executor: work, environment -> exit code of its keeper.

    The jobs do not end with this process. For the arguments see ``Submission``.
    """
    queue, one = Queue(), threading.Lock()

    def call(work: Any, env: Mapping[str, str]) -> int:
        submission = Submission(execute, ticket(Path(work.folder)), threads, processes)
        with one:  # submitit's executors are not made for threads
            job = executor.submit(submission, work, dict(env), 0, "")
        return queue.wait(job, work)

    return call


def _status(folder: Path) -> str:
    """What job.json says; empty where it cannot be read just now."""
    with suppress(OSError, ValueError):
        return str(sweep_job.read(folder).get("status"))
    return ""


def _visible(file: Path) -> bool:
    """Whether a file is there; a network file system looks again after its folder was touched."""
    with suppress(OSError):
        file.parent.chmod(file.parent.stat().st_mode)
    return file.exists()
