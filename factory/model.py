"""The composite model: encoders and projectors in front of a language model, fused early by a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mllm_factory.errors import DataError
from mllm_factory.interfaces import Backbone, Encoder, Projector, Tuning, takes_part
from mllm_factory.template import ChatTemplate
from mllm_factory.types import IGNORE_INDEX, MODALITIES, Batch, Output


class MultimodalModel(nn.Module):
    """Encoders, projectors and a backbone as one model.

    Placeholders are expanded by the collator, so that lengths never change in here: the projected features of each modality
    are written over the embeddings where ``batch.modality`` says so.

    Attributes:
        encoders, projectors: by modality.
        template: the backbone's chat template.
        strategies: by part, the tuning strategies that were applied to it, in order.
        carried: names of tensors that an earlier stage of the run trained: saved with what is trained now.
        batch: the batch in flight, for hooks that steer or observe by ``batch.modality``; None between calls.
        unpacked: True while the decoder layers are to see a batch row by row, whatever its ``packing`` says.
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
        self.strategies: dict[str, list[Tuning]] = {}
        self.batch: Batch | None = None
        self.carried: frozenset[str] = frozenset()
        self.unpacked = False

    def parts(self) -> dict[str, nn.Module]:
        """The parts by name, in data order: the vocabulary of tuning, learning rates and reports."""
        parts = dict(self.encoders.items())
        parts |= {"projector" if name == "vision" else f"{name}_projector": p for name, p in self.projectors.items()}
        return {**parts, "backbone": self.backbone}

    def stepping(self) -> dict[str, Tuning]:
        """Strategies that take part in each step, by their place in ``tuning``: ``backbone``, or ``backbone.1`` in a list."""
        return {
            part if len(applied) == 1 else f"{part}.{i}": strategy
            for part, applied in self.strategies.items()
            for i, strategy in enumerate(applied)
            if takes_part(strategy)
        }

    def forward(self, batch: Batch, logits: bool = False, features: Mapping[str, Tensor] | None = None) -> Output:
        """Teacher-forced loss, summed over the label positions; with their logits [N, V] if asked for.

        Hidden states are gathered before the head: no [B, T, V] tensor exists. ``features`` as in ``embed``.
        """
        batch = replace(batch, packing=None) if self.unpacked else batch
        keep = F.pad(batch.labels[:, 1:] != IGNORE_INDEX, (0, 1)).flatten()  # [B * T]
        places = keep.nonzero()[:, 0]  # [N]; found first, because a device has to finish its work for it
        with self._sees(batch):
            hidden = self._decoded(self.embed(batch, features), batch).flatten(0, 1)
        there = places if batch.packing is None else batch.packing.place.flatten()[places]
        scores = self.backbone.logits(hidden.index_select(0, there))  # [N, V]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        loss_sum = F.cross_entropy(scores, batch.labels.flatten()[places + 1], reduction="sum")
        return Output(loss_sum, keep.sum(), scores if logits else None)

    def _decoded(self, embeds: Tensor, batch: Batch) -> Tensor:
        """Hidden states [B, T, D], or [R, L, D] where the batch is packed."""
        if batch.packing is None:
            return self.backbone(embeds, self._mask(batch))
        packed = embeds.flatten(0, 1).index_select(0, batch.packing.source.flatten())
        return self.backbone(
            packed.view(*batch.packing.source.shape, embeds.shape[-1]), positions=batch.packing.position
        )

    @contextmanager
    def _sees(self, batch: Batch | None) -> Iterator[None]:
        """Show a batch to hooks."""
        before, self.batch = self.batch, batch
        try:
            yield
        finally:
            self.batch = before

    @contextmanager
    def row_by_row(self) -> Iterator[None]:
        """Inside, decoder layers see one sample a row, whatever a batch's ``packing`` says."""
        before, self.unpacked = self.unpacked, True
        try:
            yield
        finally:
            self.unpacked = before

    def _mask(self, batch: Batch) -> Tensor | None:
        """Causal attention never looks at padding on the right, so only rows padded on the left need a mask."""
        return batch.attention_mask if batch.left_padded else None

    def embed(self, batch: Batch, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """Token embeddings with the media's features in their places, [B, T, D].

        Args:
            given: by modality, what ``features`` gave for the batch's items before, [n, k, D]; they are not encoded again.

        Raises:
            DataError: a modality reserves another number of positions than its features fill.
        """
        embeds = self.backbone.embed(batch.input_ids)
        for name, items in batch.media.items():
            if items.shape[0] == 0:
                embeds = embeds + self._nothing(name, items, embeds)
                continue
            positions = batch.modality == MODALITIES[name]  # [B, T]
            features = given[name] if given and name in given else self.features(name, items)  # [n, k, D]
            self._require_fit(name, positions, features)
            embeds = embeds.masked_scatter(positions[..., None], features.to(embeds.dtype))
        return embeds

    def _require_fit(self, name: str, positions: Tensor, features: Tensor) -> None:
        n, k = features.shape[:2]
        if k != self.tokens_per_item[name]:
            raise DataError(
                f"{name}: the projector gives {k} tokens an item but its num_tokens says {self.tokens_per_item[name]}; correct it"
            )
        if (
            positions.device.type == "cpu" and int(positions.sum()) != n * k
        ):  # elsewhere counting would wait for the device
            raise DataError(
                f"{name}: the batch reserves {int(positions.sum())} positions but {n} items give {n} x {k} features"
            )

    def features(self, name: str, items: Tensor) -> Tensor:
        """Encode and project items of one modality: [n, *item_shape] -> [n, k, D]. No graph through a frozen encoder."""
        encoder = self.encoders[name]
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns(encoder)):
            encoded = encoder(items)
        return self.projectors[name](encoded)

    def _nothing(self, name: str, items: Tensor, embeds: Tensor) -> Tensor | float:
        """0, in a way that touches every weight of the modality's path.

        A batch without pictures then takes the same path as any other: no process of several waits for a gradient that
        never comes. It runs in eval mode, as an item that nobody sees must leave no trace in running statistics.
        """
        path = [self.encoders[name], self.projectors[name]]
        if not (torch.is_grad_enabled() and any(map(learns, path))):
            return 0.0
        modes = {module: module.training for part in path for module in part.modules()}
        for part in path:
            part.eval()
        nothing = 0.0 * self.features(name, items.new_zeros(1, *items.shape[1:])).sum().to(embeds.dtype)
        for module, mode in modes.items():
            module.training = mode
        return nothing

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int, use_cache: bool = True) -> list[str]:
        """Greedy answers to a batch of left-padded prompts, one text a row."""
        if len(batch.ids) == 0:
            return []
        with self._sees(batch):
            ids = self.backbone.generate(
                self.embed(batch),
                batch.attention_mask,
                max_new_tokens=max_new_tokens,
                stop_ids=self.template.stop_ids,
                use_cache=use_cache,
            )
        return [text.strip() for text in self.backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def train(self, mode: bool = True) -> Self:
        """Training mode for what learns.

        Parts without a trainable weight stay in eval mode, and so do single modules that keep running statistics
        (persistent buffers) but have no trainable weight of their own.
        """
        super().train(mode)
        for part in self.parts().values() if mode else ():
            if not learns(part):
                part.eval()
                continue
            for module in part.modules():
                if _own_buffers(module) and not any(p.requires_grad for p in module.parameters(recurse=False)):
                    module.training = False
        return self

    def checkpoint_activations(self) -> None:
        """Recompute each decoder layer in the backward pass.

        Hooks on a layer run outside of the recomputation, hooks inside of it run again; both see ``batch``.
        """
        for layer in self.backbone.layers:
            layer.forward = partial(self._recomputed, layer.forward)

    def _recomputed(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        batch = self.batch

        def again(*args: Any, **kwargs: Any) -> Any:
            with self._sees(batch):
                return forward(*args, **kwargs)

        return checkpoint(again, *args, use_reentrant=False, **kwargs)


def learns(module: nn.Module) -> bool:
    """True where a module has a trainable parameter."""
    return any(p.requires_grad for p in module.parameters())


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; what two names share appears once."""
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    for prefix, owner in module.named_modules():
        tensors |= {f"{prefix}.{name}".lstrip("."): owner.get_buffer(name) for name in _own_buffers(owner)}
    return tensors


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters, and the running statistics that belong to them. Names as in the model.

    What earlier stages of the run changed (``carried``) counts as well.
    """
    tensors: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for prefix, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            tensors |= {f"{prefix}.{name}".lstrip("."): module.get_buffer(name) for name in _own_buffers(module)}
    if carried := getattr(model, "carried", None):
        tensors |= {name: tensor for name, tensor in state_tensors(model).items() if name in carried}
    return tensors


def _own_buffers(module: nn.Module) -> list[str]:
    """Names of a module's own buffers that belong to its state (running statistics, not caches)."""
    return [name for name, _ in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set]
