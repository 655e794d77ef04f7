"""CoMMIT without a network: distances, the multipliers, and the loop they close. Numbers in names are those of docs/commit.md."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mllm_factory import ConfigError, Schedule, build
from mllm_factory.components.schedules.balance import Balance, multipliers
from mllm_factory.components.schedules.distances import DISTANCES, ORDER, distance, sample_sum

METRICS = ["sqrt_js", "tv", "hellinger", "l2"]
P, Q = [0.7, 0.2, 0.1], [0.2, 0.5, 0.3]


def logits(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log() + 3.0  # a constant does not matter


def triples(seed: int = 0) -> Tensor:
    return torch.randn(3, 400, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kl", 0.7 * math.log(3.5) + 0.2 * math.log(0.4) + 0.1 * math.log(1 / 3)),
        ("reverse_kl", 0.2 * math.log(2 / 7) + 0.5 * math.log(2.5) + 0.3 * math.log(3)),
        ("tv", 0.5),
        ("l2", math.sqrt(0.25 + 0.09 + 0.04)),
        ("hellinger", math.sqrt(sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(P, Q, strict=True)) / 2)),
        ("js", 0.132918),
        ("sqrt_js", 0.364579),
    ],
)
def test_distances_by_hand(name: str, value: float) -> None:
    assert float(distance(name, logits(P), logits(Q))) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("name", DISTANCES)
def test_09_distances_are_never_negative_and_zero_at_coincidence(name: str) -> None:
    a, b, _ = triples().float()
    assert (distance(name, a.bfloat16(), b.bfloat16()) >= 0).all()
    assert distance(name, a, b).dtype == torch.float64
    assert float(distance(name, a, a).abs().max()) < (1e-12 if ORDER[name] == 2 else 1e-7)


@pytest.mark.parametrize("name", METRICS)
def test_10_metrics_keep_the_triangle_inequality(name: str) -> None:
    a, b, c = triples()
    assert (distance(name, a, c) <= distance(name, a, b) + distance(name, b, c) + 1e-12).all()


def test_10_kl_does_not() -> None:
    a, b, c = logits([0.9, 0.1]), logits([0.5, 0.5]), logits([0.1, 0.9])
    assert float(distance("kl", a, c)) > float(distance("kl", a, b) + distance("kl", b, c))


def test_many_rows_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, _ = triples()
    whole = distance("kl", a, b)
    monkeypatch.setattr("mllm_factory.components.schedules.distances.ROWS", 7 * 3)
    assert torch.equal(distance("kl", a, b), whole)


def test_08_samples_of_different_length_weigh_the_same() -> None:
    tokens, row = torch.tensor([1.0, 3.0, 10.0]).double(), torch.tensor([0, 0, 3])
    found, samples = sample_sum(tokens, row, 5)
    assert (float(found), float(samples)) == ((1 + 3) / 2 + 10, 2)


# ---------------------------------------------------------------- multipliers


@pytest.mark.parametrize(("kappa", "expected"), [(1.0, (1.0, 1.0)), (3.0, (1.5, 0.5)), (1 / 3, (0.5, 1.5))])
def test_11_multipliers_at_three_points(kappa: float, expected: tuple[float, float]) -> None:
    assert multipliers([kappa], gain=2.0) == pytest.approx(expected, abs=1e-15)


def test_11_multipliers_over_twelve_decades() -> None:
    kappas = [10.0**k for k in range(-6, 7)]
    pairs = [multipliers([kappa], gain=2.0) for kappa in kappas]
    for kappa, (encoder, llm) in zip(kappas, pairs, strict=True):
        assert encoder + llm == pytest.approx(2.0, rel=1e-12)
        assert encoder / llm == pytest.approx(kappa, rel=1e-12)
        assert multipliers([1 / kappa], 2.0) == pytest.approx((llm, encoder), rel=1e-9)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(pairs))
    assert multipliers([0.0], 2.0) == [0.0, 2.0]


def test_more_components_share_by_the_inverse_of_their_distance() -> None:
    vision, audio, llm = 0.2, 0.4, 0.8  # d of each
    inverse = [1 / vision, 1 / audio, 1 / llm]
    expected = [3 * w / sum(inverse) for w in inverse]
    assert multipliers([llm / vision, llm / audio], gain=2.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        ("arithmetic", (2 + 8 + 0.5) / 3),
        ("log", (2 * 8 * 0.5) ** (1 / 3)),
        ("median", 2.0),
        ("ratio", (2 + 4 + 1) / (1 + 0.5 + 2)),
    ],
)
def test_averages_by_hand(average: str, expected: float) -> None:
    balance = Balance(3, 2.0, average, (1e-3, 1e3))
    for d in ([99.0, 1.0], [1.0, 2.0], [0.5, 4.0], [2.0, 1.0]):  # the first falls out of the window
        balance.push(d)
    assert balance.kappas() == pytest.approx([expected])


def test_each_kappa_is_cut_before_averaging() -> None:
    balance = Balance(2, 2.0, "arithmetic", (0.1, 10.0))
    balance.push([1e-9, 1.0])
    balance.push([1.0, 2.0])
    assert balance.kappas() == pytest.approx([6.0])


# ---------------------------------------------------------------- the loop


def closed(k0: float, p: int, window: int, every: int, average: str, steps: int = 4000) -> list[float]:
    """Averaged kappa at each update where kappa = k0 (m_llm / m_encoder)^p answers the multipliers at once."""
    balance, m, history = Balance(window, 2.0, average, (1e-12, 1e12)), (1.0, 1.0), []
    for step in range(steps):
        balance.push([1.0, k0 * (m[1] / m[0]) ** p])
        if (step + 1) % every == 0 and len(balance.window) == window:
            encoder, llm = balance.multipliers()
            m = (encoder, llm)
            history.append(balance.kappas()[0])
    return history


@pytest.mark.parametrize("regimes", [2, 3, 5])
def test_14_a_metric_settles_at_the_square_root(regimes: int) -> None:
    assert closed(20.0, 1, 20 * regimes, 20, "log")[-1] == pytest.approx(math.sqrt(20), rel=1e-3)  # 4.47


def test_14_a_quadratic_divergence_settles_at_the_cube_root_with_three_regimes() -> None:
    assert closed(20.0, 2, 60, 20, "log")[-1] == pytest.approx(20 ** (1 / 3), rel=1e-3)  # 2.71


def test_14_a_quadratic_divergence_swings_with_one_regime() -> None:
    swing = [math.log(k) for k in closed(20.0, 2, 20, 20, "log", steps=240)]
    assert all(a * b < 0 for a, b in itertools.pairwise([s - math.log(20) / 3 for s in swing]))
    assert abs(swing[-1]) > 25  # at the bounds: one component stands still, then the other


@pytest.mark.parametrize(
    ("kind", "window", "warns"), [("kl", 40, True), ("kl", 41, False), ("sqrt_js", 20, True), ("sqrt_js", 21, False)]
)
def test_14_a_loop_that_cannot_be_stable_is_announced(
    kind: str, window: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mllm_factory"):
        build(Schedule, {"name": "commit", "distance": kind, "window": window, "update_every": 20})
    assert bool(caplog.records) == warns


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": 10, "update_every": 20}, "window: 10 steps are less than update_every"),
        ({"window": 2, "update_every": 2, "measure_every": 3}, "hold no measurement"),
        ({"distance": "js2"}, "did you mean 'js'"),
        ({"average": "mean"}, "average: 'mean'"),
        ({"gain": 0.0}, "gain must be above 0"),
        ({"bounds": [2.0, 3.0]}, "around 1"),
        ({"point": "here", "weight": 1.0}, "point: 'here'"),
        ({"act": False, "weight": 1.0}, "weight: 0"),
        ({"weight": -1.0}, "weight of the regulariser"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(Schedule, {"name": "commit", **options})
