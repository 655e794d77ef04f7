"""On-the-fly gradient modulation (OGM-GE: Peng et al., CVPR 2022, arXiv 2203.15332), adapted to a serial model.

    s^u   = softmax(phi^u)[y]                  modality u's probability of the right token, phi^u as in ``balance_masks``
    rho^v = sum s^v / sum s^q,   rho^q = 1 / rho^v
    k^u   = 1 - tanh(alpha rho^u)   if rho^u > 1,   else 1                                                  eq. 10
    g^u  <- k^u g^u + h,   h ~ N(0, std(g^u)^2) of each tensor (generalisation enhancement)

The original scores parallel branches with halves of one head and modulates convolutions only. Here a modality is masked, all
tensors of its component are modulated (encoder for the media v, LLM for the text q), and s is a mean over answer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mllm_factory import Schedule, TrainState, register
from mllm_factory.components.schedules.balance import Component
from mllm_factory.components.schedules.balance_masks import mean_scores, two_components
from mllm_factory.components.schedules.balance_turns import gradients, require_positive, require_share
from mllm_factory.components.schedules.cosine import Cosine


@register("ogm_ge")
class OgmGe(Schedule):
    """Slow the component of the modality that alone predicts the answers better, and add noise as large as the gradient.

    Rates are those of a cosine with warm-up. Each modulated step takes three forwards more. k jumps from 1 to 1 - tanh(alpha)
    where rho passes 1: that is the authors' rule. Steps without media are not modulated.

    Args:
        lr: peak learning rate.
        part_lr: peak rate of single parts (vision, audio, projector, backbone); None: ``lr``.
        warmup: share of all steps spent rising linearly from 0, in [0, 1].
        final: rate at the end as a share of the peak, in [0, 1].
        alpha: strength of the modulation.
        noise: add h; False is OGM without its enhancement.
        seed: of the noise, which is the same in every process.
        start: share of all steps before the modulation begins, in [0, 1].
        end: share of all steps after which it ends, in [0, 1].

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        part_lr: dict[str, float | None] | None = None,
        warmup: float = 0.05,
        final: float = 0.0,
        alpha: float = 0.1,
        noise: bool = True,
        seed: int = 0,
        start: float = 0.0,
        end: float = 1.0,
    ) -> None:
        self.base = Cosine(lr, part_lr, warmup, final)
        require_positive(alpha=alpha)
        require_share(start=start, end=end)
        if end <= start:
            raise ValueError(f"end: {end} leaves no step after start ({start}); make it larger")
        self.alpha, self.noise, self.seed, self.start, self.end = alpha, noise, seed, start, end
        self.components: tuple[Component, Component] | None = None
        self.values: dict[str, float] = {}

    def before_step(self, state: TrainState) -> None:
        """Set the rates; modulate the gradients."""
        self.components = self.components or two_components(state.model)
        self.base.before_step(state)
        self.values = {}
        inside = self.start <= state.step / state.max_steps < self.end
        found = mean_scores(state, probabilities) if inside else None
        if found is None:
            return
        k = factors(found[0], found[1], self.alpha)
        generator = torch.Generator(state.world.device).manual_seed((self.seed << 32) + state.step)
        for component, factor, score in zip(self.components, k, found, strict=True):
            self.values |= {f"balance/k/{component.name}": factor, f"balance/s/{component.name}": score}
            for g in gradients(component):
                h = _noise(g, generator) if self.noise else 0.0
                g.mul_(factor).add_(h)

    def after_step(self, state: TrainState) -> None:
        """Nothing of its own."""
        self.base.after_step(state)

    def readings(self) -> dict[str, float]:
        """k and s of both components; nothing where the last step was not modulated."""
        return dict(self.values)


def probabilities(both: Tensor, media: Tensor, text: Tensor, labels: Tensor) -> Sequence[Tensor]:
    """softmax(phi)[y] of each token with the media alone and with the text alone, [N] each."""
    return [phi.softmax(-1).gather(1, labels[:, None])[:, 0] for phi in (media, text)]


def factors(media: float, text: float, alpha: float) -> tuple[float, float]:
    """k of media and of text (eq. 10)."""
    if media > text:
        return 1 - math.tanh(alpha * (media / text if text else math.inf)), 1.0
    if text > media:
        return 1.0, 1 - math.tanh(alpha * (text / media if media else math.inf))
    return 1.0, 1.0


def _noise(grad: Tensor, generator: torch.Generator) -> Tensor:
    """h of one gradient; a single number has no deviation and gets the floor of 1e-8 only."""
    deviation = grad.std(unbiased=False) + 1e-8
    return torch.randn(grad.shape, generator=generator, device=grad.device, dtype=grad.dtype) * deviation
