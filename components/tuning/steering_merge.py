"""Folding MoReS into the projector, where that is exact.

Steering every token of a modality at the input of layer 0 is an affine map of the projector's output y = W2 z + b2, so with
M = W - R^T (see ``steering.py``)

    y' = y + R (M y + b) = (I + R M) W2 z + (I + R M) b2 + R b,

another last linear layer. Everywhere else a decoder layer stands between, or some tokens pass as they are: no plain weights
of the model do the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm_factory import Backbone, ConfigError, MultimodalModel
from mllm_factory.components.tuning.steering import LowRankMap
from mllm_factory.components.tuning.steering_apply import Steering, steerings
from mllm_factory.components.tuning.steering_hooks import detach


def obstacle(model: MultimodalModel, steering: Steering) -> str | None:
    """Why a strategy's maps cannot become plain weights, or None where they can."""
    options, modalities = steering.options, steering.options.positions.modalities
    if options.placement != "block_input" or steering.chosen != [0]:
        return f"it steers at the {options.placement} of layers {steering.chosen}, not only at the input of layer 0"
    if options.positions.text != "all":
        return f"it steers the positions {options.positions.text}, not all of them"
    if "text" in modalities:
        return "it steers text, which no projector makes"
    for name in modalities:
        if _last_linear(model, name) is None:
            return f"the {name} projector does not end in a linear layer"
    if not _starts_plainly(model.backbone):
        return "the backbone changes its embeddings before layer 0"
    return None


def merge(model: MultimodalModel) -> None:
    """Fold everything that steers a model into its projectors, and remove it.

    Raises:
        ConfigError: something that steers has no plain weights that do the same; says why. The model is as it was.
    """
    backbone = model.backbone
    found = steerings(backbone)
    for _, steering in found:
        if (why := obstacle(model, steering)) is not None:
            raise ConfigError(
                f"{steering.options.method} cannot be merged: {why}; keep it as it is, or train with layers: [0], "
                "placement: block_input, positions: all"
            )
    for name, steering in found:
        for modality in steering.options.positions.modalities:
            last = _last_linear(model, modality)
            if last is not None:
                fold(steering.at(0), last)
        for layer in backbone.layers:
            detach(layer, steering.flight)
        delattr(backbone, name)


@torch.no_grad()
def fold(change: LowRankMap, linear: nn.Linear) -> None:
    """Let a linear layer give the steered outputs: W2 <- (I + R M) W2, b2 <- (I + R M) b2 + R b; computed in float64."""
    R = change.up()
    M, b, R = change.inner(R).double(), change.bias.double(), R.double()
    weight = linear.weight.double()
    bias = (
        torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
        if linear.bias is None
        else linear.bias.double()
    )
    linear.weight.copy_(weight + R @ (M @ weight))
    shifted = (bias + R @ (M @ bias + b)).to(linear.weight.dtype)
    if linear.bias is None:
        linear.bias = nn.Parameter(shifted, requires_grad=linear.weight.requires_grad)
    else:
        linear.bias.copy_(shifted)


@torch.no_grad()
def _last_linear(model: MultimodalModel, modality: str) -> nn.Linear | None:
    """The linear layer whose output is the projector's, found by running it on random features; None: there is none."""
    projector = model.projectors[modality]
    encoder: Any = model.encoders[modality]
    weight = next(projector.parameters(), None)
    if weight is None:
        return None
    features = torch.rand(1, encoder.num_tokens, encoder.dim, generator=torch.Generator().manual_seed(0))
    linears = [m for m in projector.modules() if type(m) is nn.Linear]
    seen: dict[int, list[Tensor]] = {}
    handles = [
        m.register_forward_hook(lambda m, _, out: seen.setdefault(id(m), []).append(out.flatten())) for m in linears
    ]
    modes = {m: m.training for m in projector.modules()}
    try:
        output = projector.eval()(features.to(weight)).flatten()
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    once = (m for m in linears if len(seen.get(id(m), ())) == 1)
    return next((m for m in once if torch.equal(seen[id(m)][0], output)), None)


@torch.no_grad()
def _starts_plainly(backbone: Backbone) -> bool:
    """Whether layer 0 sees the embeddings as they are: no scale, no learnt positions."""
    weight = next(backbone.parameters())
    embeds = torch.rand(1, 3, backbone.dim, generator=torch.Generator().manual_seed(0)).to(weight)
    seen: list[Tensor] = []
    handle = backbone.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    modes = {m: m.training for m in backbone.modules()}
    try:
        backbone.eval()(embeds)
    finally:
        handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return torch.equal(seen[0], embeds)
