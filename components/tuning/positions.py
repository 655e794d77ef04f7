"""Which tokens of a batch are steered: a short text such as ``f4+l5``, read once and applied to ``Batch.modality``.

Of each row, the tokens of one modality are taken in reading order, whatever items they came from, and counted 0 .. c-1; a
selection picks among these numbers. Several modalities are counted each by itself. So a row without such tokens has no
steered position, padding never counts, and the picks do not depend on where in the row the tokens stand.

``f4+l5`` is what LLaVA Steering (arXiv 2412.12359) calls one percent: 9 of 728 visual tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mllm_factory import AUDIO, IGNORE_INDEX, TEXT, VISION, Batch, hint, types

CODES = {"vision": VISION, "audio": AUDIO, "text": TEXT}
"""Modalities that can be steered, and their codes in ``Batch.modality``."""

FORMS = "all, first:n, last:m, f4+l5, uniform:n, ratio:p, random:p"
_ENDS = re.compile(r"(?=[fl])(?:f(\d+))?(?:(?:^|(?<=\d)\+)l(\d+))?")
_NAMED = re.compile(r"(first|last|uniform|ratio|random):(.+)")
_SHARE = re.compile(r"(\d*\.?\d+(?:e-?\d+)?)(?:-(\d*\.?\d+(?:e-?\d+)?))?")

Pick = Callable[[int, float], Tensor]
"""(count c, share p) -> [n] int64, distinct and ascending, each in 0 .. c-1."""


@dataclass(frozen=True)
class Selection:
    """A selection's text, understood.

    Attributes:
        pick: chooses among c tokens.
        low, high: the share p of ``ratio`` and ``random``: drawn evenly between both for each training batch, their mean
            otherwise. Equal where one number was given; 1 where the form has no share.
    """

    pick: Pick
    low: float = 1.0
    high: float = 1.0

    def share(self, learning: bool) -> float:
        """p for one batch; torch's generator is used only for a range while learning."""
        if self.low == self.high or not learning:
            return (self.low + self.high) / 2
        return self.low + (self.high - self.low) * float(torch.rand((), device="cpu"))


def parse(text: str, seed: int) -> Selection:
    """Read a selection.

    ``all``; ``first:n`` and ``last:m`` (also ``f4``, ``l5``); ``f4+l5``, both ends; ``uniform:n``, n tokens as evenly spread
    as whole numbers allow, with the first and the last one for n >= 2; ``ratio:p``, the share p spread in the same way;
    ``random:p``, the share p drawn by ``seed``, the same draw for the same number of tokens. p may be a range such as
    ``0.01-0.25``. A share of c tokens is floor(p c + 1/2) of them and at least one. Where there are fewer tokens than asked
    for, all are taken, each once.

    Raises:
        ValueError: no such form, a number of 0, or a share outside (0, 1].
    """
    if text == "all":
        return Selection(_all)
    if ends := _ENDS.fullmatch(text):
        return _of_ends(int(ends[1] or 0), int(ends[2] or 0), text)
    named = _NAMED.fullmatch(text)
    if named is None:
        raise ValueError(f"positions: '{text}' is no selection{hint(text, FORMS.split(', '))}")
    form, value = named[1], named[2]
    if form in ("ratio", "random"):
        low, high = _shares(form, value)
        return Selection(_spread if form == "ratio" else partial(_drawn, seed), low, high)
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"positions: '{text}' needs a whole number of 1 or more behind the colon, such as {form}:4")
    n = int(value)
    if form == "uniform":
        return Selection(partial(_evenly, n))
    return _of_ends(n if form == "first" else 0, n if form == "last" else 0, text)


def _of_ends(first: int, last: int, text: str) -> Selection:
    if first + last == 0:
        raise ValueError(f"positions: '{text}' selects nothing; use 1 or more, such as f4+l5")
    return Selection(partial(_both_ends, first, last))


def _shares(form: str, value: str) -> tuple[float, float]:
    found = _SHARE.fullmatch(value)
    if found is None:
        raise ValueError(
            f"positions: '{form}:{value}' needs a share or a range of shares, such as {form}:0.01 or {form}:0.01-0.25"
        )
    low = float(found[1])
    high = float(found[2]) if found[2] else low
    if not 0 < low <= high <= 1:
        raise ValueError(
            f"positions: '{form}:{value}' is outside (0, 1] or falls; use for example {form}:0.01 or {form}:0.01-0.25"
        )
    return low, high


def evenly(n: int, c: int) -> Tensor:
    """min(n, c) of c numbers: floor(i (c-1) / (n-1) + 1/2) for i = 0 .. n-1, in whole numbers; the middle one for n = 1."""
    n = min(n, c)
    if n <= 1:
        return torch.full((n,), (c - 1) // 2)
    return (2 * torch.arange(n) * (c - 1) + (n - 1)) // (2 * (n - 1))


def _count(share: float, c: int) -> int:
    return min(c, max(1, math.floor(share * c + 0.5)))


def _spread(c: int, share: float) -> Tensor:
    return evenly(_count(share, c), c)


def _drawn(seed: int, c: int, share: float) -> Tensor:
    """A draw that depends on the seed and the number of tokens alone; a smaller share takes a part of a larger one's."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + c) % 2**63)
    return torch.randperm(c, generator=generator)[: _count(share, c)].sort().values


def _all(c: int, share: float) -> Tensor:
    return torch.arange(c)


def _evenly(n: int, c: int, share: float) -> Tensor:
    return evenly(n, c)


def _both_ends(first: int, last: int, c: int, share: float) -> Tensor:
    head = min(first, c)
    return torch.cat([torch.arange(head), torch.arange(max(c - last, head), c)])


# ---------------------------------------------------------------- on a batch


@dataclass
class Places:
    """The steered positions of one batch.

    Attributes:
        rows, columns: [n] int64 each, on the batch's device, in what the decoder layers see.
        size: rows and columns of that: the batch's B and T, or those of its packed rows.
        tokens: how many tokens each modality has in the batch, for messages.
    """

    rows: Tensor
    columns: Tensor
    size: tuple[int, int]
    tokens: dict[str, int] = field(default_factory=dict)
    _flat: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def flat(self, rows: int, width: int) -> Tensor:
        """Indices into hidden states [rows * width, D], as many copies of each batch row in a row as there are beams.

        Raises:
            ValueError: ``rows`` is no multiple of the batch's.
        """
        if (rows, width) not in self._flat:
            beams, rest = divmod(rows, self.size[0])
            if rest:
                raise ValueError(f"{rows} rows reach the decoder but the batch in flight has {self.size[0]}")
            first = (self.rows * beams)[:, None] + torch.arange(beams, device=self.rows.device)  # [n, beams]
            self._flat[rows, width] = (first * width + self.columns[:, None]).flatten()
        return self._flat[rows, width]


class Positions:
    """A selection on the tokens of one or several modalities.

    Args:
        text: see ``parse``.
        modalities: of vision, audio and text.
        seed: of ``random``.

    Raises:
        ValueError: no such selection or modality.
    """

    def __init__(self, text: str, modalities: Sequence[str] | str, seed: int) -> None:
        names = [modalities] if isinstance(modalities, str) else list(modalities)
        if not names:
            raise ValueError(f"modalities: nothing to steer; name some of {', '.join(CODES)}")
        for name in names:
            if name not in CODES:
                raise ValueError(f"modalities: there is no modality '{name}'{hint(name, CODES)}")
        if len(set(names)) != len(names):
            raise ValueError(f"modalities: {', '.join(names)} names one twice; name each once")
        self.text, self.modalities, self.selection = text, tuple(names), parse(text, seed)

    def places(self, batch: Batch, learning: bool) -> Places:
        """The positions of a batch, row by row; to be called once for each."""
        share = self.selection.share(learning)
        found, tokens = [], {}
        for name in self.modalities:
            spots = _mask(batch, name).nonzero()  # [m, 2], ascending
            counts = torch.bincount(spots[:, 0], minlength=len(batch.modality)).tolist()
            picks, start = [], 0
            for c in counts:
                picks.append(self.selection.pick(c, share) + start if c else torch.arange(0))
                start += c
            chosen = torch.cat(picks) if picks else torch.arange(0)
            found.append(spots[chosen.to(spots.device)])
            tokens[name] = start
        rows, columns = torch.cat(found).unbind(1)
        return Places(*batch.laid_out(rows, columns), tokens)


def _mask(batch: Batch, name: str) -> Tensor:
    """[B, T] bool, the tokens of a modality.

    Text is the prompt's: what stands before the last answer, other answers left out. So training and generation count the
    same tokens, and no position of an answer is steered.
    """
    mask = batch.modality == CODES[name]
    if name != "text":
        return mask
    labelled = batch.labels != IGNORE_INDEX
    starts = labelled.clone()
    starts[:, 1:] &= ~labelled[:, :-1]  # where an answer starts
    order = torch.arange(labelled.shape[1], device=labelled.device)
    last = torch.where(starts, order, -1).amax(1, keepdim=True) if labelled.shape[1] else order[None, :]  # [B, 1]
    before = (order < last) | (last < 0)
    return mask & batch.attention_mask & (batch.role != types.ASSISTANT) & before
