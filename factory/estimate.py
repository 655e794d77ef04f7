"""What a training step would cost, found without memory: the step runs once on the meta device and every tensor is counted.

Shapes and lifetimes on the meta device are those of a real step, so the largest number of bytes alive at one moment is what an
allocator would need; FLOPs follow from the shapes of the matrix products, each multiply-add counted as two (a product of
[m, k] and [k, n] takes 2 m k n), as torch's own counter does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_factory.errors import ConfigError, Problem
from mllm_factory.interfaces import Encoder
from mllm_factory.media import BLANK
from mllm_factory.meter import Kernels, Meter, storage_of
from mllm_factory.model import MultimodalModel
from mllm_factory.trainer import PRECISIONS, Trainer
from mllm_factory.types import ASSISTANT, IGNORE_INDEX, MODALITIES, TEXT, USER, Batch

# ---------------------------------------------------------------- what the tuning came to


def targets(model: MultimodalModel, tuning: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By part, each applied strategy's ``name`` and the ``modules`` that it adapts, trains or steers: their full names inside
    the part, none where it means the part as a whole.

    Args:
        model: tuning applied.
        tuning: the tree's node of that name.
    """
    found = {}
    for part, strategies in model.strategies.items():
        node = tuning.get(part) or tuning["projector"]
        names = [strategy["name"] for strategy in (node if isinstance(node, list) else [node])]
        pairs = zip(names, strategies, strict=True)
        found[part] = [{"name": name, "modules": list(strategy.resolved)} for name, strategy in pairs]
    return found


# ---------------------------------------------------------------- the context


def context(model: MultimodalModel, max_length: int) -> dict[str, Any]:
    """Positions of a row with one item of every encoder.

    Returns:
        ``media`` (positions that the items take, by modality), ``text`` (what is left of ``max_length``), ``max_length`` and
        ``max_positions`` (the backbone's limit, or None).

    Raises:
        ConfigError: the media leave no position for a word.
    """
    media = {name: len(items) * model.tokens_per_item[name] for name, items in blanks(model).items()}
    left = max_length - sum(media.values())
    if left < 1:
        what = ", ".join(f"{name} {tokens}" for name, tokens in media.items())
        limit = model.backbone.max_positions
        room = "raise it" if limit is None else f"raise it (the backbone takes {limit})"
        raise ConfigError(
            Problem(
                f"one item of each encoder ({what}) fills all {max_length} positions and leaves none for text; {room}, or use a "
                "projector with fewer tokens",
                "data.max_length",
            )
        )
    return {"media": media, "text": left, "max_length": max_length, "max_positions": model.backbone.max_positions}


def blanks(model: MultimodalModel) -> dict[str, Tensor]:
    """By modality the items that an empty picture or recording gives, [m, *item_shape] on the CPU."""
    with torch.device("cpu"):
        return {name: cast(Encoder, encoder).transform(BLANK[name]()) for name, encoder in model.encoders.items()}


# ---------------------------------------------------------------- one step


@dataclass(frozen=True)
class Cost:
    """One optimizer step of one process.

    Attributes:
        activations: most bytes alive at one moment besides weights, gradients and optimizer state.
        peak: most bytes alive at one moment, weights, gradients and optimizer state included.
        flops: of all its forward and backward passes, recomputation included; attention counted as not causal.
    """

    activations: int
    peak: int
    flops: int


def step(model: MultimodalModel, trainer: Trainer, max_length: int) -> Cost:
    """The cost of a step at its largest: every row is ``max_length`` long, begins with one item of each encoder, and carries a
    label on each text position.

    Attention is taken as fused where the model asks for torch's own kernel, as it is on a CPU or a GPU without a mask.

    Args:
        model: built on the meta device, tuning applied; its decoder layers are left recomputing if the trainer says so.

    Raises:
        RuntimeError, NotImplementedError: an operation needs values, so it cannot run on the meta device.
    """
    kernels = Kernels(PRECISIONS[trainer.precision])
    if trainer.gradient_checkpointing:
        for layer in model.backbone.layers:  # torch turns modes off while it runs a backward pass
            layer.forward = partial(kernels.run, layer.forward)
        model.checkpoint_activations()
    model.train()
    batch, shown, labels = _batch(model, trainer.batch_size, max_length)
    known = {storage_of(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    weights, gradients = bytes_of(model), bytes_of(model, trained=True)
    with _gradients_marked(model) as marks, Meter(known) as meter:
        marks.append(meter.is_gradient)
        with kernels, kernels.instead_of_autocast():
            loss = _loss(model, batch, shown, labels)
            if loss.requires_grad:
                loss.backward()
        del loss
        model.zero_grad(set_to_none=True)
    repeated = (
        gradients if trainer.accumulate > 1 else 0
    )  # those of the first batch live beside the second's activations
    moment = max(meter.most, gradients, meter.most_activations + repeated)
    return Cost(meter.most_activations, weights + 2 * gradients + moment, meter.flops * trainer.accumulate)


def sharding(model: MultimodalModel) -> dict[str, int]:
    """Bytes of the weights that are gathered at one time: of the largest decoder ``layer``, and of the ``rest`` outside."""
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in model.backbone.layers]
    return {"layer": max(layers), "rest": bytes_of(model) - sum(layers)}


def bytes_of(model: MultimodalModel, trained: bool = False) -> int:
    """Bytes of the parameters, or of the trainable ones."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained)


def _batch(model: MultimodalModel, rows: int, length: int) -> tuple[Batch, Batch, int]:
    """A batch without values, the same with values for hooks that look at its maps, and how many labels it carries."""
    items = blanks(model)
    spans = {name: len(blank) * model.tokens_per_item[name] for name, blank in items.items()}
    codes = torch.full((rows, length), TEXT, dtype=torch.long, device="cpu")
    start = 0
    for name, span in spans.items():
        codes[:, start : start + span] = MODALITIES[name]
        start += span
    text = codes == TEXT
    ids, role = torch.zeros_like(codes), torch.where(text, ASSISTANT, USER)
    labels = torch.where(text, ids, IGNORE_INDEX)
    owners = {name: torch.arange(rows).repeat_interleave(len(blank)) for name, blank in items.items()}
    names = tuple(map(str, range(rows)))
    shown = Batch(ids, labels, torch.ones_like(text), codes, role, {}, owners, names, names, left_padded=False)
    media = {name: torch.empty(rows * len(i), *i.shape[1:], dtype=i.dtype, device="meta") for name, i in items.items()}
    return replace(shown.to("meta"), media=media), shown, int(text.sum())


def _loss(model: MultimodalModel, batch: Batch, shown: Batch, labels: int) -> Tensor:
    """``MultimodalModel.forward``, with the number of labels given: without values they cannot be searched."""
    with model._sees(shown):
        hidden = model.backbone(model.embed(batch), None)  # [B, T, D]
    places = torch.zeros(labels, dtype=torch.long, device="meta")
    scores = model.backbone.logits(hidden.flatten(0, 1).index_select(0, places)).float()  # [N, V]
    return F.cross_entropy(scores, batch.labels.flatten()[places], reduction="sum")


@contextmanager
def _gradients_marked(model: MultimodalModel) -> Iterator[list[Callable[[Tensor], None]]]:
    """Tell the listed functions of each gradient as soon as it is complete."""
    listeners: list[Callable[[Tensor], None]] = []

    def told(parameter: Tensor) -> None:
        for listener in listeners:
            listener(cast(Tensor, parameter.grad))

    handles = [p.register_post_accumulate_grad_hook(told) for p in model.parameters() if p.requires_grad]
    try:
        yield listeners
    finally:
        for handle in handles:
            handle.remove()
