"""CoMMIT's regulariser (arXiv 2407.20454, eqs. 7 and 8): each component's gradient also climbs its own output step.

    g_c <- g_c - weight * grad_{theta_c} D_c

As printed the equations are circular: theta_t+1 is needed for D, which makes theta_t+1. ``lookahead`` takes the gradient at a
provisional step theta^ (first order, applied at theta_t); ``lagged`` at theta_t, against the weights of the step before.
At theta_t against itself the gradient is zero for every distance, so that reading is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm_factory import TrainState, total
from mllm_factory.components.schedules.balance import Component
from mllm_factory.components.schedules.probe import Probe, Seen, copies, held, probing, show

POINTS = ("lookahead", "lagged")


class Regularizer:
    """Adds its gradient to that of the loss.

    Args:
        weight: lambda.
        point: one of POINTS.
        cap: largest ||weight * grad D|| as a share of the component's gradient norm; None does not cap.
    """

    def __init__(self, weight: float, point: str, cap: float | None) -> None:
        self.weight, self.point, self.cap = weight, point, cap
        self.previous: list[Tensor] = []

    def apply(self, probe: Probe, seen: Sequence[Seen], state: TrainState) -> list[float]:
        """Change the gradients; D of each component. The weights are those of theta_t before and after."""
        if self.point == "lookahead":
            ahead = provisional(probe.params, state)
            here = held(probe.params)
            try:
                found = [self._gradient(probe, seen, c, here, ahead, state) for c in probe.components]
            finally:
                show(probe.params, here)
        else:
            found = self._lagged(probe, seen, held(probe.params), state) if self.previous else []
            self.previous = copies(probe.params)
        for component, (_, gradients) in zip(probe.components, found, strict=False):
            self._add(component, gradients)
        return [d for d, _ in found] or [float("nan")] * len(probe.components)

    def _gradient(
        self,
        probe: Probe,
        seen: Sequence[Seen],
        component: Component,
        here: Sequence[Tensor],
        ahead: Sequence[Tensor],
        state: TrainState,
    ) -> tuple[float, list[Tensor]]:
        """D_c and its gradient at theta^ of the component, all others at theta_t."""
        probe.only(component, here, ahead)
        with probing(probe.model), torch.enable_grad():
            d, count = probe.sum(seen, [probe.again(s, component) for s in seen])
            return _reduced(d, count, component, state)

    def _lagged(
        self, probe: Probe, seen: Sequence[Seen], here: Sequence[Tensor], state: TrainState
    ) -> list[tuple[float, list[Tensor]]]:
        """D_c between theta_t and theta_t with the component of the step before, and its gradient at theta_t."""
        found = []
        for component in probe.components:
            with probing(probe.model), torch.no_grad():
                try:
                    probe.only(component, here, self.previous)
                    before = [Seen(s.batch, probe.again(s, component), s.encoded, s.features) for s in seen]
                finally:
                    show(probe.params, here)
            with probing(probe.model), torch.enable_grad():
                d, count = probe.sum(before, [probe.again(s, component) for s in seen])
                found.append(_reduced(d, count, component, state))
        return found

    def _add(self, component: Component, gradients: Sequence[Tensor]) -> None:
        pairs = [(p.grad, g) for p, g in zip(component.params, gradients, strict=True) if p.grad is not None]
        if not pairs:
            return
        factor = torch.tensor(self.weight, dtype=torch.float64, device=pairs[0][0].device)
        if self.cap is not None:
            own, other = (
                torch.stack([t.double().square().sum() for t in each]).sum().sqrt() for each in zip(*pairs, strict=True)
            )
            factor = torch.minimum(factor, self.cap * own / other.clamp_min(1e-300))
        for grad, g in pairs:
            grad -= (factor * g).to(grad.dtype)


def _reduced(d: Tensor, count: Tensor, component: Component, state: TrainState) -> tuple[float, list[Tensor]]:
    """The mean over the samples of all processes, and its gradient."""
    gradients = torch.autograd.grad(d, component.params, allow_unused=True)
    everywhere = total(torch.stack([d.detach(), count]), state.world)
    samples = everywhere[1].clamp(min=1)
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(component.params, gradients, strict=True)]
    means = [total(g, state.world) / samples.to(g.dtype) for g in found]
    return float(everywhere[0] / samples), means


def provisional(params: Sequence[nn.Parameter], state: TrainState) -> list[Tensor]:
    """theta^: what the coming step would make of the weights. Weights, gradients and optimizer are left as they were."""
    optimizer = state.optimizer
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    weights, gradients = held(everything), [None if p.grad is None else p.grad.clone() for p in everything]
    show(everything, copies(everything))
    kept = {
        p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in slot.items()}
        for p, slot in optimizer.state.items()
    }
    nn.utils.clip_grad_norm_(everything, state.clip or float("inf"))
    optimizer.step()
    ahead = held(params)
    show(everything, weights)
    for p, gradient in zip(everything, gradients, strict=True):
        p.grad = gradient
    slots: Any = optimizer.state
    slots.clear()
    slots.update(kept)
    return ahead
