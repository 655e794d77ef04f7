"""The collator: conversations with media to the tensors of a batch.

Each placeholder becomes as many positions as its item has tokens in the backbone, so lengths are final here. The answers'
positions carry labels. Too long rows lose text from their end, or are left out and counted; media are never cut.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mllm_factory.cached_items import CachedItems
from mllm_factory.errors import DataError, listed
from mllm_factory.interfaces import Encoder
from mllm_factory.media import BLANK, LOADERS
from mllm_factory.packing import lay_out
from mllm_factory.template import ChatTemplate, Segment, Slot, Text
from mllm_factory.types import IGNORE_INDEX, MODALITIES, PAD, PLACEHOLDERS, TEXT, Batch, Message, Sample

OVERFLOW = ("cut", "refuse")
_MARKS = {modality: mark for mark, modality in PLACEHOLDERS.items()}


@dataclass
class _Row:
    """One sample as lists of equal length, and its transformed media, [m, *item_shape] each."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    modality: list[int] = field(default_factory=list)
    role: list[int] = field(default_factory=list)
    media: dict[str, list[Tensor]] = field(default_factory=dict)

    def append(self, ids: Sequence[int], labels: Sequence[int], modality: int, roles: Sequence[int]) -> None:
        """Take in positions of one modality."""
        self.ids += ids
        self.labels += labels
        self.modality += [modality] * len(ids)
        self.role += roles

    def keep(self, positions: Sequence[int]) -> None:
        """Drop every other position."""
        for name in ("ids", "labels", "modality", "role"):
            values = getattr(self, name)
            setattr(self, name, [values[i] for i in positions])

    @property
    def num_labels(self) -> int:
        """Positions with loss; the first one of a row has nothing to be predicted from."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class Collator:
    """Samples to a batch.

    Args:
        template: renders and tokenises conversations.
        pad_id: stands on padding and media positions.
        encoders: per modality, whose ``transform`` makes items of raw media.
        tokens: per modality, backbone tokens of one item.
        max_length: longest row in tokens, media included.
        overflow: ``cut`` removes text from the end of a longer row, and leaves a row out only if its media alone are
            too long or no label remains; ``refuse`` leaves out every longer row. ``Batch.refused`` counts them.

    Raises:
        ValueError: an ``overflow`` or ``max_length`` that does not exist.
    """

    def __init__(
        self,
        template: ChatTemplate,
        pad_id: int,
        encoders: Mapping[str, Encoder],
        tokens: Mapping[str, int],
        max_length: int = 2048,
        overflow: str = "cut",
    ) -> None:
        if overflow not in OVERFLOW:
            raise ValueError(f"overflow is one of {listed(OVERFLOW)}, got '{overflow}'")
        if max_length < 2:
            raise ValueError(f"max_length is at least 2 tokens, got {max_length}")
        self.template, self.pad_id, self.tokens = template, pad_id, dict(tokens)
        self.max_length, self.overflow = max_length, overflow
        self.transforms = {modality: encoder.transform for modality, encoder in encoders.items()}
        self._empty: dict[str, Tensor] = {}
        self.stored: dict[str, CachedItems] = {}
        self.packs = False

    def for_training(self, packing: bool = False, stored: Mapping[str, CachedItems] | None = None) -> Self:
        """A collator of the same kind for the batches of training.

        Args:
            packing: let rows lie side by side in rows of at most ``max_length`` tokens.
            stored: by modality, what is known of cached features: where those of all items of a batch are there, ``media`` are
                their places [n] int64 instead of the items, and nothing is decoded.
        """
        other = copy.copy(self)
        other.packs, other.stored = packing, dict(stored or {})
        return other

    # ---------------------------------------------------------------- batches

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Whole conversations with labels on the answers, padded on the right.

        Where every sample is left out, the batch is one padding token without a label, so that shapes stay legal.

        Raises:
            DataError: a sample that cannot be used; the message names its id.
        """
        places = self._places(samples)
        rows = [(sample, row) for sample in samples if (row := self._training_row(sample, places)) is not None]
        refused = len(samples) - len(rows)
        if not rows:
            rows = [(Sample("", ()), _Row([self.pad_id], [IGNORE_INDEX], [TEXT], [PAD]))]
        batch = self._batch(rows, refused, left=False)
        if not self.packs:
            return batch
        lengths = [len(row.ids) for _, row in rows]
        return replace(batch, packing=lay_out(lengths, max(lengths), self.max_length))

    def _places(self, samples: Sequence[Sample]) -> dict[str, dict[int, Tensor]]:
        """By modality and raw item (its ``id``): where its features are, if those of all items are cached."""
        result = {}
        for modality, stored in self.stored.items():
            raws = [raw for sample in samples for raw in sample.media.get(modality, ())]
            places = stored.all_of(raws) if raws else None
            if places is not None:
                result[modality] = {id(raw): place for raw, place in zip(raws, places, strict=True)}
        return result

    def prompts(self, samples: Sequence[Sample]) -> Batch:
        """Everything up to a closing answer, ready to generate it, padded on the left; no labels.

        A sample longer than ``max_length`` is left out and counted under either policy: a cut question is another
        question. Where every sample is left out, the batch has no rows.

        Raises:
            DataError: a sample that cannot be used; the message names its id.
        """
        rows = []
        for sample in samples:
            row = self._row(sample, _question(sample), True, {})
            if len(row.ids) <= self.max_length:
                row.labels = [IGNORE_INDEX] * len(row.ids)
                rows.append((sample, row))
        return self._batch(rows, len(samples) - len(rows), left=True)

    def length(self, sample: Sample) -> int:
        """Tokens of the whole conversation, each medium taken as one item; nothing is decoded."""
        segments = self._segments(sample, sample.messages, False)
        return sum(len(s.ids) if isinstance(s, Text) else self.tokens.get(s.modality, 0) for s in segments)

    # ---------------------------------------------------------------- rows

    def _training_row(self, sample: Sample, places: Mapping[str, Mapping[int, Tensor]]) -> _Row | None:
        """The sample's row, or None where it is left out."""
        if not any(m.role == "assistant" and m.text.strip() for m in sample.messages):
            raise DataError(f"sample '{sample.id}' has no answer to learn from: {self._shown(sample)}")
        row = self._row(sample, sample.messages, False, places)
        if not row.num_labels:
            raise DataError(f"sample '{sample.id}' has no token with a label: {self._shown(sample)}")
        return row if len(row.ids) <= self.max_length else self._shortened(row)

    def _shortened(self, row: _Row) -> _Row | None:
        media = sum(code != TEXT for code in row.modality)
        if self.overflow == "refuse" or media > self.max_length:
            return None
        words = [i for i, code in enumerate(row.modality) if code == TEXT][: self.max_length - media]
        row.keep(sorted([*words, *(i for i, code in enumerate(row.modality) if code != TEXT)]))
        return row if row.num_labels else None

    def _row(
        self,
        sample: Sample,
        messages: Sequence[Message],
        generation_prompt: bool,
        places: Mapping[str, Mapping[int, Tensor]],
    ) -> _Row:
        segments = self._segments(sample, messages, generation_prompt)
        self._check_media(sample, segments)
        items = {modality: iter(raw) for modality, raw in sample.media.items()}
        row = _Row()
        for segment in segments:
            if isinstance(segment, Text):
                labels = segment.ids if segment.labelled else [IGNORE_INDEX] * len(segment.ids)
                row.append(segment.ids, labels, TEXT, segment.roles)
                continue
            raw = next(items[segment.modality])
            at = places.get(segment.modality)
            item = self._item(sample, segment.modality, raw) if at is None else at[id(raw)]
            n = len(item) * self.tokens[segment.modality]
            row.append([self.pad_id] * n, [IGNORE_INDEX] * n, MODALITIES[segment.modality], [segment.role] * n)
            row.media.setdefault(segment.modality, []).append(item)
        return row

    def _segments(self, sample: Sample, messages: Sequence[Message], generation_prompt: bool) -> list[Segment]:
        if not sample.messages:
            raise DataError(f"sample '{sample.id}' has no messages")
        try:
            return self.template.encode(messages, generation_prompt)
        except DataError as error:
            raise DataError(f"sample '{sample.id}': {error}") from error

    def _check_media(self, sample: Sample, segments: Iterable[Segment]) -> None:
        slots = [segment.modality for segment in segments if isinstance(segment, Slot)]
        for modality in {*slots, *sample.media}:
            given, places = len(sample.media.get(modality, ())), slots.count(modality)
            if given and modality not in self.transforms:
                raise DataError(
                    f"sample '{sample.id}' has {given} {modality} item(s) but the model has no {modality} encoder; "
                    f"choose one ({modality}=...) or data without {modality}"
                )
            if given != places:
                mark = _MARKS[modality]
                raise DataError(
                    f"sample '{sample.id}' has {places} {mark} placeholder(s) in its system and user texts "
                    f"but {given} {modality} item(s); each placeholder stands for one item"
                )

    def _item(self, sample: Sample, modality: str, raw: Any) -> Tensor:
        """One raw item, decoded and transformed: [m, *item_shape]."""
        try:
            item = self.transforms[modality](LOADERS[modality](raw))
        except DataError as error:
            raise DataError(f"sample '{sample.id}': {error}") from error
        if modality in self.stored:
            self.stored[modality].learn(raw, item)
        return item

    def _shown(self, sample: Sample, limit: int = 200) -> str:
        """The rendered conversation on one line, shortened."""
        if not sample.messages:
            return "it has no messages"
        text = repr(self.template.render(sample.messages))
        return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"

    # ---------------------------------------------------------------- tensors

    def _batch(self, rows: Sequence[tuple[Sample, _Row]], refused: int, left: bool) -> Batch:
        width = max((len(row.ids) for _, row in rows), default=0)

        def padded(lists: Iterable[list[Any]], fill: Any) -> Tensor:
            table = np.full((len(rows), width), fill, np.int64)
            for line, values in zip(table, lists, strict=True):
                line[slice(width - len(values), None) if left else slice(len(values))] = values
            return torch.from_numpy(table)

        table = [row for _, row in rows]
        return Batch(
            input_ids=padded((row.ids for row in table), self.pad_id),
            labels=padded((row.labels for row in table), IGNORE_INDEX),
            attention_mask=padded(([1] * len(row.ids) for row in table), 0).bool(),
            modality=padded((row.modality for row in table), TEXT),
            role=padded((row.role for row in table), PAD),
            media={modality: self._stacked(modality, table) for modality in self.transforms},
            media_row={modality: _rows_of(modality, table) for modality in self.transforms},
            ids=tuple(sample.id for sample, _ in rows),
            references=tuple(sample.reference for sample, _ in rows),
            refused=refused,
        )

    def _stacked(self, modality: str, rows: Sequence[_Row]) -> Tensor:
        """[n, *item_shape]; n is 0 where no row has an item."""
        items = [item for row in rows for item in row.media.get(modality, ())]
        if items:
            return torch.cat(items)
        if modality not in self._empty:
            self._empty[modality] = self.transforms[modality](BLANK[modality]())[:0]
        return self._empty[modality]


def _question(sample: Sample) -> tuple[Message, ...]:
    """The messages without a closing answer."""
    closing = sample.messages and sample.messages[-1].role == "assistant"
    return sample.messages[:-1] if closing else sample.messages


def _rows_of(modality: str, rows: Sequence[_Row]) -> Tensor:
    """[n] int64, the row of each item."""
    return torch.tensor(
        [i for i, row in enumerate(rows) for item in row.media.get(modality, ()) for _ in range(len(item))]
    ).long()
