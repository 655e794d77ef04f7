"""Linear warm-up and half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts)."""

from __future__ import annotations

import math

from mllm_factory import Schedule, TrainState, register
from mllm_factory.components.schedules.rates import peak_rates, set_rates, warmup_factor


@register("cosine")
class Cosine(Schedule):
    """lr(t) = lr * (final + (1 - final) * (1 + cos(pi * t)) / 2), t rising from 0 after the warm-up towards 1.

    Args:
        lr: peak learning rate.
        part_lr: peak rate of single parts (vision, audio, projector, backbone); None: ``lr``.
        warmup: share of all steps spent rising linearly from 0, in [0, 1].
        final: rate at the end as a share of the peak, in [0, 1].

    Raises:
        ValueError: a value outside its range, or an unknown part.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        part_lr: dict[str, float | None] | None = None,
        warmup: float = 0.05,
        final: float = 0.0,
    ) -> None:
        for name, share in (("warmup", warmup), ("final", final)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {share}")
        self.peak, self.warmup, self.final = peak_rates(lr, part_lr), warmup, final

    def before_step(self, state: TrainState) -> None:
        """Set the rate of every group."""
        rise = self.warmup * state.max_steps
        t = max(0.0, (state.step - rise) / max(1.0, state.max_steps - rise))
        factor = self.final + (1 - self.final) * (1 + math.cos(math.pi * t)) / 2
        set_rates(state, self.peak, factor if t > 0 else warmup_factor(state.step, state.max_steps, self.warmup))
