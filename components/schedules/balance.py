"""Which parts make a component, and what rate each component gets: CoMMIT's scheduler (arXiv 2407.20454, eq. 6) without a network.

    kappa  = d_llm / d_encoder                 the LLM's step moves the output kappa times as far as the encoder's
    m_llm  = gain / (kappa + 1)                multiplies the LLM's rate
    m_enc  = gain / (1 / kappa + 1)            multiplies the encoder's rate;  m_llm + m_enc = gain,  m_enc / m_llm = kappa

With gain 2, kappa 1 leaves both rates as they are (the paper's alpha / gamma = 2 base rates). For n components it is extended
by m_c = n gain / 2 * (1 / d_c) / sum_j (1 / d_j), which is the same for n = 2; that extension is ours.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from mllm_factory import ConfigError, MultimodalModel, hint

LLM = "llm"


class Component(NamedTuple):
    """Parts that take their step together, and their trainable parameters."""

    name: str
    parts: tuple[str, ...]
    params: list[nn.Parameter]


def partition(model: MultimodalModel, wanted: Mapping[str, Sequence[str]] | None) -> list[Component]:
    """The components of a model, the one with the backbone last; None for ``encoder`` (all before the backbone) and ``llm``.

    Raises:
        ConfigError: a component that learns nothing, a part that is none, in two components, or learns and is in none.
    """
    trainable = _trainable(model)
    if wanted is None:
        wanted = {"encoder": [part for part in trainable if part != "backbone"], LLM: ["backbone"]}
    listed = [part for parts in wanted.values() for part in parts]
    for part in listed:
        if part not in trainable:
            raise ConfigError(f"schedule.components: there is no part '{part}'{hint(part, trainable)}")
        if listed.count(part) > 1:
            raise ConfigError(f"schedule.components: '{part}' is in two components; every part belongs to one")
    left = [part for part, params in trainable.items() if params and part not in listed]
    if left:
        raise ConfigError(f"schedule.components: '{left[0]}' learns but is in no component; add it to one")
    found = [Component(name, tuple(parts), [p for x in parts for p in trainable[x]]) for name, parts in wanted.items()]
    for component in found:
        if not component.params:
            raise ConfigError(
                f"schedule: the component '{component.name}' ({', '.join(component.parts) or 'no part'}) has no trainable "
                "parameter, so there is no balance to keep; tune one of its parts, or choose schedule=cosine"
            )
    if len(found) < 2:
        raise ConfigError("schedule.components: a balance needs two components or more; or choose schedule=cosine")
    return sorted(found, key=lambda component: "backbone" in component.parts)


def _trainable(model: MultimodalModel) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by part; what two parts share belongs to the first, as in the optimizer."""
    seen: set[int] = set()
    result = {}
    for part, module in model.parts().items():
        result[part] = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen |= set(map(id, result[part]))
    return result


AVERAGES: dict[str, Callable[[Sequence[float]], float]] = {
    "arithmetic": statistics.fmean,  # as the paper prints it
    "log": lambda values: math.exp(statistics.fmean(map(math.log, values))),
    "median": statistics.median,
}
"""Ways to average the kappas of a window."""


class Balance:
    """A window of measured distances and the multipliers that follow from it.

    Args:
        size: how many measurements the window holds.
        gain: sum of the multipliers of two components.
        average: key of AVERAGES, or ``ratio``: the ratio of the mean distances.
        bounds: each kappa is cut to this range before it is averaged.
    """

    def __init__(self, size: int, gain: float, average: str, bounds: tuple[float, float]) -> None:
        self.gain, self.average, self.bounds = gain, average, bounds
        self.window: deque[list[float]] = deque(maxlen=size)

    def push(self, distances: Sequence[float]) -> None:
        """Take in d of each component, the LLM's last."""
        self.window.append(list(distances))

    def kappas(self) -> list[float]:
        """d_llm / d_c averaged over the window, for every component c before the LLM."""
        low, high = self.bounds
        others = range(len(self.window[-1]) - 1)
        if self.average == "ratio":
            means = [statistics.fmean(column) for column in zip(*self.window, strict=True)]
            return [min(high, max(low, means[-1] / means[c])) for c in others]
        average = AVERAGES[self.average]
        return [average([min(high, max(low, d[-1] / d[c])) for d in self.window]) for c in others]

    def multipliers(self) -> list[float]:
        """Of each component, the LLM's last."""
        return multipliers(self.kappas(), self.gain)


def multipliers(kappas: Sequence[float], gain: float) -> list[float]:
    """m_c = n gain / 2 * kappa_c / (1 + sum kappa) with kappa_llm = 1; the LLM's last."""
    whole = 1 + sum(kappas)
    return [(len(kappas) + 1) * gain / 2 * kappa / whole for kappa in [*kappas, 1.0]]
