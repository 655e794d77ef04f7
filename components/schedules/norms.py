"""Diagnostics of CoMMIT beside kappa: gradient and weight norms (its Figure 3), their ratio, the H of eq. 5. They steer nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mllm_factory import ASSISTANT, TEXT, Batch, total
from mllm_factory.components.schedules.balance import Component
from mllm_factory.components.schedules.balance_turns import gradients, square_sum
from mllm_factory.components.schedules.probe import Probe, Seen


def norms(components: Sequence[Component]) -> dict[str, float]:
    """Norm of each component's gradient (before clipping) and weights, and grad_rel_norm = ||g|| / ||theta||.

    The ratio compares a component with itself over time only: E -> 10 E, H -> H / 10 leaves the model and changes it a
    hundredfold. NaN where all weights are 0.
    """
    result = {}
    for component in components:
        g, theta = math.sqrt(square_sum(gradients(component))), math.sqrt(square_sum(component.params))
        result[f"grad_norm/{component.name}"] = g
        result[f"weight_norm/{component.name}"] = theta
        result[f"grad_rel_norm/{component.name}"] = g / theta if theta else math.nan
    return result


@torch.no_grad()
def input_norms(probe: Probe, seen: Sequence[Seen], distances: Mapping[str, float], world: Any) -> dict[str, float]:
    """H of eq. 5 for two components: the output step over the norm of the other component's input.

        H_encoder = d_encoder / (||prompt embeddings|| + ||encoder tokens||),    H_llm = d_llm / ||raw items||

    Norms are Frobenius, of each sample, averaged over samples. The crossing is the paper's: H bounds the other's gradient.
    """
    encoder, *_, llm = distances
    if len(distances) != 2:
        return {}
    sums = torch.stack([torch.stack(_sums(probe, s)) for s in seen]).sum(0)
    prompt, tokens, raw, samples = total(sums, world).tolist()
    if not samples or not raw:
        return {}
    inside, outside = (prompt + tokens) / samples, raw / samples
    return {f"H/{encoder}": distances[encoder] / inside, f"H/{llm}": distances[llm] / outside}


def _sums(probe: Probe, seen: Seen) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over this batch's samples: norms of prompt embeddings, of encoder tokens and of raw items, and the samples' number."""
    batch = seen.batch
    embeds = probe.model.backbone.embed(batch.input_ids).detach().double()  # [B, T, D]
    prompt = (batch.modality == TEXT) & (batch.role != ASSISTANT) & batch.attention_mask
    words = (embeds.square().sum(-1) * prompt).sum(1).sqrt()
    tokens, raw = (_per_row(batch, items) for items in (seen.features, batch.media))
    return (
        words.sum(),
        tokens.sum(),
        raw.sum(),
        torch.tensor(float(len(words)), dtype=torch.float64, device=words.device),
    )


def _per_row(batch: Batch, items: Mapping[str, Tensor]) -> Tensor:
    """[B] Frobenius norm of all items of a row."""
    squares = torch.zeros(len(batch.labels), dtype=torch.float64, device=batch.labels.device)
    for name, values in items.items():
        if len(values):
            squares.index_add_(0, batch.media_row[name], values.double().flatten(1).square().sum(1))
    return squares.sqrt()
