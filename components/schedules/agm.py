"""Adaptive gradient modulation (AGM: Li et al., ICCV 2023, arXiv 2308.07686), adapted to a serial model.

With phi as in ``balance_masks`` (phi(0, 0) is left out, as by the authors) the Shapley value of each modality is

    m_v = (phi(v, q) - phi(0, q) + phi(v, 0)) / 2,     m_q = (phi(v, q) - phi(v, 0) + phi(0, q)) / 2,     m_v + m_q = phi(v, q)
    s^u   = mean cross-entropy of softmax(m_u),   S^u its running mean over the steps before
    r_v   = exp(s^q - s^v),   tau_v = exp(S^q - S^v),   and the same with v and q exchanged
    c_u   = exp(alpha min(tau_u - r_u, cap)),     g_u <- c_u g_u

The original scales the gradient that flows through m_u. With masked passes kept out of the graph, as published code has them,
that would only scale the whole gradient by (c_v + c_q) / 2; so c_u multiplies the gradients of the modality's own component
(encoder for the media v, LLM for the text q), as BalanceBenchmark does with encoders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mllm_factory import Schedule, TrainState, register
from mllm_factory.components.schedules.balance import Component
from mllm_factory.components.schedules.balance_masks import mean_scores, two_components
from mllm_factory.components.schedules.balance_turns import gradients, require_positive
from mllm_factory.components.schedules.cosine import Cosine


@register("agm")
class Agm(Schedule):
    """Scale the gradients of encoder and LLM so that the ratio of their responses keeps to its running mean.

    Rates are those of a cosine with warm-up. Each step takes three forwards more. The first step, which has no mean behind it,
    and steps without media are not modulated.

    Args:
        lr: peak learning rate.
        part_lr: peak rate of single parts (vision, audio, projector, backbone); None: ``lr``.
        warmup: share of all steps spent rising linearly from 0, in [0, 1].
        final: rate at the end as a share of the peak, in [0, 1].
        alpha: strength of the modulation.
        cap: largest tau - r that counts; both are exponentials of losses and can be far apart.

    Raises:
        ValueError: a value that is not above 0.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        part_lr: dict[str, float | None] | None = None,
        warmup: float = 0.05,
        final: float = 0.0,
        alpha: float = 1.0,
        cap: float = 10.0,
    ) -> None:
        self.base = Cosine(lr, part_lr, warmup, final)
        require_positive(alpha=alpha, cap=cap)
        self.alpha, self.cap = alpha, cap
        self.components: tuple[Component, Component] | None = None
        self.means, self.seen = [0.0, 0.0], 0
        self.values: dict[str, float] = {}

    def before_step(self, state: TrainState) -> None:
        """Set the rates; modulate the gradients."""
        self.components = self.components or two_components(state.model)
        self.base.before_step(state)
        scores = mean_scores(state, losses)
        if scores is None:
            return
        c = coefficients(scores, self.means, self.alpha, self.cap) if self.seen else (1.0, 1.0)
        self.seen += 1
        self.means = [S + (s - S) / self.seen for S, s in zip(self.means, scores, strict=True)]
        for component, factor, s in zip(self.components, c, scores, strict=True):
            for g in gradients(component):
                g.mul_(factor)
            self.values |= {f"balance/c/{component.name}": factor, f"balance/s/{component.name}": s}

    def after_step(self, state: TrainState) -> None:
        """Nothing of its own."""
        self.base.after_step(state)

    def readings(self) -> dict[str, float]:
        """c and s of both components."""
        return dict(self.values)

    def state_dict(self) -> dict[str, Any]:
        """The running means."""
        return {"means": list(self.means), "seen": self.seen, "values": dict(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.means, self.seen, self.values = list(state["means"]), state["seen"], dict(state["values"])


def losses(both: Tensor, media: Tensor, text: Tensor, labels: Tensor) -> Sequence[Tensor]:
    """Cross-entropy of each token under m_v and under m_q, [N] each."""
    responses = ((both - text + media) / 2, (both - media + text) / 2)
    return [F.cross_entropy(m, labels, reduction="none") for m in responses]


def coefficients(scores: Sequence[float], means: Sequence[float], alpha: float, cap: float) -> tuple[float, float]:
    """c of media and of text: exp(alpha min(tau - r, cap)); an r beyond all numbers gives 0."""

    def c(u: int) -> float:
        r, tau = (_exp(each[1 - u] - each[u]) for each in (scores, means))
        return math.exp(alpha * min(tau - r, cap)) if math.isfinite(r) else 0.0

    return c(0), c(1)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
