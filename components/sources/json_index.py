"""Where the entries of a JSON file stand, found without reading them: two numbers an entry, whatever the file's size.

Lines end at newlines. The entries of an array are found by its structure: brackets and commas outside of strings, where a
quote behind an odd number of backslashes ends no string (RFC 8259, section 7). Bytes of UTF-8 beyond ASCII are none of these.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mllm_factory import DataError

LARGE = 1 << 26
"""Bytes of a file whose places are kept for the next start."""

CHUNK = 1 << 18
"""Bytes read at once: few enough to stay in a processor's cache."""

QUOTE, BACKSLASH, COMMA, OPEN, CLOSE = 1, 2, 3, 4, 5
KINDS = np.zeros(256, np.uint8)
"""What each byte is; 0 for what has no part in the structure."""
KINDS[list(b'"\\,[{]}')] = [QUOTE, BACKSLASH, COMMA, OPEN, OPEN, CLOSE, CLOSE]
STEPS = np.array([0, 0, 0, 0, 1, -1], np.int8)
"""What each kind adds to the depth."""
BOM = b"\xef\xbb\xbf"
_BLANK = np.isin(np.arange(256), np.frombuffer(b" \t\r\n\v\f", np.uint8))


class JsonIndex:
    """The entries of a ``.jsonl`` file (one a line, blank lines left out) or of the array in a ``.json`` file.

    The places in a file of ``LARGE`` bytes or more are kept in ``$MLLM_FACTORY_CACHE`` (else ``~/.cache/mllm_factory``), as long as
    its size and time of change stay; where nothing can be kept there, they are found again at each start.

    Args:
        path: the file.
        limit: index the first so many entries and read no further; None: all.

    Attributes:
        starts, ends: [n] int64, the bytes of each entry.

    Raises:
        DataError: the file holds no array, or one that does not end; names the line.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self.path, self.lines = path, path.suffix == ".jsonl"
        with path.open("rb") as file:
            self._state = _state(file)
            store = _store(path, self._state) if limit is None and self._state[0] >= LARGE else None
            found = _stored(store)
            if found is None:
                found = _lines(file, limit) if self.lines else _elements(file, limit)
                _keep(store, found)
        self.starts, self.ends = (places if limit is None else places[:limit].copy() for places in found)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Any:
        """The JSON value of entry ``i``.

        Raises:
            DataError: it is broken, or the file was changed; names file and line.
            IndexError: there is no such entry.
        """
        start, end = int(self.starts[i]), int(self.ends[i])
        with self.path.open("rb") as file:  # opened anew: loader workers must not share a place in the file
            if _state(file) != self._state:
                raise DataError(f"{self.path}: the file was changed since the run opened it; start again")
            file.seek(start)
            text = file.read(end - start).rstrip()
        try:
            return json.loads(text.decode())
        except json.JSONDecodeError as error:
            line, column = self._locate(start, text.decode()[: error.pos])
            raise DataError(f"{self.path}, line {line}: broken JSON, {error.msg} at column {column}") from error
        except UnicodeDecodeError as error:
            line, _ = self._locate(start, "")
            raise DataError(
                f"{self.path}, line {line}: not UTF-8 text ({error.reason} at byte {error.start})"
            ) from error

    def place(self, i: int) -> str:
        """What to call entry ``i`` in messages: its line in ``.jsonl``, its number from 0 in an array."""
        return f"line {self._locate(int(self.starts[i]), '')[0]}" if self.lines else f"entry {i}"

    def at(self, place: int) -> int | None:
        """The entry that byte ``place`` belongs to."""
        i = int(np.searchsorted(self.starts, place, "right")) - 1
        return i if i >= 0 and place < self.ends[i] else None

    def _locate(self, start: int, before: str) -> tuple[int, int]:
        """Line and column, from 1, of the character behind ``before``, a text that starts at byte ``start``."""
        line, last = 1, -1
        with self.path.open("rb") as file:
            for at, data in chunks(file, start):
                data = data[: start - at]
                line += data.count(b"\n")
                last = at + data.rfind(b"\n") if b"\n" in data else last
        if "\n" in before:
            return line + before.count("\n"), len(before) - before.rfind("\n")
        return line, len(before) + (1 if self.lines else start - last)


Places = tuple[np.ndarray, np.ndarray]


def _store(path: Path, state: tuple[int, int]) -> Path:
    """Where the places in a file of this size and time of change are kept."""
    root = Path(os.environ.get("MLLM_FACTORY_CACHE") or Path.home() / ".cache" / "mllm_factory").expanduser()
    name = hashlib.blake2b(f"{path.resolve()} {state}".encode(), digest_size=16).hexdigest()
    return root / "index" / f"{name}.npy"


def _stored(store: Path | None) -> Places | None:
    """What was kept, or None."""
    if store is None or not store.exists():
        return None
    try:
        starts, ends = np.load(store, allow_pickle=False)
    except (OSError, ValueError):  # cut off by a full disk
        return None
    return starts, ends


def _keep(store: Path | None, found: Places) -> None:
    """Keep places for the next start, whole or not at all."""
    if store is None:
        return
    with suppress(OSError):
        store.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=store.parent, suffix=".tmp", delete=False) as file:
            np.save(file, np.stack(found), allow_pickle=False)
        Path(file.name).replace(store)


def _state(file: BinaryIO) -> tuple[int, int]:
    """Size and time of the last change."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def chunks(file: BinaryIO, end: int | None = None, overlap: int = 0) -> Iterator[tuple[int, bytes]]:
    """(place, bytes) of a file from its start to ``end``; each begins with the last ``overlap`` bytes of the one before."""
    file.seek(0)
    at, tail = 0, b""
    while (end is None or at < end) and (data := file.read(CHUNK)):
        yield at - len(tail), tail + data
        at, tail = at + len(data), data[len(data) - overlap :] if overlap else b""


def find_all(data: bytes, word: bytes) -> Iterator[int]:
    """The places of a word of three letters or more, found where its first three stand: several times as fast as ``bytes.find``."""
    values, (a, b, c) = np.frombuffer(data, np.uint8), word[:3]
    found = (values[:-2] == a) & (values[1:-1] == b)
    found &= values[2:] == c
    return (place for place in np.flatnonzero(found).tolist() if data.startswith(word, place))


# ---------------------------------------------------------------- lines


def _lines(file: BinaryIO, limit: int | None) -> Places:
    """Starts and ends of the lines that are not blank; at least the first ``limit`` of them."""
    starts, firsts, found, fresh = [], [], 0, True  # fresh: the next byte starts a line
    for at, data in chunks(file):
        values = np.frombuffer(data, np.uint8)
        begins = np.flatnonzero(values == 10) + 1
        if fresh:
            begins = np.concatenate([[0], begins])
        fresh = bool(len(begins)) and begins[-1] == len(values)
        begins = begins[: len(begins) - fresh]
        starts.append(begins + at)
        firsts.append(values[begins])
        found += int((~_BLANK[firsts[-1]]).sum())
        if limit is not None and found > limit:  # one more, so that the last one's end is known
            break
    begins = np.concatenate([np.zeros(0, np.int64), *starts])
    first = np.concatenate([np.zeros(0, np.uint8), *firsts])
    ends = np.append(begins[1:], os.fstat(file.fileno()).st_size)
    keep = ~_BLANK[first]
    for i in np.flatnonzero(~keep & (first != 10)):  # it starts with a blank: look whether there is more
        file.seek(begins[i])
        keep[i] = bool(file.read(ends[i] - begins[i]).strip())
    file.seek(0)
    if len(begins) and file.read(3) == BOM:
        keep[0] = bool(file.read(ends[0] - 3).strip())
        begins[0] = 3
    return begins[keep], ends[keep]


# ---------------------------------------------------------------- arrays


@dataclass
class _Structure:
    """Where a scan stands between two chunks.

    Attributes:
        inside: 1 in a string.
        escaped: the next byte is escaped.
        depth: brackets that are open.
    """

    inside: int = 0
    escaped: bool = False
    depth: int = 0

    def feed(self, data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places, kinds and depths behind them of the commas and brackets outside of strings in the next bytes."""
        values = np.frombuffer(data, np.uint8)
        places = np.flatnonzero(_may_be_structural(values))
        kinds = KINDS.take(values.take(places))
        quote = kinds == QUOTE
        quote[self._escaped(places, np.flatnonzero(kinds == BACKSLASH), len(data))] = False
        inside = np.bitwise_xor.accumulate(quote.view(np.uint8)) ^ np.uint8(self.inside)
        outside = np.flatnonzero((inside == 0) & (kinds >= COMMA))
        self.inside = int(inside[-1]) if len(inside) else self.inside
        places, kinds = places.take(outside), kinds.take(outside)
        depths = self.depth + np.cumsum(STEPS.take(kinds), dtype=np.int32)
        self.depth = int(depths[-1]) if len(depths) else self.depth
        return places, kinds, depths

    def _escaped(self, places: np.ndarray, slashes: np.ndarray, end: int) -> np.ndarray:
        """Which of ``places`` stand behind an odd number of backslashes; ``slashes`` tells which of them are these."""
        first = places[:1] == 0 if self.escaped else places[:0]
        hidden = np.flatnonzero(first)
        slashes = slashes[len(hidden) :] if len(hidden) and len(slashes) and slashes[0] == 0 else slashes
        self.escaped = False
        if len(slashes):
            at = places[slashes]
            start = np.flatnonzero(np.diff(at, prepend=-2) != 1)  # of each row of backslashes
            last = np.append(start[1:], len(slashes)) - 1
            odd = last[(last - start) % 2 == 0]
            self.escaped = bool(len(odd)) and at[odd[-1]] == end - 1
            odd = odd[slashes[odd] + 1 < len(places)]
            behind = slashes[odd] + 1
            hidden = np.concatenate([hidden, behind[places[behind] == at[odd] + 1]])
        return hidden


def _may_be_structural(values: np.ndarray) -> np.ndarray:
    """Which bytes have a part in the structure, by comparisons alone; ``|``, of which KINDS is 0, is among them.

    With bit 5 set, ``[ \\ ]`` are ``{ | }``: 0x7B to 0x7D.
    """
    found = ((values | np.uint8(0x20)) - np.uint8(0x7B)) <= 2
    found |= values == ord('"')
    found |= values == ord(",")
    return found


def _elements(file: BinaryIO, limit: int | None) -> Places:
    """Starts and ends of the elements of the array that a file holds; at least the first ``limit`` of them."""
    structure, borders, found = _Structure(), [], 0  # borders: the array's brackets and the commas between elements
    for at, data in chunks(file):
        if at == 0 and not data.removeprefix(BOM).lstrip().startswith(b"["):
            break
        places, kinds, depths = structure.feed(data)
        closes = np.flatnonzero(depths <= 0)[:1]
        border = ((kinds == COMMA) & (depths == 1)) | (depths <= 0)
        border[: int(at == 0)] = True
        if len(closes):
            border[closes[0] + 1 :] = False
        borders.append(places[border] + at)
        found += int(border.sum())
        if len(closes):
            behind = [data[places[closes[0]] + 1 :], *iter(lambda: file.read(CHUNK), b"")]
            if any(text.strip() for text in behind):
                break
            return _between(file, np.concatenate(borders))
        if limit is not None and found > limit:
            return _between(file, np.concatenate(borders))
    raise _fault(file)


def _between(file: BinaryIO, borders: np.ndarray) -> Places:
    """Starts and ends of what stands between neighbouring borders; nothing where that is one blank."""
    starts, ends = borders[:-1] + 1, borders[1:]
    file.seek(starts[0])
    if len(starts) == 1 and not file.read(ends[0] - starts[0]).strip():
        return starts[:0], ends[:0]
    return starts, ends


def _fault(file: BinaryIO) -> DataError:
    """What is wrong with a file that holds no array, by the exact rules; this reads all of it."""
    name = file.name
    file.seek(0)
    try:
        value = json.loads(file.read())
    except json.JSONDecodeError as error:
        return DataError(f"{name}, line {error.lineno}: broken JSON, {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return DataError(f"{name}, not UTF-8 text ({error.reason} at byte {error.start})")
    return DataError(f"{name}: a .json file holds an array of samples, got {type(value).__name__}")
