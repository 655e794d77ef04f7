"""One job of a sweep: what it is, its folder before it starts, and how it ended. Nothing here needs torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_factory import files, runs, sweep_job
from mllm_factory.errors import ConfigError, Problem, UserError, hint

OF_THE_FOLDER = ("output_dir", "resume")
"""Keys of the tree that say where a run writes, not what it is."""

_PATIENCE = 10.0
RUN_FILES = (sweep_job.RECORD, "config.yaml", "checkpoints", "report.json")


@dataclass
class Job:
    """One job of a sweep.

    Attributes:
        number: as Hydra counts.
        folder: where it writes; absolute.
        overrides: of the tree, this job's values included.
        command: what runs it, without what continuing adds.
        tree: resolved.
        verb: ``train`` or ``evaluate``.
        processes: that train together; how the job runs, no part of what it is.
    """

    number: int
    folder: Path
    overrides: Sequence[str]
    command: Sequence[str]
    tree: Mapping[str, Any]
    verb: str = "train"
    processes: int = 1
    key: str = field(init=False)

    def __post_init__(self) -> None:
        self.key = key_of(self.tree, self.verb)

    def record(self) -> dict[str, Any]:
        """``job.json`` before it starts."""
        return {
            "number": self.number,
            "status": "waiting",
            "exit_code": None,
            "start": None,
            "end": None,
            "cause": None,
            "cwd": os.getcwd(),
            "processes": self.processes,
            "overrides": list(self.overrides),
            "key": self.key,
            "config": identity(self.tree),
        }


@dataclass(frozen=True)
class Result:
    """How a job ended: ``status``, the first metric's main value (None without metrics), and the cause of a failure."""

    status: str
    value: float | None
    cause: str


def identity(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree without what says where a run writes."""
    return {key: value for key, value in tree.items() if key not in OF_THE_FOLDER}


def key_of(tree: Mapping[str, Any], verb: str) -> str:
    """SHA-256 of what a job does: two jobs with the same key are the same job."""
    text = json.dumps([verb, identity(tree)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------- its folder


def read(job: Job) -> dict[str, Any]:
    """A job's record; empty where there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return sweep_job.read(job.folder)
    except (OSError, ValueError) as error:
        message = (
            f"{job.folder / sweep_job.RECORD} cannot be read: {files.reason(error)}; remove {job.folder} to repeat it"
        )
        raise ConfigError(Problem(message, "sweep.resume")) from error


def prepare(job: Job) -> bool:
    """Make a job's folder ready; False where the job is done already, or was pruned.

    What was interrupted goes on from its newest checkpoint; what failed, or has none, starts in a folder that holds only the
    logs of earlier attempts.

    Raises:
        ConfigError: the folder cannot be written, or the job is still running.
    """
    record = read(job)
    if record.get("status") == "pruned" or (record.get("status") == "done" and (job.folder / "report.json").exists()):
        return False
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        held = sweep_job.lock(job.folder, _PATIENCE)
        if held is None:
            raise ConfigError(Problem(f"job {job.number} is still running in {job.folder}; wait for it, or end it"))
        with held:
            record = read(job)  # its keeper may have written meanwhile
            sweep_job.write(
                job.folder, {**job.record(), **attempt(job.folder, record, job.command, job.verb == "train")}
            )
    except OSError as error:
        raise ConfigError(
            Problem(f"{job.folder} cannot be written: {files.reason(error)}; choose another", "hydra.sweep.dir")
        ) from error
    return True


def again(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a job that its back end starts once more, made ready as ``prepare`` does."""
    resumes = record["command"][-1:] == [_resume(folder)]
    return {**record, **attempt(folder, record, record["command"][: -1 if resumes else None], True)}


def attempt(folder: Path, record: Mapping[str, Any], command: Sequence[str], trains: bool) -> dict[str, Any]:
    """Tidy a job's folder after the attempt that ``record`` tells of, if any; what ``job.json`` says of the next one."""
    start = runs.latest(folder) if record and record["status"] != "failed" and trains else None
    if record:
        _tidy(folder, everything=start is None)
    return {
        "attempts": record.get("attempts", 0) + 1,
        "resumed_from": str(start) if start else None,
        "command": [*command, *([_resume(folder)] if start else [])],
    }


def _resume(folder: Path) -> str:
    return f"resume='{folder}'"


def _tidy(folder: Path, everything: bool) -> None:
    """Number the log of the last attempt; with ``everything`` remove all other files."""
    (folder / sweep_job.END).unlink(missing_ok=True)
    logs = sorted(folder.glob("job_*.log"))
    if (folder / sweep_job.LOG).exists():
        (folder / sweep_job.LOG).rename(folder / f"job_{len(logs) + 1}.log")
    kept = {*folder.glob("job_*.log"), folder / sweep_job.LOCK, folder / sweep_job.RECORD}
    for path in set(folder.iterdir()) - kept if everything else ():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def result(job: Job, code: int | None, lost: str = "") -> Result:
    """How a job ended, from its folder.

    Args:
        job: the job.
        code: exit code of its keeper; None where the keeper ended without one.
        lost: what the back end said then.
    """
    if code == sweep_job.HELD:
        return Result("failed", None, f"another process is running in {job.folder}")
    record = read(job)
    if record.get("status") in ("running", "waiting"):
        unwritten = "job.json could not be written; is the disk full?" if code == sweep_job.UNWRITTEN else ""
        cause = unwritten or lost or "its keeper ended before it"
        record |= {"status": "interrupted", "cause": cause, "end": sweep_job.now()}
        try:
            sweep_job.write(job.folder, record)
        except OSError as error:
            return Result("interrupted", None, f"job.json cannot be written: {files.reason(error)}")
    if record.get("status") != "done":
        return Result(str(record.get("status")), None, str(record.get("cause")))
    return Result("done", value_of(job), "")


def value_of(job: Job) -> float | None:
    """The first metric's main value, which a sweeper judges by: the first key of report.json where there are metrics."""
    last = (job.tree.get("stages") or [job.tree])[-1]
    if not last.get("metrics"):
        return None
    try:
        values = json.loads((job.folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{job.folder / 'report.json'} cannot be read: {files.reason(error)}") from error
    first = next(iter(values.values()), None)
    return math.nan if first is None else float(first)


def reported(folder: Path, keys: Sequence[str]) -> list[float] | None:
    """The objectives of a job that is done; None where one is not a number.

    Raises:
        ConfigError: the report has no such key: no other job's will.
        UserError: the report cannot be read.
    """
    try:
        found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'report.json'} cannot be read: {files.reason(error)}") from error
    for key in keys:
        if key not in found:
            message = f"{folder / 'report.json'} has no '{key}'{hint(key, found)}"
            raise ConfigError(Problem(message, "search.objectives"))
    values = [math.nan if found[key] is None else float(found[key]) for key in keys]
    return values if all(map(math.isfinite, values)) else None


def lines_of(folder: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Whole lines of a job's metrics.jsonl from an offset on, and where they end."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return [], offset
    with file.open("rb") as opened:
        start = opened.seek(offset if file.stat().st_size >= offset else 0)
        text = opened.read()
    whole = text[: text.rfind(b"\n") + 1]
    found = []
    for line in whole.splitlines():
        with suppress(ValueError):  # rewritten meanwhile
            found.append(json.loads(line))
    return found, start + len(whole)
