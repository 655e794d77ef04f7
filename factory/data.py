"""The collator: conversations with media to the tensors of a batch.

Each placeholder becomes as many positions as its item has tokens in the backbone, so lengths are final here. The answers'
positions carry labels. Too long rows lose text from their end, or are left out and counted; media are never cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mllm_factory.errors import DataError, listed
from mllm_factory.interfaces import Encoder
from mllm_factory.media import BLANK, LOADERS
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

    # ---------------------------------------------------------------- batches

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Whole conversations with labels on the answers, padded on the right.

        Where every sample is left out, the batch is one padding token without a label, so that shapes stay legal.

        Raises:
            DataError: a sample that cannot be used; the message names its id.
        """
        rows = [(sample, row) for sample in samples if (row := self._training_row(sample)) is not None]
        refused = len(samples) - len(rows)
        if not rows:
            rows = [(Sample("", ()), _Row([self.pad_id], [IGNORE_INDEX], [TEXT], [PAD]))]
        return self._batch(rows, refused, left=False)

    def prompts(self, samples: Sequence[Sample]) -> Batch:
        """Everything up to a closing answer, ready to generate it, padded on the left; no labels.

        A sample longer than ``max_length`` is left out and counted under either policy: a cut question is another
        question. Where every sample is left out, the batch has no rows.

        Raises:
            DataError: a sample that cannot be used; the message names its id.
        """
        rows = []
        for sample in samples:
            row = self._row(sample, _question(sample), generation_prompt=True)
            if len(row.ids) <= self.max_length:
                row.labels = [IGNORE_INDEX] * len(row.ids)
                rows.append((sample, row))
        return self._batch(rows, len(samples) - len(rows), left=True)

    def length(self, sample: Sample) -> int:
        """Tokens of the whole conversation, each medium taken as one item; nothing is decoded."""
        segments = self._segments(sample, sample.messages, False)
        return sum(len(s.ids) if isinstance(s, Text) else self.tokens.get(s.modality, 0) for s in segments)

    # ---------------------------------------------------------------- rows

    def _training_row(self, sample: Sample) -> _Row | None:
        """The sample's row, or None where it is left out."""
        if not any(m.role == "assistant" and m.text.strip() for m in sample.messages):
            raise DataError(f"sample '{sample.id}' has no answer to learn from: {self._shown(sample)}")
        row = self._row(sample, sample.messages, generation_prompt=False)
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

    def _row(self, sample: Sample, messages: Sequence[Message], generation_prompt: bool) -> _Row:
        segments = self._segments(sample, messages, generation_prompt)
        self._check_media(sample, segments)
        items = {modality: iter(raw) for modality, raw in sample.media.items()}
        row = _Row()
        for segment in segments:
            if isinstance(segment, Text):
                labels = segment.ids if segment.labelled else [IGNORE_INDEX] * len(segment.ids)
                row.append(segment.ids, labels, TEXT, segment.roles)
                continue
            item = self._item(sample, segment.modality, next(items[segment.modality]))
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
            return self.transforms[modality](LOADERS[modality](raw))
        except DataError as error:
            raise DataError(f"sample '{sample.id}': {error}") from error

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
            blanks = ((values, [fill] * (width - len(values))) for values in lists)
            return torch.tensor([pad + values if left else values + pad for values, pad in blanks]).reshape(
                len(rows), width
            )

        table = [row for _, row in rows]
        return Batch(
            input_ids=padded((row.ids for row in table), self.pad_id).long(),
            labels=padded((row.labels for row in table), IGNORE_INDEX).long(),
            attention_mask=padded(([True] * len(row.ids) for row in table), False).bool(),
            modality=padded((row.modality for row in table), TEXT).long(),
            role=padded((row.role for row in table), PAD).long(),
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
