"""A frozen encoder's features on disk: each item is encoded once, however often it comes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mllm_factory.interfaces import Encoder
from mllm_factory.model import learns


class FeatureCache:
    """Stands in for a frozen encoder's ``forward``.

    Features are found by a hash of the item's values, and computed one item at a time: they depend on nothing but the item,
    so a run with the cache repeats bit for bit, also when it is continued. The file grows by doubling and belongs to one
    process; it is emptied at the start.

    Args:
        encode: the encoder's own forward, [n, *item_shape] -> [n, num_tokens, dim].
        file: where features lie, as float32.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], file: Path) -> None:
        self.encode, self.file = encode, file
        self.places: dict[bytes, int] = {}
        self.rows: np.memmap | None = None

    def __call__(self, items: Tensor) -> Tensor:
        """[n, *item_shape] -> [n, num_tokens, dim]"""
        keys = [hashlib.blake2b(item.tobytes(), digest_size=16).digest() for item in items.cpu().contiguous().numpy()]
        for key, item in zip(keys, items, strict=True):
            if key not in self.places:
                self._store(key, self.encode(item[None])[0].float().cpu().numpy())
        if self.rows is None:
            return self.encode(items)
        found = torch.from_numpy(self.rows[[self.places[key] for key in keys]])
        return found.to(items.device, non_blocking=True)

    def _store(self, key: bytes, features: np.ndarray) -> None:
        place = len(self.places)
        if self.rows is None or place == len(self.rows):
            self._grow(features.shape)
        if self.rows is not None:
            self.rows[place] = features
        self.places[key] = place

    def _grow(self, shape: tuple[int, ...]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        room = 256 if self.rows is None else 2 * len(self.rows)
        mode: Literal["w+", "r+"] = "w+" if self.rows is None else "r+"
        self.rows = np.memmap(self.file, np.float32, mode, shape=(room, *shape))


def cache_features(encoder: Encoder, file: Path) -> bool:
    """Let an encoder remember its features if it is frozen; True where it is."""
    if learns(encoder):
        return False
    encoder.forward = FeatureCache(encoder.forward, file)  # type: ignore[method-assign]
    return True
