"""What the schedules that compare components share: norms, components that rest, and the refusal of sharded weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mllm_factory import ConfigError, sharded
from mllm_factory.components.schedules.balance import Component


def square_sum(tensors: Iterable[Tensor]) -> float:
    """||t||^2 over all tensors together, summed in double precision; 0 without a tensor."""
    squares = [t.detach().double().square().sum() for t in tensors]
    return float(torch.stack(squares).sum()) if squares else 0.0


def gradients(component: Component) -> list[Tensor]:
    """The gradients that a component has at this moment."""
    return [p.grad for p in component.params if p.grad is not None]


def rest(components: Sequence[Component], active: str) -> None:
    """Take the gradients of all components but one, so that the optimizer leaves their weights and its own state alone."""
    for component in components:
        for p in component.params if component.name != active else ():
            p.grad = None


def require_whole(params: Iterable[nn.Parameter]) -> None:
    """Refuse weights of which this process holds a piece only.

    Raises:
        ConfigError: says what to set.
    """
    if sharded(params):
        raise ConfigError("schedule: components cannot be compared on sharded weights; set trainer.strategy=ddp")


def require_share(**shares: float) -> None:
    """Refuse shares outside of [0, 1].

    Raises:
        ValueError: names the option.
    """
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: {share} is no share of all steps; use 0 to 1")


def require_positive(**values: float) -> None:
    """Refuse what is not above 0.

    Raises:
        ValueError: names the option.
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: {value} must be above 0")
