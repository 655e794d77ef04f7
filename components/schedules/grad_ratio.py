"""Balance by gradient size: greedy multimodal learning (Wu et al., ICML 2022, arXiv 2202.05306) carried over to encoder and LLM.

    G_c = sum over joint steps of ||g_c||^2 / ||theta_c||^2          the component's accumulated learning speed
    log10 G_fast - log10 G_slow > eps  ->  the next Q steps train the slow component alone

In the original g and theta are those of parallel branches and of the modules that join them, and the speed is the ratio of the
two; a serial model has no such branches, so the components' own speeds are compared. That is our adaptation. As in the
authors' code, speeds are read at joint steps only, so there is at least one between two curations.
"""

from __future__ import annotations

import math
from typing import Any

from mllm_factory import Schedule, TrainState, register
from mllm_factory.components.schedules.balance import Component, partition
from mllm_factory.components.schedules.balance_turns import (
    gradients,
    require_positive,
    require_whole,
    rest,
    square_sum,
)
from mllm_factory.components.schedules.cosine import Cosine

TINY = 1e-300
"""Stands for a sum of squares that is zero."""


@register("grad_ratio")
class GradRatio(Schedule):
    """Train the slowest component alone for Q steps wherever the accumulated speeds are more than ``eps`` apart.

    Rates are those of a cosine with warm-up; during the warm-up speeds are accumulated and every step is a joint one. Costs no forward.

    Args:
        lr: peak learning rate.
        part_lr: peak rate of single parts (vision, audio, projector, backbone); None: ``lr``.
        warmup: share of all steps spent rising linearly from 0, in [0, 1].
        final: rate at the end as a share of the peak, in [0, 1].
        components: name -> parts; None for ``encoder`` (everything before the backbone) and ``llm``.
        eps: difference of log10 of the speeds that starts a curation.
        steps: Q, steps of a curation.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        part_lr: dict[str, float | None] | None = None,
        warmup: float = 0.05,
        final: float = 0.0,
        components: dict[str, list[str]] | None = None,
        eps: float = 0.01,
        steps: int = 5,
    ) -> None:
        self.base = Cosine(lr, part_lr, warmup, final)
        require_positive(eps=eps, steps=steps)
        self.wanted, self.eps, self.steps, self.warmup = components, eps, steps, warmup
        self.components: list[Component] = []
        self.speeds: dict[str, float] = {}
        self.slow, self.left, self.difference = "", 0, math.nan

    def before_step(self, state: TrainState) -> None:
        """Set the rates; read the speeds at a joint step, or let all but the slow component rest."""
        self._attach(state)
        self.base.before_step(state)
        if self.left:
            self.left -= 1
            rest(self.components, self.slow)
            return
        for component in self.components:
            speed = square_sum(gradients(component)) / max(square_sum(component.params), TINY)
            self.speeds[component.name] = self.speeds.get(component.name, 0.0) + speed
        logs = {name: math.log10(max(speed, TINY)) for name, speed in self.speeds.items()}
        self.slow = min(logs, key=lambda name: logs[name])
        self.difference = max(logs.values()) - logs[self.slow]
        if self.difference > self.eps and state.step + 1 >= self.warmup * state.max_steps:
            self.left = self.steps

    def after_step(self, state: TrainState) -> None:
        """Nothing of its own."""
        self.base.after_step(state)

    def _attach(self, state: TrainState) -> None:
        if not self.components:
            self.components = partition(state.model, self.wanted)
            require_whole(p for component in self.components for p in component.params)

    def readings(self) -> dict[str, float]:
        """Accumulated speeds, the largest difference of their logarithms, and the steps left of a curation."""
        speeds = {f"balance/speed/{name}": speed for name, speed in self.speeds.items()}
        return {**speeds, "balance/difference": self.difference, "balance/curation": float(self.left)}

    def state_dict(self) -> dict[str, Any]:
        """The speeds and the curation under way."""
        return {"speeds": dict(self.speeds), "slow": self.slow, "left": self.left, "difference": self.difference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.speeds, self.slow = dict(state["speeds"]), state["slow"]
        self.left, self.difference = state["left"], state["difference"]
