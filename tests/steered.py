"""Small models with a steered backbone, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from toys import Colours, tree

from mllm_factory import Batch, MultimodalModel, Sample
from mllm_factory.assemble import build_collator, build_model

FROZEN = {"name": "frozen"}
RANDOM = {"name": "mores", "init": "random", "positions": "f1+l1"}


def built(*strategies: dict[str, Any], **changes: Any) -> tuple[MultimodalModel, Any]:
    """A model whose backbone has these strategies, and its collator. Same weights below, whatever the strategies."""
    node = tree(tuning__backbone=list(strategies) or FROZEN, **changes)
    model = build_model(node)
    return model.eval(), build_collator(node, model)


def samples(n: int = 4, **options: Any) -> list[Sample]:
    """Pictures of one colour, 4 tokens each, with questions of uneven length."""
    source = Colours(n, **options)
    return [source[i] for i in range(n)]


@torch.no_grad()
def logits(model: MultimodalModel, batch: Batch) -> Tensor:
    """[N, V] at the label positions."""
    found = model(batch, logits=True).logits
    assert found is not None
    return found


@torch.no_grad()
def hidden(model: MultimodalModel, batch: Batch) -> Tensor:
    """[B, T, D] after the final norm."""
    with model._sees(batch):
        return model.backbone(model.embed(batch), batch.attention_mask)


def gradients(model: MultimodalModel, batch: Batch) -> dict[str, Tensor]:
    """Of every trainable tensor, in training mode."""
    model.train().zero_grad()
    loss = model(batch).loss_sum
    assert loss is not None
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    return found


def map_of(model: MultimodalModel, layer: int, name: str = "steering") -> Any:
    """The map at a layer."""
    return model.backbone.get_submodule(name).at(layer)


def by_hand(change: Any, h: Tensor) -> Tensor:
    """Term by term, nothing fused: h + R (W h + b - R^T h)."""
    R, W, b = change.up(), change.weight, change.bias
    return torch.stack([x + R @ (W @ x + b - R.T @ x) for x in h])


def strengthened(model: MultimodalModel, by: float = 3.0) -> MultimodalModel:
    """The same with larger updates, so that outputs differ clearly."""
    with torch.no_grad():
        for layer in model.backbone.steering.chosen:
            map_of(model, layer).weight.mul_(by)
    return model
