"""Finished and unfinished runs read from their folders, for ``report``. JSON and YAML only; nothing is locked or changed.

A run folder is what ``train`` or ``evaluate`` leaves (``runs``); a sweep folder is Hydra's, with one run folder a job.
"""

from __future__ import annotations

import fcntl
import json
import math
import re
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mllm_factory import files, presets, runs
from mllm_factory.errors import UserError

MARKER = ".mllm-factory-report.json"
"""The file by which a folder is known to hold a report and no run."""

DONE, RUNNING, WAITING, FAILED, INTERRUPTED, PRUNED, UNFINISHED = (
    "done",
    "running",
    "waiting",
    "failed",
    "interrupted",
    "pruned",
    "unfinished",
)
"""The states of a job. ``unfinished``: neither at work nor done, and no launcher wrote down whether it failed or was stopped."""

_SIGNS = ("report.json", "metrics.jsonl", ".lock", "job.json", ".hydra")
_DEEPEST = 4
_LOCK = "qqihh" if sys.platform == "darwin" else "hhqqi"  # struct flock


@dataclass(frozen=True)
class Run:
    """What one run folder tells.

    Attributes:
        folder: absolute.
        label: names the run among the others, such as ``3`` for job 3 of the only sweep.
        state: one of the states above.
        tree: the composed options; empty where none were written.
        overrides: key -> text, as given on the command line.
        choices: group -> preset.
        values: ``report.json`` of a run that is done, without what is not a finite number.
        lines: ``metrics.jsonl``, whole lines only.
        cause: why it failed or was interrupted, where that is known.
    """

    folder: Path
    label: str
    state: str
    tree: Mapping[str, Any]
    overrides: Mapping[str, str]
    choices: Mapping[str, Any]
    values: Mapping[str, float]
    lines: Sequence[Mapping[str, Any]] = field(repr=False)
    cause: str = ""

    @property
    def step(self) -> int | None:
        """The last step in ``metrics.jsonl``."""
        return max((int(line["step"]) for line in self.lines), default=None)

    @property
    def max_steps(self) -> int | None:
        """How many steps the run was to make."""
        steps = (self.tree.get("trainer") or {}).get("max_steps")
        return steps if isinstance(steps, int) else None

    @property
    def seed(self) -> Any:
        """The root option ``seed``."""
        return self.tree.get("seed")


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in some run and sweep folders, each once.

    Raises:
        UserError: a folder does not exist or holds no run.
    """
    found: dict[Path, Path] = {}
    for text in folders:
        place = Path(text).expanduser().absolute()
        if not place.is_dir():
            raise UserError(f"there is no folder '{text}'; give a run folder or a sweep folder")
        here = list(_folders(place))
        if not here:
            signs = "report.json, metrics.jsonl or .hydra"
            raise UserError(f"'{text}' holds no run (no {signs}); give a run folder or a sweep folder")
        found |= {path.resolve(): path for path in here}
    paths = list(found.values())
    return [_read(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def _folders(place: Path, depth: int = 0) -> Iterator[Path]:
    """Run folders in reading order, job 10 behind job 9; a run is not searched for others."""
    if (place / MARKER).exists():
        return
    if any((place / sign).exists() for sign in _SIGNS):
        yield place
    elif depth < _DEEPEST:
        inside = [path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")]
        for path in sorted(inside, key=_natural):
            yield from _folders(path, depth + 1)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    return [(0, int(t), "") if t.isdigit() else (1, 0, t) for t in re.split(r"(\d+)", path.name) if t]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths by which all can be told apart."""
    for parts in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        ends = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(ends)) == len(ends):
            return ends
    return [str(path) for path in paths]


# ---------------------------------------------------------------- one run


def _read(folder: Path, label: str) -> Run:
    job = _json(folder / "job.json")
    values = _json(folder / "report.json")
    state = _state(folder, job, bool(values))
    hydra = _yaml(folder / ".hydra" / "hydra.yaml")
    inner = hydra.get("hydra", hydra)
    tree = _yaml(folder / "config.yaml") or _yaml(folder / ".hydra" / "config.yaml") or job.get("config") or {}
    return Run(
        folder=folder,
        label=label,
        state=state,
        tree=tree,
        overrides=_overrides(job.get("overrides") or _listed(folder / ".hydra" / "overrides.yaml")),
        choices=((inner.get("runtime") or {}).get("choices")) or {},
        values=_numbers(values) if state == DONE else {},
        lines=list(_lines(folder / "metrics.jsonl")),
        cause=str(job.get("cause") or "") if state in (FAILED, INTERRUPTED, PRUNED) else "",
    )


def _state(folder: Path, job: Mapping[str, Any], reported: bool) -> str:
    """Held locks come first: a run that goes on has an old report. A launcher's ``failed`` counts unless a report is newer."""
    if any(held(path) for path in (folder / ".lock", *folder.glob("*.lock"))):
        return RUNNING
    status = job.get("status")
    if reported and not (status == FAILED and _time(folder / "job.json") >= _time(folder / "report.json")):
        return DONE
    return status if status in (WAITING, FAILED, INTERRUPTED, PRUNED) else UNFINISHED


def held(path: Path) -> bool:
    """Whether another process holds a lock on a file. Asks only: taking the lock, even for a moment, could stop a run."""
    try:
        with path.open("rb") as file:
            kinds = {"l_type": fcntl.F_WRLCK, "l_whence": 0, "l_start": 0, "l_len": 0, "l_pid": 0}
            order = ("l_start", "l_len", "l_pid", "l_type", "l_whence") if _LOCK[0] == "q" else tuple(kinds)
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(_LOCK, *(kinds[name] for name in order)))
            return struct.unpack(_LOCK, answer)[order.index("l_type")] != fcntl.F_UNLCK
    except OSError:  # no such file, or a file system without locks
        return False


def _time(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing or, as after a crash, cut off.

    Raises:
        UserError: it is there and may not be read.
    """
    text = _text(path)
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {files.reason(error)}; make it readable or leave the run out"
        ) from error


def _yaml(path: Path) -> dict[str, Any]:
    found = _loaded(path)
    return found if isinstance(found, dict) else {}


def _listed(path: Path) -> list[Any]:
    found = _loaded(path)
    return found if isinstance(found, list) else []


def _loaded(path: Path) -> Any:
    try:
        with presets.fast_yaml():
            return yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {files.reason(error)}; mend it or leave the run out") from error


def _overrides(given: Sequence[Any]) -> dict[str, str]:
    """``key=value`` words as a dict; ``+``, ``++`` and the package behind ``@`` say nothing about what was meant."""
    pairs = [str(text).partition("=") for text in given]
    return {key.lstrip("+~").partition("@")[0]: value if sign else "(removed)" for key, sign, value in pairs}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines with a step; the last one may be half written."""
    for text in _text(path).splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


# ---------------------------------------------------------------- one evaluation or several


def different_data(found: Sequence[Run]) -> str | None:
    """What two runs were judged on differently, ``data.eval.limit: 16 -> 64 (0 and 3)``; None where all agree.

    Runs without an evaluation are compared by what they were trained on; unfinished ones without a tree by nothing.
    """
    known = [(run, data) for run in found if isinstance(data := run.tree.get("data"), Mapping)]
    for run, data in known[1:]:
        first, reference = known[0]
        key = "eval" if data.get("eval") or reference.get("eval") else "train"
        changes = runs.differences(reference.get(key), data.get(key), f"data.{key}")
        if changes:
            return f"{changes[0]} ({first.label} and {run.label})"
    return None
