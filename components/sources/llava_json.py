"""The LLaVA conversation format on disk (Liu et al. 2023, arXiv:2304.08485), as a JSON array or as JSON lines.

    {"id": "7", "image": "a/b.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A cat."}]}

``image`` is a path or a list of paths (also ``images``, and ``audio``, ``audios`` for recordings); a text-only sample has none.
``messages`` with ``role`` and ``content`` is read like ``conversations`` with ``from`` and ``value``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mllm_factory import DataError, Message, Sample, Source, hint, register

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FIELDS = {"vision": ("image", "images"), "audio": ("audio", "audios")}
SHOWN = 5
"""Broken entries that one error message lists."""


@register("llava_json")
class LlavaJson(Source):
    """Conversations of one file. Every entry is checked at the start; media files are opened when a batch needs them.

    Of a ``.jsonl`` file only the places of the lines are kept in memory.

    Args:
        path: ``.json`` (an array) or ``.jsonl`` (one object a line).
        root: folder that media paths start from; None means the file's own folder.
        limit: use the first so many samples; later ones are not checked.

    Raises:
        ValueError: a limit below 1, or another kind of file.
        DataError: a missing or empty file, or broken entries; the message names the file and up to five places.
    """

    def __init__(self, path: str, root: str | None = None, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit is at least 1 sample, got {limit}; null takes all")
        self._path = Path(path)
        if self._path.suffix not in (".json", ".jsonl"):
            raise ValueError(f"{path}: a conversation file ends in .json (an array) or .jsonl (one object a line)")
        if not self._path.is_file():
            raise DataError(
                f"{path}: no such file (looked for {self._path.absolute()}); set data.train.path and data.eval.path"
            )
        self._root = self._path.parent if root is None else Path(root)
        if not self._root.is_dir():
            raise DataError(f"{root}: no such folder to start media paths from; set `root`")
        self._lines: list[int] = []  # .jsonl: where each sample's line starts, in bytes
        self._entries: list[Any] = []  # .json: the array
        self.modalities = self._scan(limit)

    def __len__(self) -> int:
        return len(self._lines) or len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``; its media are paths."""
        if not self._lines:
            return _sample(self._entries[index], index, self._root)
        with self._path.open("rb") as file:  # opened anew: loader workers must not share a place in the file
            file.seek(self._lines[index])
            return _sample(_parsed(file.readline()), index, self._root)

    def _scan(self, limit: int | None) -> frozenset[str]:
        """Find the samples and check each; returns the modalities they carry."""
        seen: set[str] = set()
        problems: list[str] = []
        read = self._read_lines if self._path.suffix == ".jsonl" else self._read_array
        for number, (place, entry) in enumerate(islice(read(), limit)):
            try:
                record = _parsed(entry) if isinstance(entry, bytes) else entry
                seen |= _sample(record, number, self._root).media.keys()
            except DataError as error:
                problems.append(f"{self._path}, {place}: {error}")
            if len(problems) == SHOWN:
                break
        if problems:
            raise DataError("; ".join(problems))
        if not len(self):
            raise DataError(f"{self._path}: holds no samples")
        return frozenset(seen)

    def _read_lines(self) -> Iterator[tuple[str, bytes]]:
        start = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._lines.append(start)
                    yield f"line {number}", line
                start += len(line)

    def _read_array(self) -> Iterator[tuple[str, Any]]:
        try:
            entries = _parsed(self._path.read_bytes(), whole=True)
        except DataError as error:
            raise DataError(f"{self._path}, {error}") from error
        if not isinstance(entries, list):
            raise DataError(f"{self._path}: a .json file holds an array of samples, got {type(entries).__name__}")
        for number, entry in enumerate(entries):
            self._entries.append(entry)
            yield f"entry {number}", entry


def _parsed(text: bytes, whole: bool = False) -> Any:
    """The JSON value of a line, or of a ``whole`` file; then an error tells the line, too."""
    try:
        return json.loads(text if whole else text.strip())
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}: " if whole else ""
        raise DataError(f"{line}broken JSON, {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text ({error.reason} at byte {error.start})") from error


def _sample(entry: Any, index: int, root: Path) -> Sample:
    if not isinstance(entry, dict):
        raise DataError(f"a sample is an object, got {type(entry).__name__}")
    turns = entry.get("conversations", entry.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise DataError("a sample needs 'conversations', a list of {'from', 'value'} turns")
    media = {modality: paths for modality in FIELDS if (paths := _paths(entry, modality, root))}
    return Sample(str(entry.get("id", index)), tuple(_message(turn, i) for i, turn in enumerate(turns, 1)), media)


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"turn {number} is an object with 'from' and 'value', got {type(turn).__name__}")
    speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise DataError(f"turn {number} is from '{speaker}'{hint(str(speaker), ROLES)}")
    if not isinstance(text, str):
        raise DataError(f"turn {number} needs its text in 'value', got {type(text).__name__}")
    return Message(ROLES[speaker], text)


def _paths(entry: dict[str, Any], modality: str, root: Path) -> tuple[str, ...]:
    """Paths of one modality's items in reading order."""
    found: list[str] = []
    for field in FIELDS[modality]:
        value = entry.get(field)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(v, str) and v for v in values):
            raise DataError(f"'{field}' is a path or a list of paths, got {value!r}")
        found += values
    return tuple(str(root / path) for path in found)
