"""Which items have cached features: a list on disk, written by the process that trains and read by its loader workers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DIGEST = 16
"""Bytes of a digest."""


def digests(items: Tensor) -> list[bytes]:
    """What features are found by: 16 bytes for each item of [n, *item_shape]."""
    return [hashlib.blake2b(item.tobytes(), digest_size=DIGEST).digest() for item in items.cpu().contiguous().numpy()]


def listed(file: Path) -> Path:
    """The list of the items whose features are in ``file``: their digests, by place."""
    return file.with_suffix(".items")


class CachedItems:
    """What a loader worker knows of the ``FeatureCache`` of another process.

    Args:
        file: of the cache.
    """

    def __init__(self, file: Path) -> None:
        self.list = listed(file)
        self.places: dict[bytes, int] = {}
        self.items: dict[Any, list[bytes]] = {}  # by raw item: the digests of what it becomes

    def look(self) -> None:
        """Read what was added to the list."""
        known = len(self.places) * DIGEST
        if not self.list.exists() or self.list.stat().st_size <= known:
            return
        with self.list.open("rb") as file:
            file.seek(known)
            new = file.read()
        for start in range(0, len(new) - len(new) % DIGEST, DIGEST):
            self.places[new[start : start + DIGEST]] = len(self.places)

    def learn(self, raw: Any, items: Tensor) -> None:
        """Remember what a raw item becomes, [m, *item_shape]; nothing is kept of items that are no path and no bytes."""
        if (name := _name(raw)) is not None and name not in self.items:
            self.items[name] = digests(items)

    def all_of(self, raws: Sequence[Any]) -> list[Tensor] | None:
        """For each raw item the places of its features, [m] int64; None where any are missing."""
        self.look()
        found = []
        for raw in raws:
            keys = self.items.get(_name(raw))
            if keys is None or not all(key in self.places for key in keys):
                return None
            found.append(torch.tensor([self.places[key] for key in keys], dtype=torch.int64))
        return found


def _name(raw: Any) -> Any:
    """A raw item's name among others: its path, or a hash of its bytes; None for what is decoded already."""
    if isinstance(raw, bytes):
        return hashlib.blake2b(raw, digest_size=DIGEST).digest()
    return str(raw) if isinstance(raw, str | Path) else None
