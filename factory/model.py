"""The composite model: encoders and projectors in front of a language model, fused early by a mask."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mllm_factory.errors import DataError
from mllm_factory.interfaces import Backbone, Encoder, Projector
from mllm_factory.template import ChatTemplate
from mllm_factory.types import IGNORE_INDEX, MODALITIES, Batch, Output


class MultimodalModel(nn.Module):
    """Encoders, projectors and a backbone as one model.

    Placeholders are expanded by the collator, so that lengths never change in here: the projected features of each modality
    are written over the embeddings where ``batch.modality`` says so.

    Attributes:
        encoders, projectors: by modality.
        template: the backbone's chat template.
        batch: the batch in flight, for hooks that steer or observe by ``batch.modality``; None between calls.
    """

    def __init__(
        self, backbone: Backbone, encoders: Mapping[str, Encoder], projectors: Mapping[str, Projector]
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.projectors = nn.ModuleDict(projectors)
        self.backbone = backbone
        self.template = ChatTemplate(backbone.tokenizer)
        self.tokens_per_item = {name: projector.num_tokens for name, projector in projectors.items()}
        self.batch: Batch | None = None

    def parts(self) -> dict[str, nn.Module]:
        """The parts by name, in data order: the vocabulary of tuning, learning rates and reports."""
        parts = dict(self.encoders.items())
        parts |= {"projector" if name == "vision" else f"{name}_projector": p for name, p in self.projectors.items()}
        return {**parts, "backbone": self.backbone}

    def forward(self, batch: Batch, logits: bool = False) -> Output:
        """Teacher-forced loss, summed over the label positions; with their logits [N, V] if asked for.

        Hidden states are gathered before the head: no [B, T, V] tensor exists.
        """
        self.batch = batch
        try:
            hidden = self.backbone(self.embed(batch), self._mask(batch))  # [B, T, D]
        finally:
            self.batch = None
        targets = batch.labels[:, 1:]
        keep = targets != IGNORE_INDEX
        scores = self.backbone.logits(hidden[:, :-1][keep]).float()  # [N, V]
        loss_sum = F.cross_entropy(scores, targets[keep], reduction="sum")
        return Output(loss_sum, keep.sum(), scores if logits else None)

    def _mask(self, batch: Batch) -> Tensor | None:
        """Causal attention never looks at padding on the right, so only rows padded on the left need a mask."""
        return batch.attention_mask if batch.left_padded else None

    def embed(self, batch: Batch) -> Tensor:
        """Token embeddings with the media's features in their places, [B, T, D].

        Raises:
            DataError: a modality reserves another number of positions than its features fill.
        """
        embeds = self.backbone.embed(batch.input_ids)
        for name, items in batch.media.items():
            positions = batch.modality == MODALITIES[name]  # [B, T]
            if items.shape[0] == 0:
                embeds = embeds + self._nothing(name, items, embeds)
                continue
            features = self.features(name, items)  # [n, k, D]
            if features[..., 0].numel() != batch.modality.eq(MODALITIES[name]).sum():
                raise DataError(
                    f"{name}: the batch reserves {int(positions.sum())} positions but {features.shape[0]} items give "
                    f"{features.shape[0]} x {features.shape[1]} features; the projector's num_tokens is wrong"
                )
            embeds = embeds.masked_scatter(positions[..., None], features.to(embeds.dtype))
        return embeds

    def features(self, name: str, items: Tensor) -> Tensor:
        """Encode and project items of one modality: [n, *item_shape] -> [n, k, D]. No graph through a frozen encoder."""
        encoder = self.encoders[name]
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns(encoder)):
            encoded = encoder(items)
        return self.projectors[name](encoded)

    def _nothing(self, name: str, items: Tensor, embeds: Tensor) -> Tensor | float:
        """0, in a way that touches every weight of the modality's path.

        A batch without pictures then takes the same path as any other: no process of several waits for a gradient that
        never comes.
        """
        if not (torch.is_grad_enabled() and (learns(self.encoders[name]) or learns(self.projectors[name]))):
            return 0.0
        return 0.0 * self.features(name, items.new_zeros(1, *items.shape[1:])).sum().to(embeds.dtype)

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, use_cache: bool = True) -> list[str]:
        """Greedy answers to a batch of left-padded prompts, one text a row."""
        if len(batch.ids) == 0:
            return []
        self.batch = batch
        try:
            ids = self.backbone.generate(
                self.embed(batch),
                batch.attention_mask,
                max_new_tokens=max_new_tokens,
                stop_ids=self.template.stop_ids,
                use_cache=use_cache,
            )
        finally:
            self.batch = None
        return [text.strip() for text in self.backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def train(self, mode: bool = True) -> Self:
        """Training mode for what learns. Parts without a trainable weight stay in eval mode, and so do modules that keep
        running statistics (persistent buffers) but have no trainable weight of their own."""
        super().train(mode)
        for part in self.parts().values() if mode else ():
            if not learns(part):
                part.eval()
                continue
            for module in part.modules():
                if any(True for _ in _own_buffers(module)) and not any(
                    p.requires_grad for p in module.parameters(recurse=False)
                ):
                    module.train(False)
        return self

    def checkpoint_activations(self) -> None:
        """Recompute each decoder layer in the backward pass. Hooks on a layer run outside of the recomputation."""
        for layer in self.backbone.layers:
            layer.forward = partial(_checkpointed, layer.forward)  # type: ignore[method-assign]


def _checkpointed(forward, *args, **kwargs):  # type: ignore[no-untyped-def] - any signature passes through
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def learns(module: nn.Module) -> bool:
    """True where a module has a trainable parameter."""
    return any(p.requires_grad for p in module.parameters())


def _own_buffers(module: nn.Module) -> list[str]:
    """Names of a module's own buffers that belong to its state (running statistics, not caches)."""
    return [name for name, _ in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set]


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters, and the running statistics that belong to them. Names as in the model."""
    tensors = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    for prefix, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            tensors |= {f"{prefix}.{name}": module.get_buffer(name) for name in _own_buffers(module)}
    return tensors
