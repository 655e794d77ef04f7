"""What an encoder is without the parts that its features do not depend on: found on an empty copy, cut from the real one.

The copy lives on the meta device: it has shapes and a graph, but no values, so that a look at a model of any size costs
neither memory nor time, and draws no random number.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def chosen_layer(layer: int, layers: int, architecture: str) -> int:
    """``layer`` counted from the front.

    Raises:
        ValueError: out of range.
    """
    if not -layers <= layer < layers:
        raise ValueError(
            f"layer: {layer} is out of range, '{architecture}' has {layers} layers (0 to {layers - 1}, or -1 for the last)"
        )
    return layer % layers


def unused(model: nn.Module, features: Tensor) -> list[str]:
    """Names of the parameters of ``model`` without which ``features``, just computed by it, would be the same."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    with torch.enable_grad():
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]


def cut_away(model: nn.Module, names: list[str]) -> None:
    """Take the parameters of these names out of ``model``: whole modules where none of theirs is left, else one by one."""
    for path, module in [*model.named_modules()]:
        own = [f"{path}.{name}" for name, _ in module.named_parameters()]
        if path and own and set(own) <= set(names):
            _set(model, path, nn.Identity())
            names = [name for name in names if name not in own]
    for name in names:
        _set(model, name, None)


def _set(model: nn.Module, path: str, value: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, value)
