"""The LLaVA conversation format on disk (Liu et al. 2023, arXiv:2304.08485), as a JSON array or as JSON lines.

    {"id": "7", "image": "a/b.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A cat."}]}

``image`` is a path or a list of paths (also ``images``, and ``audio``, ``audios`` for recordings); a text-only sample has none.
``messages`` with ``role`` and ``content`` is read like ``conversations`` with ``from`` and ``value``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from mllm_factory import DataError, Sample, Source, register
from mllm_factory.components.sources.conversation import messages_of
from mllm_factory.components.sources.json_index import JsonIndex, chunks, find_all

FIELDS = {"vision": ("image", "images"), "audio": ("audio", "audios")}
SHOWN = 5
"""Broken entries that one error message lists."""


@register("llava_json")
class LlavaJson(Source):
    """Conversations of one file, of which only the places of the entries are kept in memory: an array too large to be read
    at once starts within seconds.

    Entries are checked at the start, all of them up to ``check``, of more that many, evenly spread; each other one when it is
    read. Media files are opened when a batch needs them.

    Args:
        path: ``.json`` (an array) or ``.jsonl`` (one object a line).
        root: folder that media paths start from; None means the file's own folder.
        limit: use the first so many samples; later ones are not looked at.
        check: entries that are checked at the start; None: all.

    Raises:
        ValueError: a limit or check below 1, or another kind of file.
        DataError: a missing or empty file, or broken entries; the message names the file and up to five places.
    """

    def __init__(self, path: str, root: str | None = None, limit: int | None = None, check: int | None = 5_000) -> None:
        for name, value in (("limit", limit), ("check", check)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1 sample, got {value}; null takes all")
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
        self._index = JsonIndex(self._path, limit)
        if not len(self):
            raise DataError(f"{self._path}: holds no samples")
        self.modalities = self._checked(min(check or len(self), len(self)))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``; its media are paths."""
        entry = self._index[index]
        try:
            return _sample(entry, index, self._root)
        except DataError as error:
            raise DataError(f"{self._path}, {self._index.place(index)}: {error}") from error

    def _checked(self, number: int) -> frozenset[str]:
        """Check so many entries; the modalities that any entry of the file carries."""
        seen: set[str] = set()
        problems: list[str] = []
        for i in np.linspace(0, len(self) - 1, number).astype(int).tolist():
            try:
                seen |= self[i].media.keys()
            except DataError as error:
                problems.append(str(error))
            if len(problems) == SHOWN:
                break
        if problems:
            raise DataError("; ".join(problems))
        missing = FIELDS.keys() - seen if number < len(self) else set()
        return frozenset(seen | {modality for modality in missing if self._carries(modality)})

    def _carries(self, modality: str) -> bool:
        """Whether any entry has media of a modality; only those entries are read in which one of its fields is named."""
        names = "|".join(FIELDS[modality])
        named = re.compile(rf'"(?:{names})"\s*+:\s*+(?!null|\[\s*+\])'.encode())
        word = f'"{FIELDS[modality][0]}'.encode()
        done = -1
        with self._path.open("rb") as file:
            for at, data in chunks(file, int(self._index.ends[-1]), overlap=256):
                for place in find_all(data, word):
                    i = self._index.at(at + place) if named.match(data, place) else None
                    if i is not None and i != done and modality in self[i].media:
                        return True
                    done = done if i is None else i
        return False


def _sample(entry: Any, index: int, root: Path) -> Sample:
    if not isinstance(entry, dict):
        raise DataError(f"a sample is an object, got {type(entry).__name__}")
    messages = messages_of(entry.get("conversations", entry.get("messages")))
    media = {modality: paths for modality in FIELDS if (paths := _paths(entry, modality, root))}
    return Sample(str(entry.get("id", index)), messages, media)


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
