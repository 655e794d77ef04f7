"""A frozen encoder's features on disk: each item is encoded once, and read and decoded once by each loader worker.

The process that trains writes features and, behind them, a list of what is there; loader workers read the list, and send the
place of an item's features instead of its pixels as soon as those of a whole batch are there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mllm_factory.cached_items import digests, listed
from mllm_factory.interfaces import Encoder
from mllm_factory.model import learns


class FeatureCache:
    """Stands in for a frozen encoder's ``forward``.

    Features are found by a hash of the item's values, and computed one item at a time: they depend on nothing but the item,
    so a run with the cache repeats bit for bit, also when it is continued. The file grows by doubling and belongs to one
    process; it is emptied at the start. Places of stored items [n] int64 are taken for the items themselves.

    Args:
        encode: the encoder's own forward, [n, *item_shape] -> [n, num_tokens, dim].
        file: where features lie, as float32.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], file: Path) -> None:
        self.encode, self.file = encode, file
        self.places: dict[bytes, int] = {}
        self.rows: np.memmap | None = None
        file.parent.mkdir(parents=True, exist_ok=True)
        listed(file).write_bytes(b"")

    def __call__(self, items: Tensor) -> Tensor:
        """[n, *item_shape], or [n] int64 places -> [n, num_tokens, dim]"""
        if items.ndim == 1 and items.dtype == torch.int64:
            places = items.tolist()
        else:
            keys = digests(items)
            for key, item in zip(keys, items, strict=True):
                if key not in self.places:
                    self._store(key, self.encode(item[None])[0].float().cpu().numpy())
            places = [self.places[key] for key in keys]
        if self.rows is None:
            return self.encode(items)
        return torch.from_numpy(self.rows[places]).to(items.device, non_blocking=True)

    def _store(self, key: bytes, features: np.ndarray) -> None:
        place = len(self.places)
        if self.rows is None or place == len(self.rows):
            self._grow(features.shape)
        if self.rows is not None:
            self.rows[place] = features
        self.places[key] = place
        with listed(self.file).open("ab") as file:
            file.write(key)

    def _grow(self, shape: tuple[int, ...]) -> None:
        room = 256 if self.rows is None else 2 * len(self.rows)
        mode: Literal["w+", "r+"] = "w+" if self.rows is None else "r+"
        self.rows = np.memmap(self.file, np.float32, mode, shape=(room, *shape))


def cache_features(encoder: Encoder, file: Path) -> bool:
    """Let an encoder remember its features if it is frozen; True where it is."""
    if learns(encoder):
        return False
    encoder.forward = FeatureCache(encoder.forward, file)  # type: ignore[method-assign]
    return True
