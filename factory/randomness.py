"""The random generators of a process: torch's (on the CPU and on the device), Python's and numpy's."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

CPU = torch.device("cpu")


def seed_of(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose: 56 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:7], "big")


def seed_all(seed: int) -> None:
    """Start every generator anew."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def snapshot(device: torch.device = CPU) -> dict[str, Any]:
    """The state of every generator as tensors and plain values."""
    numpy = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": {**numpy, "state": {"key": key, "pos": int(numpy["state"]["pos"])}},
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: Mapping[str, Any], device: torch.device = CPU) -> None:
    """Continue from what ``snapshot`` gave."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    numpy = state["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].numpy().astype(np.uint32)}})
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def untouched(device: torch.device = CPU) -> Iterator[None]:
    """Whatever is drawn inside, every generator continues afterwards as if nothing had been."""
    state = snapshot(device)
    try:
        yield
    finally:
        restore(state, device)
