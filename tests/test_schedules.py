"""Learning rates against formulas worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from mllm_factory.errors import ConfigError
from mllm_factory.interfaces import Schedule
from mllm_factory.registry import build


def rates(max_steps: int, **node: Any) -> dict[str, list[float]]:
    """Part -> its rate at every step."""
    schedule = build(Schedule, node, "schedule")  # type: ignore[type-abstract]
    groups = [{"name": part, "lr": None} for part in ("vision", "projector", "projector", "backbone")]
    state: Any = SimpleNamespace(step=0, max_steps=max_steps, optimizer=SimpleNamespace(param_groups=groups))
    found: dict[str, list[float]] = {}
    for state.step in range(max_steps):
        schedule.before_step(state)
        assert groups[1]["lr"] == groups[2]["lr"]
        for group in (groups[0], *groups[2:]):
            found.setdefault(group["name"], []).append(group["lr"])
    return found


def test_constant_after_a_linear_rise() -> None:
    found = rates(10, name="constant", lr=2.0, warmup=0.4)["backbone"]
    assert found == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert set(rates(3, name="constant", lr=0.1)["vision"]) == {0.1}


def test_cosine_rises_and_falls() -> None:
    found = rates(8, name="cosine", lr=1.0, warmup=0.25)["backbone"]
    fall = [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]  # 6 steps after a rise of 2
    assert found == pytest.approx([0.5, 1.0, *fall])
    assert found[2] == 1.0 and found[5] == pytest.approx(0.5)


def test_cosine_falls_towards_its_final_share() -> None:
    found = rates(1000, name="cosine", lr=3.0, warmup=0.0, final=0.1)["backbone"]
    assert found[0] == 3.0
    assert found[500] == pytest.approx(3.0 * 0.55)
    assert found[-1] == pytest.approx(0.3, rel=1e-3) and found[-1] >= 0.3
    assert all(a >= b for a, b in zip(found, found[1:], strict=False))


def test_no_step_has_a_rate_of_zero_whatever_the_shares() -> None:
    for max_steps in (1, 2, 3, 7, 50):
        for warmup in (0.0, 0.01, 0.3, 0.5, 1.0):
            for name in ("constant", "cosine"):
                found = rates(max_steps, name=name, lr=1.0, warmup=warmup)["backbone"]
                assert all(0 < rate <= 1 for rate in found), (max_steps, warmup, name, found)
                assert max(found) > 0.5


def test_parts_have_their_own_peaks() -> None:
    parts = {"vision": 0.0, "projector": 5.0, "backbone": None}
    plain = rates(6, name="cosine", lr=1.0, warmup=0.5)["backbone"]
    found = rates(6, name="cosine", lr=1.0, warmup=0.5, part_lr=parts)
    assert found["vision"] == [0.0] * 6
    assert found["projector"] == pytest.approx([5 * rate for rate in plain])
    assert found["backbone"] == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part_lr": {"projektor": 1.0}}, "no part 'projektor'; did you mean 'projector'"),
        ({"lr": -1.0}, "the learning rate of .* is -1.0; it must be 0 or more"),
        ({"part_lr": {"vision": -0.5}}, "the learning rate of vision is -0.5"),
        ({"warmup": 1.5}, "warmup is a share .* got 1.5"),
        ({"warmup": -0.1}, "warmup is a share .* got -0.1"),
    ],
)
@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_values_out_of_range_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Schedule, {"name": name, **options}, "schedule")  # type: ignore[type-abstract]
