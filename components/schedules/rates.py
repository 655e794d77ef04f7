"""Learning rates of the parts, shared by the schedules."""

from __future__ import annotations

from mllm_factory import TrainState, hint

PARTS = ("vision", "audio", "projector", "backbone")


def peak_rates(lr: float, part_lr: dict[str, float | None] | None) -> dict[str, float]:
    """Each part's peak rate: its own, or ``lr`` where it has none.

    Raises:
        ValueError: a negative rate, or a part that does not exist.
    """
    own = part_lr or {}
    for part in own:
        if part not in PARTS:
            raise ValueError(f"part_lr: there is no part '{part}'{hint(part, PARTS)}")
    rates = {part: lr if own.get(part) is None else float(own[part] or 0.0) for part in PARTS}
    for part, rate in rates.items():
        if not rate >= 0:
            raise ValueError(f"the learning rate of {part} is {rate}; it must be 0 or more")
    return rates


def warmup_factor(step: int, max_steps: int, warmup: float) -> float:
    """min(1, (step + 1) / (warmup * max_steps)): the linear rise, never 0 at the first step."""
    rise = warmup * max_steps
    return min(1.0, (step + 1) / rise) if rise > 0 else 1.0


def set_rates(state: TrainState, peak: dict[str, float], factor: float) -> None:
    """lr of every optimizer group = its part's peak rate * factor."""
    for group in state.optimizer.param_groups:
        group["lr"] = peak[group["name"]] * factor
