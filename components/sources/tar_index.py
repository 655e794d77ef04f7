"""Where the files inside of tar archives stand, found from their headers alone (POSIX.1-1988 ustar, pax and GNU long names).

A shard for webdataset is a plain tar in which the files of a sample follow one another and share their name up to the first
dot: ``0007.jpg``, ``0007.json``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mllm_factory import DataError

BLOCK = 512
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes are."""

    name: str
    start: int
    size: int


class Group(NamedTuple):
    """The files of one sample, by what follows the first dot of their names."""

    shard: int
    key: str
    parts: tuple[tuple[str, int, int], ...]


def expand(text: str) -> list[Path]:
    """The files of a pattern in order: braces (``shard-{000..012}.tar``) name each of them, ``*`` those that are there.

    Raises:
        DataError: one that braces name is missing, or a pattern has none.
    """
    paths = [text]
    while any(_BRACES.search(path) for path in paths):
        paths = [named for path in paths for named in _numbered(path)]
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if "*" in name or "?" in name:
            base = Path(path.anchor) if path.is_absolute() else Path()
            hits = sorted(base.glob(str(path.relative_to(path.anchor) if path.is_absolute() else path)))
            if not hits:
                raise DataError(f"{name}: no file is named like this (looked in {base.absolute()}); correct the path")
            found += hits
        elif not path.is_file():
            raise DataError(f"{name}: no such file (looked for {path.absolute()}); correct the path or fetch the shard")
        else:
            found.append(path)
    return found


def _numbered(path: str) -> list[str]:
    """The path with its first braces filled in."""
    braces = _BRACES.search(path)
    if braces is None:
        return [path]
    first, last = braces[1], braces[2]
    return [
        f"{path[: braces.start()]}{i:0{len(first)}d}{path[braces.end() :]}" for i in range(int(first), int(last) + 1)
    ]


def members(path: Path) -> Iterator[Member]:
    """The regular files of a tar, in order.

    Raises:
        DataError: it is no plain tar, or cut off; names the file.
    """
    with path.open("rb") as file:
        end, at = os.fstat(file.fileno()).st_size, 0
        long: dict[str, str] = {}
        while len(header := _read(file, at, BLOCK)) == BLOCK and any(header):
            name, size, kind = _header(path, header, at)
            size = int(long.pop("size", size))
            start = at + BLOCK
            if start + size > end:
                raise DataError(
                    f"{path}: cut off inside of {name}, {end - start} of {size} bytes are there; fetch the shard again"
                )
            if kind == b"L":
                long["path"] = _read(file, start, size).rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                long |= _pax(_read(file, start, size))
            else:
                name = long.pop("path", name)
                if kind in b"0\0":
                    yield Member(name, start, size)
            at = start + -(-size // BLOCK) * BLOCK
        if len(header) < BLOCK:
            raise DataError(f"{path}: cut off, the mark of the archive's end is missing; fetch the shard again")


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _header(path: Path, header: bytes, at: int) -> tuple[str, int, bytes]:
    """Name, size and kind of the file that a header announces."""
    stated = header[148:156].strip(b" \0")
    if not stated.isdigit() or int(stated, 8) != sum(header) - sum(header[148:156]) + 8 * 32:
        what = "is compressed; unpack it first, random access needs a plain tar" if header[:2] == b"\x1f\x8b" else ""
        raise DataError(f"{path}: {what or f'no tar, or damaged at byte {at}; fetch the shard again'}")
    name = header[:100].rstrip(b"\0")
    if header[257:262] == b"ustar" and header[257:265] != b"ustar  \0" and (prefix := header[345:500].rstrip(b"\0")):
        name = prefix + b"/" + name
    field = header[124:136]
    size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)
    return name.decode("utf-8", "surrogateescape"), size, header[156:157]


def _pax(records: bytes) -> dict[str, str]:
    """``path`` and ``size`` of an extended header: records ``<length> <key>=<value>\\n``."""
    found, at = {}, 0
    while at < len(records) and (space := records.find(b" ", at)) > 0:
        length = int(records[at:space])
        key, _, value = records[space + 1 : at + length - 1].partition(b"=")
        found[key.decode()] = value.decode("utf-8", "surrogateescape")
        at += length
    return {key: value for key, value in found.items() if key in ("path", "size")}


def groups(paths: Sequence[Path], limit: int | None = None) -> Iterator[Group]:
    """The samples of shards: neighbouring files whose names agree up to the first dot behind the last slash.

    Raises:
        DataError: a shard that is damaged.
    """
    count = 0
    for shard, path in enumerate(paths):
        key = ""
        parts: list[tuple[str, int, int]] = []
        for member in members(path):
            folder, _, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            name = f"{folder}/{stem}" if folder else stem
            if not stem or not ending:
                continue
            if parts and name != key:
                yield Group(shard, key, tuple(parts))
                count += 1
                if count == limit:
                    return
                parts = []
            key = name
            parts.append((ending.lower(), member.start, member.size))
        if parts:
            yield Group(shard, key, tuple(parts))
            count += 1
            if count == limit:
                return
