"""A sweep: one fresh process for each job, told apart by the hash of its resolved tree, and continued after any end.

<sweep>/
  sweep.json             the command that started it
  0/job.json             status, times, exit code, cause, overrides, key and tree of job 0
  0/job.log              what it printed; logs of earlier attempts are job_1.log, job_2.log, ...
  0/...                  what the run itself writes

Planning is here; ``sweep_backends`` runs what is planned, ``sweep_job`` keeps each job, ``sweep_jobs`` knows its folder. Without torch.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm_factory import files, runs, sweep_job, sweep_jobs
from mllm_factory.errors import ConfigError, Problem, UserError
from mllm_factory.sweep_backends import STOP, Options, Pool
from mllm_factory.sweep_command import SWEEP, Call, store
from mllm_factory.sweep_jobs import RUN_FILES, Job, Result, identity, prepare, result

LOCKED = ".sweep.lock"


# ---------------------------------------------------------------- before the first job


def refuse_same_jobs(jobs: Sequence[Job]) -> None:
    """Two jobs that would do the same, or write into the same folder.

    Raises:
        ConfigError: names the two.
    """
    problems = []
    for what, way in (("key", "leave one out"), ("folder", "make hydra.sweep.subdir differ")):
        first: dict[Any, Job] = {}
        for job in jobs:
            other = first.setdefault(getattr(job, what), job)
            if other is not job:
                shared = "are the same run" if what == "key" else f"write into {job.folder}"
                given = " ".join(job.overrides)
                problems.append(Problem(f"jobs {other.number} and {job.number} {shared} ({given}); {way}"))
    if problems:
        raise ConfigError(problems)


def refuse_used_folder(folder: Path) -> None:
    """A new sweep takes a folder that holds no other.

    Raises:
        ConfigError: it holds a sweep or runs.
    """
    used = [folder / SWEEP, *(inner / name for inner in sorted(folder.glob("*")) for name in RUN_FILES)]
    found = next((path for path in used if path.exists()), None)
    if found is not None:
        way = f"continue it with sweep.resume={folder}, or choose another folder"
        raise ConfigError(
            Problem(f"{folder} holds a sweep already ({found.relative_to(folder)}); {way}", "hydra.sweep.dir")
        )


def refuse_other_sweep(jobs: Sequence[Job]) -> None:
    """A sweep can be continued by the same jobs, or by more of them.

    Raises:
        ConfigError: names the jobs whose folders hold something else, and what differs.
    """
    problems = []
    for job in jobs:
        record = sweep_jobs.read(job)
        if record and record.get("key") != job.key:
            changes = runs.differences(record.get("config"), identity(job.tree), "") or ["another verb"]
            message = f"{job.folder} holds another job: {'; '.join(changes[:5])}; give the overrides of that sweep"
            problems.append(Problem(message, "sweep.resume"))
        elif not record and any((job.folder / name).exists() for name in RUN_FILES):
            problems.append(
                Problem(f"{job.folder} holds a run that no sweep made; choose another folder", "sweep.resume")
            )
    if problems:
        raise ConfigError(problems)


# ---------------------------------------------------------------- all of it


def run(folder: Path, jobs: Sequence[Job], options: Options, call: Call, tell: Callable[[str], None]) -> list[Result]:
    """Run the jobs that are not done, at most ``options.jobs`` at a time; how each ended, in their order.

    Raises:
        ConfigError: before the first job starts, where the folder or the jobs do not fit.
        KeyboardInterrupt: after the running jobs were ended.
    """
    options.check()
    refuse_same_jobs(jobs)
    with driving(folder):
        refuse_other_sweep(jobs)
        store(folder, call)
        tell_of_other_sizes(jobs, tell)
        open_ = [job for job in jobs if prepare(job)]
        if len(open_) < len(jobs):
            tell(f"{len(jobs) - len(open_)} of {len(jobs)} jobs are done already")
        ended = _run(folder, open_, options, tell) if open_ else {}
        return [ended.get(job.number) or result(job, 0) for job in jobs]


def _run(folder: Path, jobs: Sequence[Job], options: Options, tell: Callable[[str], None]) -> dict[int, Result]:
    by_number = {job.number: job for job in jobs}
    width = min(options.width, len(jobs))
    each = f"{options.size} processes of " if options.size > 1 else ""
    tell(f"{len(jobs)} jobs, {width} at a time, {each}{options.cores} threads each ({options.backend})")
    results: dict[int, Result] = {}
    with Pool(options, folder) as pool:
        for job in jobs:
            pool.submit(job.number, job.folder)
        while pool.running:
            ended = pool.next()
            if ended is not None:
                job = by_number[ended.number]
                results[job.number] = result(job, ended.code, ended.lost)
                tell(told(job, results[job.number], f"({len(results)}/{len(jobs)})"))
    return results


def told(job: Job, end: Result, count: str) -> str:
    """A line about the end of a job."""
    value = "" if end.value is None else f" {end.value:.4g}"
    return f"job {job.number} {end.status}{value} {count}{f': {end.cause}' if end.cause else ''}"


@contextmanager
def driving(folder: Path) -> Iterator[None]:
    """Hold a sweep's folder for this process.

    Raises:
        ConfigError: it cannot be written, or another process drives the sweep.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCKED).open("w")
    except OSError as error:
        message = f"{folder} cannot be written: {files.reason(error)}; choose another"
        raise ConfigError(Problem(message, "hydra.sweep.dir")) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            message = f"another process is running the sweep in {folder}; wait for it, or choose another"
            raise ConfigError(Problem(message, "hydra.sweep.dir")) from error
        (folder / STOP).unlink(missing_ok=True)
        yield


def tell_of_other_sizes(jobs: Sequence[Job], tell: Callable[[str], None]) -> None:
    """A line about jobs that were other numbers of processes so far: their steps had other numbers of samples."""
    before = {job.number: sweep_jobs.read(job).get("processes", job.processes) for job in jobs}
    other = [f"{job.number} ({before[job.number]})" for job in jobs if before[job.number] != job.processes]
    if other:
        tell(f"{jobs[0].processes} processes a job from now on; jobs so far of another number: {', '.join(other)}")


def failures(folder: Path, jobs: Sequence[Job], results: Sequence[Result]) -> list[UserError]:
    """An error for each job that is not done, and what to do about it; empty where all are."""
    bad = [(job, end) for job, end in zip(jobs, results, strict=True) if end.status != "done"]
    told = [
        UserError(f"job {job.number}: {end.cause} ({end.status}; {job.folder / sweep_job.LOG})") for job, end in bad
    ]
    way = f"{len(bad)} of {len(jobs)} jobs are not done; sweep.resume={folder} runs them again"
    return [*told, UserError(way)] if bad else []
