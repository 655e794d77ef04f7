"""What is done to a batch to see whether a modality matters: its content changes, the layout stays (except for ``drop``).

``shuffle`` gives every item the place of a stranger, ``blank`` puts the item that carries nothing, ``noise`` is the forward
diffusion of VCD (Leng et al., CVPR 2024, arXiv 2311.16922), a blanked question repeats a neutral instruction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from mllm_factory import IGNORE_INDEX, MODALITIES, PAD, TEXT, USER, Batch, Encoder

STEPS = 1000
"""Steps of the diffusion."""

SILENCE = (torch.zeros(1, 16000), 16000)
"""A second of it, as a transform takes a recording."""

# ---------------------------------------------------------------- exchange


def derangement(identity: Tensor, generator: torch.Generator) -> Tensor | None:
    """A permutation of n items in which none is replaced by one of the same identity, or None where there is none.

    Items are put in an order in which equal ones are neighbours (the groups shuffled, each group shuffled) and rotated by the
    size of the largest group m: rotating by m leaves every group, as no group is longer, and lands in no group twice if
    2 m <= n.

    Args:
        identity: [n] int64, equal for items that must not replace each other.
        generator: the source of randomness.

    Returns:
        [n] int64, the item that takes each item's place.
    """
    n = identity.numel()
    _, inverse, counts = identity.unique(return_inverse=True, return_counts=True)
    m = int(counts.max()) if n else 0
    if n == 0 or 2 * m > n:
        return None
    group_rank = torch.randperm(counts.numel(), generator=generator)[inverse]
    shuffled = torch.randperm(n, generator=generator)
    order = shuffled[torch.argsort(group_rank[shuffled], stable=True)]
    result = torch.empty_like(order)
    result[order] = order.roll(-m)
    return result


def exchange(identity: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A derangement of as many items as there can be one of; the others stay.

    Where one identity has more than half of the n items, n - m of its m items, chosen at random, change places with the rest.

    Args:
        identity: [n] int64, equal for items that must not replace each other.
        generator: the source of randomness.

    Returns:
        [n] int64, the item that takes each item's place; [n] bool, the items that got another one.
    """
    n = identity.numel()
    place, moves = torch.arange(n), torch.zeros(n, dtype=torch.bool)
    if n == 0:
        return place, moves
    _, inverse, counts = identity.unique(return_inverse=True, return_counts=True)
    largest, m = int(counts.argmax()), int(counts.max())
    crowd = (inverse == largest).nonzero()[:, 0]
    chosen = crowd[torch.randperm(m, generator=generator)[: n - m]] if 2 * m > n else crowd
    taking = torch.cat([chosen, (inverse != largest).nonzero()[:, 0]]).sort().values
    moved = derangement(identity[taking], generator)
    if moved is not None:
        place[taking], moves[taking] = taking[moved], True
    return place, moves


def identities(items: Tensor, row: Tensor) -> Tensor:
    """[n, *item_shape], [n] -> [n] int64, equal for items that show the same or belong to the same sample, directly or in a chain."""
    content = items.flatten(1).unique(dim=0, return_inverse=True)[1].cpu()
    label = torch.arange(len(items))
    while True:
        before = label
        for group in (content, row.cpu()):
            smallest = torch.full((int(group.max()) + 1,), len(items)).scatter_reduce(0, group, label, "amin")
            label = smallest[group]
        if torch.equal(label, before):
            return label


def select(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch, in ascending order, with their items."""
    at = torch.tensor(list(rows), device=batch.input_ids.device)
    place = torch.full((len(batch.input_ids),), -1, device=at.device).index_put(
        (at,), torch.arange(len(at), device=at.device)
    )
    media, media_row = {}, {}
    for name, row in batch.media_row.items():
        kept = place[row] >= 0
        media[name], media_row[name] = batch.media[name][kept], place[row][kept]
    return replace(
        batch,
        **{name: getattr(batch, name)[at] for name in ("input_ids", "labels", "attention_mask", "modality", "role")},
        media=media,
        media_row=media_row,
        ids=tuple(batch.ids[i] for i in rows),
        references=tuple(batch.references[i] for i in rows),
    )


def digests(batch: Batch, modality: str) -> list[list[str]]:
    """What each row shows or plays: a hash of the values of every item, by row."""
    found: list[list[str]] = [[] for _ in batch.input_ids]
    for item, row in zip(batch.media[modality].cpu(), batch.media_row[modality].tolist(), strict=True):
        values = item.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[row].append(hashlib.blake2b(values, digest_size=8).hexdigest())
    return found


# ---------------------------------------------------------------- other content


def seeded(*what: object) -> torch.Generator:
    """A generator whose numbers depend on ``what`` alone, so that no order of batches matters."""
    digest = hashlib.sha256(repr(what).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def blank_item(encoder: Encoder, items: Tensor) -> Tensor:
    """[n, *item_shape] -> [1, *item_shape], an item that carries nothing.

    For vision it is 0 everywhere, which is the mean pixel after normalisation (black, where an encoder does not normalise);
    for audio it is silence as the encoder's transform gives it.
    """
    if encoder.modality == "vision":
        return torch.zeros_like(items[:1])
    return encoder.transform(SILENCE)[:1].to(items.device, items.dtype)


@cache
def _kept() -> Tensor:
    """[STEPS] float64, abar_t = prod (1 - beta), beta = sigmoid(linspace(-6, 6)) (5e-3 - 1e-5) + 1e-5."""
    beta = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    return (1 - beta).cumprod(0)


def noise(batch: Batch, modality: str, step: int, seed: int) -> Tensor:
    """The items of a modality with noise, [n, *item_shape]: x_t = sqrt(abar_t) x + sqrt(1 - abar_t) sigma e, e ~ N(0, 1).

    Added behind the transform. sigma is 1 for pictures, as normalised pixels have it, and an item's own root mean square for
    audio, so that t means the same ratio of signal to noise for any recording. A row's noise depends on its id, ``step`` and
    ``seed`` alone.

    Args:
        step: t, 0 ... STEPS - 1; 500 leaves a ratio of 4.7 dB, 999 one of -10.5 dB.
    """
    items, rows = batch.media[modality], batch.media_row[modality].tolist()
    generators = {row: seeded(seed, "noise", batch.ids[row], modality, step) for row in sorted(set(rows))}
    e = torch.stack([torch.randn(items.shape[1:], generator=generators[row]) for row in rows]).to(items)
    if modality == "audio":
        e = e * items.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (items.ndim - 1))
    kept = float(_kept()[step])
    return kept**0.5 * items + (1 - kept) ** 0.5 * e


def question(batch: Batch) -> Tensor:
    """[B, T] bool, the words of the users."""
    return (batch.role == USER) & (batch.modality == TEXT) & batch.attention_mask


def neutral_question(batch: Batch, ids: Sequence[int]) -> Batch:
    """The batch with every user's words replaced by ``ids``, repeated and cut to the same number of tokens.

    Lengths, positions, media and the template's words stay. What stays of the question is its length.
    """
    places = question(batch)
    turn = (places.cumsum(1) - 1).clamp(min=0) % len(ids)  # [B, T]
    words = torch.tensor(list(ids), device=places.device)[turn]
    return replace(batch, input_ids=torch.where(places, words, batch.input_ids))


def drop(batch: Batch, modality: str, pad_id: int) -> Batch:
    """The batch without a modality's items and positions, padded on the right.

    Everything after an item moves forward: even a model that ignores the item answers otherwise. It says nothing by itself.
    """
    keep = batch.attention_mask & (batch.modality != MODALITIES[modality])
    count = keep.sum(1, keepdim=True)
    order = (~keep).long().argsort(dim=1, stable=True)[:, : int(count.max())]
    there = torch.arange(order.shape[1], device=order.device) < count

    def taken(values: Tensor, fill: int | bool) -> Tensor:
        return values.gather(1, order).masked_fill(~there, fill)

    return replace(
        batch,
        input_ids=taken(batch.input_ids, pad_id),
        labels=taken(batch.labels, IGNORE_INDEX),
        attention_mask=there,
        modality=taken(batch.modality, TEXT),
        role=taken(batch.role, PAD),
        media={**batch.media, modality: batch.media[modality][:0]},
        media_row={**batch.media_row, modality: batch.media_row[modality][:0]},
        left_padded=False,
    )
