"""The same rate at every step."""

from __future__ import annotations

from mllm_factory import Schedule, TrainState, register
from mllm_factory.components.schedules.rates import peak_rates, set_rates, warmup_factor


@register("constant")
class Constant(Schedule):
    """lr(step) = lr * min(1, (step + 1) / (warmup * max_steps)).

    Args:
        lr: learning rate.
        part_lr: rate of single parts (vision, audio, projector, backbone); None: ``lr``.
        warmup: share of all steps spent rising linearly from 0, in [0, 1].

    Raises:
        ValueError: a value outside its range, or an unknown part.
    """

    def __init__(self, lr: float = 1e-3, part_lr: dict[str, float | None] | None = None, warmup: float = 0.0) -> None:
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup is a share of all steps between 0 and 1, got {warmup}")
        self.peak, self.warmup = peak_rates(lr, part_lr), warmup

    def before_step(self, state: TrainState) -> None:
        """Set the rate of every group."""
        set_rates(state, self.peak, warmup_factor(state.step, state.max_steps, self.warmup))
