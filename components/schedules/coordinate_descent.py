"""Coordinate descent over components: the baselines Feature CD and Language CD of CoMMIT (arXiv 2407.20454).

One component learns until its weights are stable, then the next. The paper does not say when weights are stable; here

    ||theta_t - theta_{t-w}|| < tol ||theta_t||        looked at every w steps of a component's turn, after the warm-up

or, at the latest, when the turn has taken its share of all steps. The last component learns to the end.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mllm_factory import ConfigError, Schedule, TrainState, hint, register
from mllm_factory.components.schedules.balance import LLM, Component, partition
from mllm_factory.components.schedules.balance_turns import require_share, require_whole, rest, square_sum
from mllm_factory.components.schedules.cosine import Cosine


@register("coordinate_descent")
class CoordinateDescent(Schedule):
    """Components learn one after the other, each once; the others' gradients are taken away, so their optimizer state rests.

    Rates are those of one cosine over the whole training, so a later component starts where it has fallen to; ``final: 1``
    keeps them level. A resting component is not frozen for the forward pass: dropout and running statistics stay in training mode.

    Args:
        lr: peak learning rate.
        part_lr: peak rate of single parts (vision, audio, projector, backbone); None: ``lr``.
        warmup: share of all steps spent rising linearly from 0, in [0, 1].
        final: rate at the end as a share of the peak, in [0, 1].
        order: names of the components, each once, in the order of their turns; None: ``[encoder, llm]``.
        components: name -> parts; None for ``encoder`` (everything before the backbone) and ``llm``.
        tol: relative change over ``window`` steps below which weights are stable; 0 looks at no weights and keeps no copy.
        window: w, steps between looks.
        share: longest turn as a share of all steps, in (0, 1].

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        part_lr: dict[str, float | None] | None = None,
        warmup: float = 0.05,
        final: float = 0.0,
        order: list[str] | None = None,
        components: dict[str, list[str]] | None = None,
        tol: float = 1e-3,
        window: int = 20,
        share: float = 0.5,
    ) -> None:
        self.base = Cosine(lr, part_lr, warmup, final)
        require_share(share=share)
        if share == 0:
            raise ValueError("share: 0 leaves no step to a turn; use more than 0")
        if tol < 0:
            raise ValueError(f"tol: {tol} is no change of weights; use 0 or more")
        if window < 1:
            raise ValueError(f"window: {window} is no number of steps; use 1 or more")
        self.order, self.wanted = order if order is not None else ["encoder", LLM], components
        self.tol, self.window, self.share, self.warmup = tol, window, share, warmup
        self.turn, self.spent, self.change = 0, 0, math.nan
        self.since: list[Tensor] = []
        self.components: list[Component] = []

    def before_step(self, state: TrainState) -> None:
        """Set the rates; only the component whose turn it is keeps its gradients."""
        self._attach(state)
        self.base.before_step(state)
        rest(self.components, self.order[self.turn])

    def after_step(self, state: TrainState) -> None:
        """Hand over where the weights are stable or the turn is over."""
        self.base.after_step(state)
        self.spent += 1
        if self.turn == len(self.order) - 1:
            return
        if self._stable(state) or self.spent >= math.floor(self.share * state.max_steps):
            self.turn, self.spent, self.since, self.change = self.turn + 1, 0, [], math.nan

    def _attach(self, state: TrainState) -> None:
        if self.components:
            return
        self.components = partition(state.model, self.wanted)
        names = [component.name for component in self.components]
        for name in self.order:
            if name not in names:
                raise ConfigError(f"schedule.order: there is no component '{name}'{hint(name, names)}")
        if sorted(self.order) != sorted(names):
            raise ConfigError(f"schedule.order: {self.order} must name each component once: {', '.join(names)}")
        if self.tol:
            require_whole(p for component in self.components for p in component.params)

    def _stable(self, state: TrainState) -> bool:
        """||theta_t - theta_{t-w}|| < tol ||theta_t||, every w steps from the end of the warm-up on."""
        warm = state.step + 1 >= self.warmup * state.max_steps
        if not self.tol or not warm or self.spent % self.window:
            return False
        params = next(c.params for c in self.components if c.name == self.order[self.turn])
        before, self.since = self.since, [p.detach().clone() for p in params]
        if not before:
            return False
        norm = math.sqrt(square_sum(self.since))
        moved = math.sqrt(square_sum(now - old.to(now.device) for now, old in zip(self.since, before, strict=True)))
        self.change = moved / norm if norm else math.inf
        return self.change < self.tol

    def readings(self) -> dict[str, float]:
        """Whose turn it is (1 or 0 for each component), and the last relative change of its weights."""
        turns = {f"balance/active/{name}": float(i == self.turn) for i, name in enumerate(self.order)}
        return {**turns, "balance/change": self.change}

    def state_dict(self) -> dict[str, Any]:
        """The turn, its steps, and the weights to compare with."""
        return {"turn": self.turn, "spent": self.spent, "change": self.change, "since": list(self.since)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.turn, self.spent, self.change = state["turn"], state["spent"], state["change"]
        self.since = list(state["since"])
