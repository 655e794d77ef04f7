"""The forward passes over one batch under changed conditions, each run once and encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_factory import IGNORE_INDEX, PAD, TEXT, Batch, MultimodalModel
from mllm_factory.components.metrics.counterfactual_scores import Scores, score
from mllm_factory.components.metrics.interventions import (
    blank_item,
    drop,
    exchange,
    identities,
    neutral_question,
    noise,
    seeded,
    select,
)

QUESTION = "text"
"""The player that is no medium: the users' words."""


class Passes:
    """One batch, its media's features, and its answers under each condition.

    The rows stay where they are in every pass but ``drop``, so a model that ignores what changes gives the same bits.

    Args:
        model: in eval mode.
        batch: whole conversations with labels.
        logits: [N, V] of the unchanged batch.
        neutral: token ids that stand for a question that asks nothing.
        seed: of exchanges and noise.
    """

    def __init__(self, model: MultimodalModel, batch: Batch, logits: Tensor, neutral: Sequence[int], seed: int) -> None:
        self.model, self.batch, self.logits, self.neutral, self.seed = model, batch, logits, neutral, seed
        keep = batch.labels[:, 1:] != IGNORE_INDEX
        self.row = keep.nonzero()[:, 0]
        self.targets = batch.labels[:, 1:][keep]
        self.features = {name: model.features(name, items) for name, items in batch.media.items() if len(items)}
        self._done: dict[frozenset[str], Scores] = {}
        self._blank: dict[str, Tensor] = {}

    @property
    def full(self) -> Scores:
        """The unchanged batch."""
        return self.without(frozenset())

    def _scores(self, batch: Batch, features: Mapping[str, Tensor]) -> Scores:
        changed = self.model(batch, logits=True, features={**self.features, **features}).logits
        return score(self.logits, changed, self.targets, self.row, len(self.batch.ids))

    def without(self, absent: frozenset[str]) -> Scores:
        """With blank items instead of some modalities, and a neutral question if ``QUESTION`` is absent; all places stay."""
        if absent not in self._done:
            if not absent:
                found = score(self.logits, self.logits, self.targets, self.row, len(self.batch.ids))
            else:
                batch = neutral_question(self.batch, self.neutral) if QUESTION in absent else self.batch
                found = self._scores(batch, {name: self._blanked(name) for name in absent - {QUESTION}})
            self._done[absent] = found
        return self._done[absent]

    def _blanked(self, name: str) -> Tensor:
        """[n, k, D]"""
        if name not in self._blank:
            item = blank_item(self.model.encoders[name], self.batch.media[name])  # type: ignore[arg-type]
            self._blank[name] = self.model.features(name, item)
        return self._blank[name].expand_as(self.features[name])

    def shuffled(self, name: str, draw: int) -> Scores:
        """With a modality's items exchanged between samples; NaN for samples that found no partner."""
        rows = self.batch.media_row[name].cpu()
        generator = seeded(self.seed, "shuffle", self.batch.ids, name, draw)
        place, moves = exchange(identities(self.batch.media[name], rows), generator)
        alone = torch.ones(len(self.batch.ids), dtype=torch.bool)
        alone[rows] = False
        alone[rows[~moves]] = True
        if bool(alone.all()):
            found = self.full
        else:
            found = self._scores(self.batch, {name: self.features[name][place.to(self.features[name].device)]})
        return Scores(**{field: values.masked_fill(alone, torch.nan) for field, values in vars(found).items()})

    def noised(self, name: str, step: int) -> Scores:
        """With noise of a step of the diffusion on a modality's items."""
        items = noise(self.batch, name, step, self.seed)
        return self._scores(self.batch, {name: self.model.features(name, items)})

    def dropped(self, name: str) -> Scores:
        """Without a modality's positions."""
        pad_id = self.model.backbone.tokenizer.pad_token_id
        batch = drop(self.batch, name, 0 if pad_id is None else int(pad_id))
        return self._scores(batch, {})

    def floor(self) -> tuple[float, float]:
        """What rounding alone does: mean |change of log p| and mean divergence of the first half of the rows, run alone and
        with another length."""
        rows = range((len(self.batch.ids) + 1) // 2)
        half = wider(select(self.batch, rows))
        inside = self.row < len(rows)
        given, row, targets = self.logits[inside], self.row[inside], self.targets[inside]
        found = score(given, self.model(half, logits=True).logits, targets, row, len(rows))
        before = score(given, given, targets, row, len(rows))
        return float((found.logp - before.logp).abs().nanmean()), float(found.js.nanmean())


def wider(batch: Batch) -> Batch:
    """The batch with one more column of padding on the right."""

    def padded(values: Tensor, fill: int | bool) -> Tensor:
        return F.pad(values, (0, 1), value=fill)

    return replace(
        batch,
        input_ids=padded(batch.input_ids, 0),
        labels=padded(batch.labels, IGNORE_INDEX),
        attention_mask=padded(batch.attention_mask, False),
        modality=padded(batch.modality, TEXT),
        role=padded(batch.role, PAD),
    )


def carried(batch: Batch, name: str) -> Tensor:
    """[B] bool: rows that have an item of the modality."""
    found = torch.zeros(len(batch.ids), dtype=torch.bool)
    found[batch.media_row[name].cpu().unique()] = True
    return found
