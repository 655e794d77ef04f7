"""What flows through the engine: Sample -> Batch -> Output.

Letters used everywhere: B batch rows, T tokens of a row, D backbone width, V vocabulary, n media items, k tokens of one
item, N label positions of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that carries no loss."""

TEXT, VISION, AUDIO = 0, 1, 2
"""Codes of ``Batch.modality``."""

MODALITIES: dict[str, int] = {"vision": VISION, "audio": AUDIO}
"""Media modalities by name. Text is not among them: it has no encoder."""

PLACEHOLDERS: dict[str, str] = {"<image>": "vision", "<audio>": "audio"}
"""What stands in a message's text for one media item, and the modality it belongs to."""

PAD, SYSTEM, USER, ASSISTANT = 0, 1, 2, 3
"""Codes of ``Batch.role``. The words a template puts around the turns count as SYSTEM."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    text: str


@dataclass(frozen=True)
class Sample:
    """One conversation with its media.

    Attributes:
        id: names the sample in errors and in per-sample results.
        messages: the turns; each ``<image>`` or ``<audio>`` in a system or user text stands for one media item.
        media: per modality the raw items in reading order: a path, encoded bytes, or a decoded picture or waveform.
    """

    id: str
    messages: tuple[Message, ...]
    media: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The last turn's text if the assistant speaks it, else the empty string: what an evaluation compares with."""
        last = self.messages[-1] if self.messages else None
        return last.text if last is not None and last.role == "assistant" else ""


@dataclass(frozen=True)
class Packing:
    """Where the positions of a batch [B, T] lie in the rows [R, L] that the decoder layers see.

    Attributes:
        place: [B, T] int64, r * L + l of each position; 0 on padding.
        source: [R, L] int64, b * T + t of what lies there; 0 where nothing does.
        position: [R, L] int64, counted from the start of the sample; where nothing lies, from 0 on too.
    """

    place: Tensor
    source: Tensor
    position: Tensor

    def each(self, change: Any) -> Self:
        """The same with every tensor changed."""
        return type(self)(*map(change, (self.place, self.source, self.position)))


@dataclass(frozen=True)
class Batch:
    """Samples as tensors. Lengths are final: nothing changes them inside the model.

    Attributes:
        input_ids: [B, T] int64; media and padding positions hold the padding id.
        labels: [B, T] int64; IGNORE_INDEX wherever no loss is wanted. Not shifted: label t belongs to token t.
        attention_mask: [B, T] bool; False on padding.
        modality: [B, T] int64; TEXT, VISION or AUDIO. The map that rules fusion, steering and attention statistics.
        role: [B, T] int64; PAD, SYSTEM, USER or ASSISTANT.
        media: per modality the items of all rows in reading order, [n, *item_shape]; n may be 0.
        media_row: per modality the row each item belongs to, [n] int64.
        ids: the samples' ids, one a row.
        references: the samples' reference answers, one a row.
        refused: how many samples were left out because they are longer than ``max_length`` allows.
        left_padded: True where some row starts with padding; found out once, on the CPU.
        packing: how rows lie side by side while the decoder layers run; None: as they are.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    modality: Tensor
    role: Tensor
    media: dict[str, Tensor]
    media_row: dict[str, Tensor]
    ids: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    refused: int = 0
    left_padded: bool | None = None
    packing: Packing | None = None

    def __post_init__(self) -> None:
        if self.left_padded is None:
            object.__setattr__(self, "left_padded", not bool(self.attention_mask[:, :1].all()))

    def _each(self, change: Any) -> Self:
        tensors: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        dicts: dict[str, Any] = {k: {m: change(t) for m, t in getattr(self, k).items()} for k in ("media", "media_row")}
        return replace(self, **tensors, **dicts, packing=self.packing and self.packing.each(change))

    def laid_out(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Rows and columns [n] of the batch as rows and columns of what the decoder layers see, and its number of both."""
        B, T = self.input_ids.shape
        if self.packing is None:
            return rows, columns, (B, T)
        R, L = self.packing.source.shape
        place = self.packing.place[rows, columns]
        return place // L, place % L, (R, L)

    def to(self, device: Any) -> Self:
        """The same batch on another device; the copy is asynchronous where the memory is pinned."""
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory (called by the data loader)."""
        return self._each(lambda t: t.pin_memory())

    @property
    def num_labels(self) -> Tensor:
        """[] int64: positions that carry loss."""
        return (self.labels[:, 1:] != IGNORE_INDEX).sum()


@dataclass
class Output:
    """What a model gives for a batch.

    Attributes:
        loss_sum: [] float32, cross-entropy summed over the label positions, so that callers may divide correctly.
        num_labels: [] int64, N.
        logits: [N, V] at the positions that predict a label, row by row; only on request.
        texts: generated answers, one a row; only from generation.
    """

    loss_sum: Tensor | None = None
    num_labels: Tensor | None = None
    logits: Tensor | None = None
    texts: list[str] | None = None
