"""Batches in an order that is a pure function of the seed and the batch's number.

A run can therefore continue at any batch, and any number of processes or loader workers sees the same batches. The global
random state is never touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, count, pairwise
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset

from mllm_factory.ending import outlive_notice
from mllm_factory.errors import ConfigError, DataError, UserError, WorkerError
from mllm_factory.interfaces import Source
from mllm_factory.types import Sample

T = TypeVar("T")
SMALL = 1 << 20
"""Bytes of a tensor that a worker sends by value."""
Collate = Callable[[Sequence[Sample]], T]
Length = Callable[[int], int]
WINDOW = 16
"""Batches of an evaluation whose samples are sorted by length together."""


class Order:
    """Sample indices of every micro-batch of an endless run: ``order[g]`` for g = 0, 1, ...

    Each epoch is a random permutation (of files, then of so many neighbours, where ``near`` says so) of which a remainder
    smaller than a batch is left out. The permutation is cut into windows of ``bucket`` batches; a window is sorted by length,
    cut into batches, and its batches are shuffled.

    Args:
        size: samples of the source.
        batch_size: samples of a micro-batch; all of them where there are fewer.
        seed: of every permutation.
        length: tokens of the sample at an index; None leaves windows unsorted.
        bucket: batches of a window; 1 turns sorting off.
        near: of the source.

    Raises:
        DataError: the source is empty.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        length: Length | None = None,
        bucket: int = WINDOW,
        near: tuple[Sequence[int], int] | None = None,
    ) -> None:
        _check_size(size)
        self._near = near
        self.size, self.batch_size, self.seed, self.bucket = size, min(batch_size, size), seed, bucket
        self._length = length if bucket > 1 else None
        self._lengths: dict[int, int] = {}
        self._epoch: tuple[int, list[int]] = (-1, [])
        self._window: tuple[tuple[int, int], list[list[int]]] = ((-1, -1), [])

    @property
    def per_epoch(self) -> int:
        """Micro-batches of an epoch."""
        return self.size // self.batch_size

    def __getitem__(self, g: int) -> list[int]:
        """Sample indices of micro-batch ``g``."""
        epoch, batch = divmod(g, self.per_epoch)
        window, place = divmod(batch, self.bucket)
        if self._window[0] != (epoch, window):
            self._window = ((epoch, window), self._batches(epoch, window))
        if self._length is not None:
            ahead = (batch + self.bucket) * self.batch_size  # so that no batch waits for a whole window's lengths
            for i in self._epoch[1][ahead : ahead + self.batch_size]:
                self._length_of(i)
        return self._window[1][place]

    def _batches(self, epoch: int, window: int) -> list[list[int]]:
        if self._epoch[0] != epoch:
            used = self.per_epoch * self.batch_size
            order = (
                _permutation(self.size, self.seed, epoch) if self._near is None else self._by_file(epoch, *self._near)
            )
            self._epoch = (epoch, order[:used])
        span = self.bucket * self.batch_size
        indices = self._epoch[1][window * span : (window + 1) * span]
        if self._length is None:
            return _cut(indices, self.batch_size)
        batches = _cut(sorted(indices, key=self._length_of), self.batch_size)
        return [batches[i] for i in _permutation(len(batches), self.seed, epoch, window)]

    def _by_file(self, epoch: int, sizes: Sequence[int], mix: int) -> list[int]:
        """File after file in random order; of that row, each window of ``mix`` samples is mixed."""
        ends = list(accumulate(sizes))
        files = _permutation(len(ends), self.seed, epoch, -1)
        row = [i for f in files for i in range(ends[f] - sizes[f], ends[f])]
        windows = _cut(row, mix)
        return [w[i] for n, w in enumerate(windows) for i in _permutation(len(w), self.seed, epoch, -2, n)]

    def _length_of(self, index: int) -> int:
        if index not in self._lengths and self._length is not None:
            self._lengths[index] = self._length(index)
        return self._lengths[index]


def train_batches(
    source: Source, collate: Collate[T], order: Order, *, first: int, world: int, rank: int, workers: int, pin: bool
) -> Iterator[T]:
    """Micro-batches ``first + rank``, ``first + rank + world``, ... of an endless run.

    Args:
        source: the samples that ``order`` counts.
        collate: samples -> batch (or whatever is wanted of them).
        order: which samples make which micro-batch.
        first: number of the first micro-batch of all processes.
        world: processes.
        rank: this process.
        workers: loader processes; 0 loads in this one.
        pin: put batches into page-locked memory.

    Raises:
        DataError: while iterating, for a sample that cannot be used; also from a worker.
    """
    return _load(source, collate, (order[g] for g in count(first + rank, world)), workers, pin)


def eval_batches(
    source: Source,
    collate: Collate[T],
    *,
    batch_size: int,
    seed: int,
    limit: int | None,
    length: Length | None,
    workers: int,
    pin: bool,
) -> Iterator[T]:
    """The samples of an evaluation, once each: the first ``limit`` of a seeded permutation, batches of similar length.

    Batches differ in size by at most one, and none has a single sample unless there is only one: an ablation exchanges media
    within a batch. For that, ``batch_size`` may be exceeded by one where it is 1 or 2.

    Raises:
        DataError: the source is empty; while iterating, a sample that cannot be used.
        ConfigError: ``limit`` is below 1.
    """
    _check_size(len(source))
    if limit is not None and limit < 1:
        raise ConfigError(f"an evaluation takes at least 1 sample, got a limit of {limit}; null takes all")
    indices = _permutation(len(source), seed)[:limit]
    span = WINDOW * batch_size
    if length is not None:
        indices = [i for window in _cut(indices, span) for i in sorted(window, key=length)]
    return _load(source, collate, iter(_balanced(indices, batch_size)), workers, pin)


def _balanced(indices: list[int], batch_size: int) -> list[list[int]]:
    n = len(indices)
    batches = min(-(-n // batch_size), max(n // 2, 1))
    ends = [n * i // batches for i in range(batches + 1)]
    return [indices[a:b] for a, b in pairwise(ends)]


def _cut(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[i : i + size]) for i in range(0, len(indices), size)]


def _permutation(n: int, *seed: int) -> list[int]:
    """A permutation of 0 ... n - 1 that depends on all of ``seed``."""
    digest = hashlib.sha256(repr(seed).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(n, generator=generator).tolist()


def _check_size(size: int) -> None:
    if size < 1:
        raise DataError("the data set is empty; check its path, split and limit")


# ---------------------------------------------------------------- loading


class _Failure(NamedTuple):
    """A user's error on its way out of a worker, where raising it would bury it in a traceback."""

    error: UserError


class _Batches(Dataset[T | _Failure]):
    """Batches by their lists of sample indices."""

    def __init__(self, source: Source, collate: Collate[T]) -> None:
        self.source, self.collate = source, collate

    def __getitem__(self, indices: list[int]) -> T | _Failure:
        try:
            return self.collate([self._sample(i) for i in indices])
        except UserError as error:
            return _Failure(error)

    def _sample(self, index: int) -> Sample:
        try:
            return self.source[index]
        except UserError as error:
            raise DataError(f"sample number {index}: {error}") from error
        except Exception as error:
            raise DataError(f"sample number {index} cannot be read: {type(error).__name__}: {error}") from error


class _Indices:
    """An iterator as the sampler that the loader asks for."""

    def __init__(self, indices: Iterable[list[int]]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.indices)


def _load(source: Source, collate: Collate[T], indices: Iterator[list[int]], workers: int, pin: bool) -> Iterator[T]:
    loader = DataLoader(
        _Batches(source, collate),
        sampler=_Indices(indices),
        batch_size=None,
        collate_fn=_same,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_begin_worker,
        generator=torch.Generator().manual_seed(0),  # else starting the loader draws from the global one
    )
    try:
        for batch in loader:
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch
    except (EOFError, ConnectionError) as error:  # killed while it sent a batch
        raise WorkerError(error) from error


def _same(batch: Any) -> Any:
    return batch


def _begin_worker(worker: int) -> None:
    outlive_notice(worker)
    ForkingPickler.register(Tensor, _sent)


def _sent(tensor: Tensor) -> Any:
    """How a worker sends a tensor: a small one by value, because each shared memory costs a connection of milliseconds.

    What arrives has the same strides and is aligned as torch does it: kernels round by these.
    """
    if tensor.nbytes > SMALL or not tensor.is_contiguous() or tensor.dtype == torch.bfloat16:  # unknown to numpy
        return reduce_tensor(tensor)
    return _received, (tensor.numpy(),)


def _received(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).clone()
