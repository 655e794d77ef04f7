"""Short samples side by side in the rows that the backbone sees: less padding, the same loss.

A batch stays one sample a row for everything else; ``Packing`` says where each of its positions lies while the decoder layers
run. Positions count from each sample's start and attention ends at its borders, so hidden states are those of the sample alone.
"""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from mllm_factory.errors import ConfigError, Problem, one_line
from mllm_factory.interfaces import Backbone
from mllm_factory.types import Packing

SLACK = 1.02
"""Shorter rows are taken for so much more area: attention costs less in them."""

NEAR = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest difference between a packed sample and the sample alone, relative to the largest value; 5e-2 for other types."""


def lay_out(lengths: Sequence[int], width: int, limit: int) -> Packing:
    """Samples of so many tokens in as little area as found: R rows of L tokens, L at most ``limit``.

    For each R the longest sample goes to the row with most room, then the next (Graham 1969, LPT); of all R the smallest
    R L is taken, and within ``SLACK`` of it the largest R.

    Args:
        lengths: [B] tokens of each row of the batch, padding on the right.
        width: T of the batch.
        limit: longest packed row; no sample is longer.
    """
    total, longest = sum(lengths), max(lengths)
    tried = [
        _spread(lengths, rows) for rows in range(-(-total // limit), min(len(lengths), -(-total // longest) + 1) + 1)
    ]
    fits = [rows for rows in tried if _width(rows, lengths) <= limit] or [[[b] for b in range(len(lengths))]]
    least = min(len(rows) * _width(rows, lengths) for rows in fits)
    rows = max((rows for rows in fits if len(rows) * _width(rows, lengths) <= SLACK * least), key=len)
    return _packing(rows, lengths, width)


def _spread(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Which samples share each of ``rows`` rows."""
    room: list[tuple[int, int]] = [(0, r) for r in range(rows)]
    result: list[list[int]] = [[] for _ in range(rows)]
    for b in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        fill, r = room[0]
        heapq.heapreplace(room, (fill + lengths[b], r))
        result[r].append(b)
    return [sorted(row) for row in result if row]


def _width(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return max(sum(lengths[b] for b in row) for row in rows)


def _packing(rows: Sequence[Sequence[int]], lengths: Sequence[int], width: int) -> Packing:
    L = _width(rows, lengths)
    place = torch.zeros(len(lengths), width, dtype=torch.long)
    source, position = torch.zeros(len(rows), L, dtype=torch.long), torch.zeros(len(rows), L, dtype=torch.long)
    for r, row in enumerate(rows):
        start = 0
        for b in row:
            count = torch.arange(lengths[b])
            span = slice(start, start + lengths[b])
            place[b, : lengths[b]] = r * L + start + count
            source[r, span], position[r, span] = b * width + count, count
            start += lengths[b]
        position[r, start:] = torch.arange(L - start)
    return Packing(place, source, position)


# ---------------------------------------------------------------- whether a backbone can


@torch.no_grad()
def require_packable(backbone: Backbone) -> None:
    """Refuse a backbone that does not keep packed samples apart: two short ones are run side by side and alone.

    Raises:
        ConfigError: it takes no positions, or the hidden states differ.
    """
    name, remedy = type(getattr(backbone, "model", backbone)).__name__, "set trainer.packing=false"
    if "positions" not in inspect.signature(type(backbone).forward).parameters:
        raise ConfigError(
            Problem(f"{name} takes no positions, so samples cannot share a row; {remedy}", "trainer.packing")
        )
    embeds, parts, positions = _two_samples(backbone)
    if embeds.device.type == "meta":
        return
    training = backbone.training
    backbone.eval()
    try:
        alone = torch.cat([backbone(part) for part in parts], 1)
        packed = backbone(embeds, positions=positions)[:, : alone.shape[1]]
    except (ValueError, TypeError, RuntimeError) as error:
        reason = one_line(error, 200)
        raise ConfigError(Problem(f"{name} cannot run a packed row ({reason}); {remedy}", "trainer.packing")) from error
    finally:
        backbone.train(training)
    gap, size = float((packed - alone).abs().max()), float(alone.abs().max())
    if not gap <= NEAR.get(alone.dtype, 5e-2) * size:
        raise ConfigError(
            Problem(
                f"{name} does not keep packed samples apart: hidden states differ by {gap / size:.1g} of the largest; {remedy}, or "
                "choose another backbone.attention",
                "trainer.packing",
            )
        )


def _two_samples(backbone: Backbone) -> tuple[Tensor, list[Tensor], Tensor]:
    """A row of samples of 5 and 6 tokens and one unused place, the samples alone, and the row's positions."""
    weight = next(backbone.parameters())
    ids = (torch.arange(12, device=weight.device) * 7 + 3)[None] % len(backbone.tokenizer)
    embeds = backbone.embed(ids)
    position = torch.cat([torch.arange(n) for n in (5, 6, 1)])[None].to(weight.device)
    return embeds, [embeds[:, :5], embeds[:, 5:11]], position
