"""The order of batches: what an epoch holds, and that nothing but the seed and the batch's number decides it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from mllm_factory.errors import ConfigError, DataError
from mllm_factory.interfaces import Source
from mllm_factory.loader import SMALL, Order, eval_batches, train_batches
from mllm_factory.types import Batch, Message, Sample

EMPTY = torch.zeros(0, 0, dtype=torch.int64)
BLANK = Batch(EMPTY, EMPTY, EMPTY.bool(), EMPTY, EMPTY, {}, {})


class Numbers(Source):
    """Sample i is called i."""

    def __init__(self, size: int, broken: int = -1, error: type[Exception] = KeyError) -> None:
        self.modalities = frozenset[str]()
        self.size, self.broken, self.error = size, broken, error

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if index == self.broken:
            raise self.error("no such picture")
        return Sample(str(index), (Message("user", "a"),))


def collate(samples: Sequence[Sample]) -> Batch:
    return replace(BLANK, input_ids=torch.tensor([[int(s.id)] for s in samples]), ids=tuple(s.id for s in samples))


def refuse_seven(samples: Sequence[Sample]) -> Batch:
    if any(s.id == "7" for s in samples):
        raise DataError("sample '7' has no answer")
    return collate(samples)


def length(index: int) -> int:
    return random.Random(index).randint(5, 500)


def noting(asked: list[int]) -> Callable[[int], int]:
    """``length`` that writes down what it was asked."""

    def noted(index: int) -> int:
        asked.append(index)
        return length(index)

    return noted


def numbers(batches: Sequence[Batch]) -> list[list[int]]:
    return [[int(i) for i in batch.ids] for batch in batches]


@pytest.mark.parametrize("size", [1, 3, 32, 33, 257])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
@pytest.mark.parametrize("bucket", [1, 3, 16])
def test_every_sample_at_most_once_an_epoch(size: int, batch_size: int, bucket: int) -> None:
    order = Order(size, batch_size, seed=5, length=length, bucket=bucket)
    n = order.per_epoch
    assert n == max(1, size // batch_size)
    for epoch in range(3):
        batches = [order[g] for g in range(epoch * n, (epoch + 1) * n)]
        assert {len(batch) for batch in batches} == {min(size, batch_size)}
        seen = [i for batch in batches for i in batch]
        assert len(set(seen)) == len(seen) == n * min(size, batch_size)
        assert set(seen) <= set(range(size))


def test_order_depends_on_seed_and_number_alone() -> None:
    def fresh(seed: int = 1) -> Order:
        return Order(100, 4, seed, length, bucket=5)

    running = fresh()
    from_start = [running[g] for g in range(80)]
    assert [fresh()[g] for g in reversed(range(80))][::-1] == from_start
    assert [fresh(2)[g] for g in range(80)] != from_start
    assert from_start[:25] != from_start[25:50] != from_start[50:75]


def test_bucketing_sorts_windows_of_the_same_permutation() -> None:
    plain, bucketed = Order(96, 4, 3, length, bucket=1), Order(96, 4, 3, length, bucket=6)
    shuffled = False
    for window in range(4):
        numbers_of = range(window * 6, window * 6 + 6)
        members = [i for g in numbers_of for i in plain[g]]
        wanted = sorted(members, key=length)
        batches = [bucketed[g] for g in numbers_of]
        assert sorted(batches, key=lambda b: length(b[0])) == [wanted[k : k + 4] for k in range(0, 24, 4)]
        shuffled |= [i for b in batches for i in b] != wanted
    assert shuffled
    spread = [max(map(length, b)) - min(map(length, b)) for b in (bucketed[g] for g in range(24))]
    loose = [max(map(length, b)) - min(map(length, b)) for b in (plain[g] for g in range(24))]
    assert sum(spread) < 0.4 * sum(loose)


def test_lengths_are_taken_for_the_window_needed_and_once() -> None:
    asked: list[int] = []
    order = Order(400, 4, 0, noting(asked), bucket=5)
    order[0]
    assert len(asked) == 20 + 4, "and as many of the next window as were given"
    for g in range(1, 4):
        order[g]
    assert len(asked) == 20 + 16
    for g in range(300):
        order[g]
    assert len(asked) == len(set(asked)) == 400
    untouched: list[int] = []
    Order(400, 4, 0, noting(untouched), bucket=1)[0]
    assert not untouched


def every_kind(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Tensors that travel in different ways."""
    values = torch.arange(12.0).reshape(3, 4)
    kinds = {"float": values, "bool": values > 3, "bf16": values.bfloat16(), "turned": values.T, "part": values[:, 1:3]}
    return kinds | {"number": torch.tensor(7), "none": torch.zeros(0, 5), "large": torch.arange(SMALL // 4 + 1.0)}


def test_tensors_arrive_from_a_worker_as_they_were() -> None:
    here = every_kind([])
    (there,) = islice(
        train_batches(Numbers(4), every_kind, Order(4, 2, 0), first=0, world=1, rank=0, workers=1, pin=False), 1
    )
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        assert tensor.dtype == here[name].dtype and tensor.shape == here[name].shape, name
        assert tensor.stride() == here[name].stride() and tensor.data_ptr() % 64 == here[name].data_ptr() % 64, (
            f"{name}: kernels round by these"
        )
        assert torch.equal(tensor, here[name]), name
        tensor.copy_(tensor.clone())  # it can be written
    assert there["large"].is_shared() and not there["float"].is_shared()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_the_same_reached_or_started_at(workers: int) -> None:
    order = Order(30, 4, seed=2, length=length, bucket=3)

    def run(first: int, world: int = 1, rank: int = 0, n: int = 10) -> list[list[int]]:
        batches = train_batches(
            Numbers(30), collate, order, first=first, world=world, rank=rank, workers=workers, pin=False
        )
        return numbers(list(islice(batches, n)))

    whole = run(0, n=20)
    assert whole == [order[g] for g in range(20)]
    assert run(7) == whole[7:17]
    assert run(4, world=2, rank=0, n=5) == whole[4:14:2]
    assert run(4, world=2, rank=1, n=5) == whole[5:14:2]


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_state_is_untouched(workers: int) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    order = Order(30, 4, seed=2, length=length)
    list(islice(train_batches(Numbers(30), collate, order, first=0, world=1, rank=0, workers=workers, pin=False), 9))
    list(eval_batches(Numbers(9), collate, batch_size=2, seed=0, limit=None, length=length, workers=workers, pin=False))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_come_out_as_they_are(workers: int) -> None:
    def drain(source: Source, collate_with: Callable[[Sequence[Sample]], Batch]) -> None:
        order = Order(len(source), 2, seed=0)
        batches = train_batches(source, collate_with, order, first=0, world=1, rank=0, workers=workers, pin=False)
        list(islice(batches, 20))

    with pytest.raises(DataError) as caught:
        drain(Numbers(20), refuse_seven)
    assert str(caught.value) == "sample '7' has no answer"
    with pytest.raises(DataError) as caught:
        drain(Numbers(20, broken=13), collate)
    assert str(caught.value) == "sample number 13 cannot be read: KeyError: 'no such picture'"
    with pytest.raises(DataError) as caught:
        drain(Numbers(20, broken=13, error=DataError), collate)
    assert str(caught.value) == "sample number 13: no such picture"


@pytest.mark.parametrize("size", range(1, 40))
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_evaluation_sees_each_sample_once_in_balanced_batches(size: int, batch_size: int) -> None:
    batches = numbers(
        list(
            eval_batches(
                Numbers(size), collate, batch_size=batch_size, seed=4, limit=None, length=length, workers=0, pin=False
            )
        )
    )
    assert sorted(i for batch in batches for i in batch) == list(range(size))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2 or size == 1
    assert max(sizes) <= max(batch_size, 3)
    if batch_size > 2:
        assert max(sizes) <= batch_size


def test_evaluation_limit_takes_a_prefix_of_one_permutation() -> None:
    def seen(limit: int | None, seed: int = 0, by: Callable[[int], int] | None = length) -> list[int]:
        batches = eval_batches(
            Numbers(50), collate, batch_size=4, seed=seed, limit=limit, length=by, workers=0, pin=False
        )
        return [i for batch in numbers(list(batches)) for i in batch]

    assert set(seen(10)) < set(seen(20)) < set(seen(None)) == set(range(50))
    assert len(seen(10)) == 10
    assert set(seen(10)) == set(seen(10, by=None)) != set(seen(10, seed=1))
    assert set(seen(10)) != set(range(10))
    assert [length(i) for i in seen(None)] == sorted(length(i) for i in range(50))  # 50 < a window of 64


def test_empty_source_and_limit() -> None:
    with pytest.raises(DataError, match="the data set is empty"):
        Order(0, 4, 0)
    options = {"batch_size": 2, "seed": 0, "length": None, "workers": 0, "pin": False}
    with pytest.raises(DataError, match="the data set is empty"):
        eval_batches(Numbers(0), collate, limit=None, **options)
    with pytest.raises(ConfigError, match="at least 1 sample, got a limit of 0"):
        eval_batches(Numbers(3), collate, limit=0, **options)
