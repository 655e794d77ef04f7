"""The command lines of a sweep: the one that a user gives, and the one of each job."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_factory import files, torchrun
from mllm_factory.errors import ConfigError, Problem
from mllm_factory.sweep_job import GRACE_SECONDS

SWEEP = "sweep.json"
LAUNCHER, SEARCH = "hydra.launcher.", "hydra/sweeper=search"
SHORT = {"sweep.": LAUNCHER, "search.": "hydra.sweeper."}
"""``sweep.jobs=2`` is short for ``hydra.launcher.jobs=2``."""

MAPPINGS = ("options", "objectives", "watch", "sampler_options", "pruner_options", "params")
"""Options of both that hold keys of the user's own, which Hydra has to be told to add."""

NEWEST = ("true", "auto")
_OF_THE_SWEEP = ("hydra.mode", "hydra.sweep", "hydra.launcher", "hydra/launcher", "hydra/sweeper", "hydra.run.dir")


@dataclass(frozen=True)
class Call:
    """A command line that sweeps.

    Attributes:
        verb: ``train`` or ``evaluate``.
        flags: which tree is meant: ``--config-name`` and so on.
        fixed: overrides that Hydra does not see (``checkpoint=...``), for every job.
        overrides: as the user gave them, without ``sweep.resume``.
    """

    verb: str
    flags: Sequence[str] = ()
    fixed: Sequence[str] = ()
    overrides: Sequence[str] = ()


_swept: list[Call] = []


def sweep_by(call: Call) -> None:
    """Say which command the jobs of this process's sweeps come from."""
    _swept[:] = [call]


def swept() -> Call:
    """The command that sweeps in this process.

    Raises:
        ConfigError: another app than mllm-factory asks.
    """
    if not _swept:
        raise ConfigError(
            Problem("starts jobs of mllm-factory only; choose another launcher", "hydra/launcher=processes")
        )
    return _swept[0]


def command(call: Call, overrides: Iterable[str], processes: int = 1) -> list[str]:
    """What runs one job in a process of its own, or in several that torchrun starts."""
    start = torchrun.command(processes, GRACE_SECONDS)
    return [*start, "-m", "mllm_factory", call.verb, *call.flags, *call.fixed, *overrides]


def hydra_overrides(given: Iterable[str], number: int, folder: Path) -> list[str]:
    """Hydra's own overrides for one job: what the sweep was given, less what makes it a sweep, and the job's folder."""
    kept = [text for text in given if not text.lstrip("+~").startswith(_OF_THE_SWEEP)]
    escaped = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return [*kept, f"hydra.job.num={number}", f"hydra.run.dir='{escaped}'"]


# ---------------------------------------------------------------- sweep.jobs=2, sweep.resume=<folder>


def split(overrides: Sequence[str], multirun: bool) -> tuple[list[str], str | None]:
    """Overrides with ``sweep.<option>`` and ``search.<option>`` as Hydra knows them, and what ``sweep.resume`` says, if it does.

    ``search.<option>`` also chooses the sweeper that searches, unless one is chosen.

    Raises:
        ConfigError: without ``-m``.
    """
    found: list[str] = []
    resume, searches = None, False
    for text in overrides:
        key, _, value = text.partition("=")
        marks = key[: len(key) - len(key.lstrip("+~"))]
        short = next((short for short in SHORT if key.startswith(marks + short)), None)
        searches = searches or short == "search."
        if short is None:
            found.append(text)
        elif not multirun:
            raise ConfigError(Problem("is an option of sweeps; add -m", key, f"override '{text}'"))
        elif key == "sweep.resume":
            value = value.strip("'\"")
            resume = {"false": None, "null": None}.get(value.lower(), "auto" if value.lower() in NEWEST else value)
        else:
            rest = text.removeprefix(marks + short)
            added = "++" if rest.partition("=")[0].partition(".")[0] in MAPPINGS else ""
            found.append((marks or added) + SHORT[short] + rest)
    if searches and not any(text.startswith("hydra/sweeper=") for text in found):
        found.insert(0, SEARCH)
    return found, resume


def resumed(folder: Path) -> list[str]:
    """Overrides that continue the sweep in a folder."""
    escaped = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return [f"{LAUNCHER}resume=true", f"hydra.sweep.dir='{escaped}'"]


def newest(output_dir: str) -> Path:
    """The newest sweep beside a run's folder.

    Raises:
        ConfigError: there is none.
    """
    place = Path(output_dir).parent
    found = sorted(place.glob(f"*/{SWEEP}"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise ConfigError(Problem(f"{place} holds no sweep; give the folder of one", "sweep.resume"))
    return found[-1].parent


def store(folder: Path, call: Call) -> None:
    """Write down in a sweep's folder what started it, unless that is there.

    Raises:
        CheckpointError: it cannot be written.
    """
    if not (folder / SWEEP).exists():
        files.write(folder / SWEEP, json.dumps(vars(call), default=list, indent=1) + "\n")


def stored(folder: Path, verb: str) -> Call:
    """The command that started a sweep.

    Raises:
        ConfigError: the folder holds none, or one of another verb.
    """
    try:
        call = Call(**json.loads((folder / SWEEP).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        message = f"{os.fspath(folder)} holds no sweep ({SWEEP}: {files.reason(error)}); give the folder of one"
        raise ConfigError(Problem(message, "sweep.resume")) from error
    if call.verb != verb:
        raise ConfigError(
            Problem(f"{folder} is a sweep of '{call.verb}', not of '{verb}'; use that verb", "sweep.resume")
        )
    return call
