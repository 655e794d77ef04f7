"""Intervals and tests against published numbers, closed forms and enumeration."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
import torch

from mllm_factory.components.metrics import statistics

NAN = math.nan


# ---------------------------------------------------------------- clusters


def test_clusters_join_what_touches() -> None:
    draw = random.Random(0)
    for _ in range(80):
        n = draw.randrange(1, 12)
        shared = [[draw.randrange(9) for _ in range(draw.randrange(3))] for _ in range(n)]
        groups = [{i} for i in range(n)]  # brute force: merge until nothing touches
        for _ in range(n):
            for a, b in product(range(n), repeat=2):
                if a == b or set(shared[a]) & set(shared[b]):
                    groups[a] |= groups[b]
                    groups[b] |= groups[a]
        found = statistics.clusters(shared).tolist()
        assert all((found[a] == found[b]) == (b in groups[a]) for a, b in product(range(n), repeat=2))


# ---------------------------------------------------------------- bootstrap


def test_resampled_means_are_those_of_resampled_samples() -> None:
    """Every mean of three clusters with replacement, enumerated: the bootstrap gives those and no others, as often."""
    values, cluster = torch.tensor([1.0, 3.0, 10.0, 6.0]), torch.tensor([7, 7, 2, 5])
    members = {c: values[cluster == c].tolist() for c in (7, 2, 5)}
    expected: dict[float, int] = {}
    for chosen in product(members, repeat=3):
        drawn = [x for c in chosen for x in members[c]]
        mean = round(sum(drawn) / len(drawn), 6)
        expected[mean] = expected.get(mean, 0) + 1
    draws = statistics.bootstrap(values[:, None], cluster, 27000, 0)[:, 0]
    seen = {round(v, 6): int(n) for v, n in zip(*(t.tolist() for t in draws.unique(return_counts=True)), strict=True)}
    assert set(seen) == set(expected)
    assert all(seen[mean] / 1000 == pytest.approx(count, rel=0.15) for mean, count in expected.items())


def test_the_spread_of_the_bootstrap_is_the_clustered_standard_error() -> None:
    generator = torch.Generator().manual_seed(0)
    cluster = torch.arange(200).repeat_interleave(5)
    values = torch.randn(200, generator=generator).repeat_interleave(5) + 0.1 * torch.randn(1000, generator=generator)
    draws = statistics.bootstrap(values[:, None], cluster, 4000, 0)
    by_cluster = values.view(200, 5).mean(1)
    assert float(draws.std()) == pytest.approx(float(by_cluster.std()) / 200**0.5, rel=0.05)
    naive = statistics.bootstrap(values[:, None], torch.arange(1000), 4000, 0)
    assert float(draws.std()) > 2 * float(naive.std()), "five questions on a picture are not five pictures"
    low, high = statistics.interval(draws)
    mean = float(values.mean())
    assert float(high) - mean == pytest.approx(1.96 * float(draws.std()), rel=0.1)
    assert mean - float(low) == pytest.approx(1.96 * float(draws.std()), rel=0.1)


def test_columns_share_their_resamples() -> None:
    x = torch.randn(40, dtype=torch.float64)
    draws = statistics.bootstrap(torch.stack([x, 2 * x + 1], 1), torch.arange(40), 300, 0)
    assert torch.allclose(draws[:, 1], 2 * draws[:, 0] + 1, atol=1e-12)
    assert torch.equal(draws, statistics.bootstrap(torch.stack([x, 2 * x + 1], 1), torch.arange(40), 300, 0))
    assert not torch.equal(draws, statistics.bootstrap(torch.stack([x, 2 * x + 1], 1), torch.arange(40), 300, 1))


def test_blocks_of_resamples_are_as_many_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_BLOCK", 100)
    draws = statistics.bootstrap(torch.randn(30, 2), torch.arange(30), 10, 0)
    assert draws.shape == (10, 2) and len(draws.unique(dim=0)) == 10


def test_values_that_are_missing_are_left_out() -> None:
    values = torch.tensor([[1.0, NAN], [3.0, NAN], [NAN, 5.0], [5.0, NAN]])
    assert statistics.means(values).tolist() == [3.0, 5.0]
    draws = statistics.bootstrap(values, torch.arange(4), 500, 0)
    assert float(draws[:, 0].nanmean()) == pytest.approx(3.0, abs=0.15)
    assert draws[:, 1].isnan().all(), "one sample has no interval"


def test_one_cluster_has_no_interval() -> None:
    low, high = statistics.interval(statistics.bootstrap(torch.randn(9, 1), torch.zeros(9).long(), 20, 0))
    assert low.isnan().all() and high.isnan().all()
    assert statistics.bootstrap(torch.zeros(0, 1), torch.zeros(0).long(), 5, 0).isnan().all()


# ---------------------------------------------------------------- shares and tests


def test_wilson_intervals() -> None:
    assert statistics.wilson(0, 30) == (0.0, pytest.approx(0.1135, abs=5e-4))
    assert statistics.wilson(90, 100) == (pytest.approx(0.8256, abs=5e-4), pytest.approx(0.9448, abs=5e-4))
    low, high = statistics.wilson(30, 30)
    assert high == 1.0 and low == pytest.approx(1 - statistics.wilson(0, 30)[1])
    assert all(math.isnan(end) for end in statistics.wilson(0, 0))


def test_mcnemar() -> None:
    assert statistics.mcnemar(3, 12) == pytest.approx(0.0352, abs=5e-5) == statistics.mcnemar(12, 3)
    assert statistics.mcnemar(0, 0) == 1.0 and statistics.mcnemar(4, 4) == 1.0
    assert statistics.mcnemar(0, 10) == pytest.approx(2 / 1024)
    assert 0 < statistics.mcnemar(2000, 2200) < 0.01


def test_mcnemar_is_the_enumeration_of_all_outcomes() -> None:
    for b, c in [(1, 5), (2, 7), (3, 3), (0, 4)]:
        n = b + c
        extreme = sum(min(sum(s), n - sum(s)) <= min(b, c) for s in product((0, 1), repeat=n))
        assert statistics.mcnemar(b, c) == pytest.approx(min(1.0, extreme / 2**n))


def test_sign_flips_are_the_enumeration_of_all_signs() -> None:
    d = torch.tensor([0.5, 1.0, -0.2, 0.7, 0.3, 0.9, NAN])
    cluster = torch.tensor([0, 0, 1, 2, 3, 4, 5])
    sums = [1.5, -0.2, 0.7, 0.3, 0.9]
    exact = sum(
        abs(sum(e * s for e, s in zip(signs, sums, strict=True))) >= abs(sum(sums)) - 1e-9
        for signs in product((-1, 1), repeat=5)
    )
    assert statistics.sign_flip(d, cluster, 20000, 0) == pytest.approx(exact / 32, abs=0.01)


def test_sign_flips_of_nothing_and_of_zeros() -> None:
    cluster = torch.arange(50)
    assert statistics.sign_flip(torch.zeros(50), cluster, 100, 0) == 1.0
    assert math.isnan(statistics.sign_flip(torch.full((50,), NAN), cluster, 100, 0))
    assert statistics.sign_flip(torch.ones(50), cluster, 999, 0) == pytest.approx(1 / 1000), "the smallest there is"
