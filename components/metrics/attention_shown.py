"""What the answers of a few samples looked at and listened to, as rows of tables that a report draws.

A token's attention is the mean over heads and over the rows that predict the answer of A[row, token], by layer. Where a token
lies in a picture or a recording is known for a plain square grid and for a plain sequence; for anything else it is said why
not, and nothing is guessed.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from mllm_factory import IGNORE_INDEX, MODALITIES, TEXT, USER, Batch, MultimodalModel
from mllm_factory.components.metrics.attention_capture import AttentionStats

LARGEST = 224
"""Pixels of a stored picture's longer side."""

POINTS = 200
"""Points of a stored waveform's envelope."""


@dataclass(frozen=True)
class Places:
    """Where an item's tokens lie in it.

    Attributes:
        kind: ``grid`` (row by row over a square picture), ``time`` (one behind the other, all of one length), or ``tokens``.
        side: rows and columns of a grid, else 0.
        why: for ``tokens``, the reason that no place is known.
    """

    kind: str
    side: int = 0
    why: str = ""


@torch.no_grad()
def places_of(model: MultimodalModel, name: str) -> Places:
    """Where the tokens of a modality's items lie.

    Encoders give cells row by row, or frames in order; a projector that merges neighbours says so with ``rows`` and
    ``columns``, any other is asked: it keeps places if exchanging its inputs exchanges its outputs alike.
    """
    encoder: Any = model.encoders[name]
    projector: Any = model.projectors[name]
    cells = getattr(projector, "rows", None), getattr(projector, "columns", None)
    merges = None not in cells
    if not merges and not _one_by_one(model, name):
        return Places("tokens", why="the projector mixes the encoder's tokens, so that none has a place")
    if hasattr(encoder, "encoders"):
        return Places("tokens", why="several encoders share the tokens")
    if name == "vision":
        return _in_picture(encoder, projector.num_tokens, merges, cells)
    if any(isinstance(module, nn.Conv2d) for module in encoder.modules()):
        return Places("tokens", why="the encoder's tokens are cells of time and frequency")
    if merges and cells[1] != 1:
        return Places("tokens", why="the projector merges tokens along two axes")
    return Places("time")


def _in_picture(encoder: Any, tokens: int, merges: bool, cells: tuple[Any, Any]) -> Places:
    side, before = isqrt(tokens), isqrt(encoder.num_tokens)
    if getattr(encoder, "prefix_tokens", False) or before * before != encoder.num_tokens:
        return Places("tokens", why=f"the encoder's {encoder.num_tokens} tokens are no square grid")
    if (merges and cells[0] != cells[1]) or side * side != tokens:
        return Places("tokens", why=f"the projector's {tokens} tokens are no square grid")
    return Places("grid", side)


def _one_by_one(model: MultimodalModel, name: str) -> bool:
    """Whether the projector maps each token by itself: f(x in reverse) = f(x) in reverse."""
    encoder: Any = model.encoders[name]
    projector: Any = model.projectors[name]
    if projector.num_tokens != encoder.num_tokens:
        return False
    like = next(projector.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, encoder.num_tokens, encoder.dim, generator=generator).to(like)
    plain, turned = projector(x), projector(x.flip(1)).flip(1)
    return bool(torch.allclose(plain, turned, rtol=1e-2, atol=1e-3 * float(plain.abs().max())))


# ---------------------------------------------------------------- rows of tables


def shown(
    model: MultimodalModel, batch: Batch, logits: Tensor | None, stats: AttentionStats, row: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One sample as rows.

    Args:
        model: whose attention it is.
        batch: the sample's.
        logits: [N, V] of the batch, for the likeliest answer; None: it stays empty.
        stats: of the batch, with ``keys``.
        row: the sample's place.

    Returns:
        For each of its items a row about the item, and for each of the item's tokens a row with its attention by layer.
    """
    items: list[dict[str, Any]] = []
    tokens: list[dict[str, Any]] = []
    words = {"sample": batch.ids[row], **_words(model, batch, logits, row)}
    for name in batch.media:
        mine = (batch.media_row[name] == row).nonzero()[:, 0].tolist()
        if not mine:
            continue
        places, k = places_of(model, name), model.tokens_per_item[name]
        at = (batch.modality[row] == MODALITIES[name]).nonzero()[:, 0].split(k)
        for number, (item, where) in enumerate(zip(mine, at, strict=True)):
            which = {"sample": batch.ids[row], "modality": name, "item": number}
            picture = _picture(model.encoders[name], batch.media[name][item])
            place = {"layout": places.kind, "side": places.side, "why": places.why}
            items.append({**which, **words, "items": len(mine), **place, **picture})
            tokens += _tokens(stats, row, where, which)
    return items, tokens


def _tokens(stats: AttentionStats, row: int, where: Tensor, which: dict[str, Any]) -> list[dict[str, Any]]:
    if stats.keys is None:
        raise ValueError("stats: observe the model with keys=True")
    shares = stats.keys[:, row, where].double().cpu()  # [L, k]
    return [
        {
            **which,
            "token": t,
            "mean": float(of.mean()),
            **{f"layer_{n:02d}": float(share) for n, share in zip(stats.layers, of, strict=True)},
        }
        for t, of in enumerate(shares.T)
    ]


def _words(model: MultimodalModel, batch: Batch, logits: Tensor | None, row: int) -> dict[str, str]:
    """The users' words, the reference, and the likeliest token at each of its places."""
    decode: Any = model.backbone.tokenizer.decode
    asked = (batch.role[row] == USER) & (batch.modality[row] == TEXT)
    told = ""
    if logits is not None:
        mine = (batch.labels[:, 1:] != IGNORE_INDEX).nonzero()[:, 0] == row
        told = decode(logits[mine].argmax(-1).tolist(), skip_special_tokens=True).strip()
    question = " ".join(decode(batch.input_ids[row][asked].tolist(), skip_special_tokens=True).split())
    return {"question": question, "reference": batch.references[row], "answer": told}


# ---------------------------------------------------------------- pictures


def _picture(encoder: Any, item: Tensor) -> dict[str, Any]:
    """An item as the encoder gets it: ``picture`` as a data URI, ``seconds`` of a recording, ``envelope`` of a waveform."""
    transform = encoder.transform
    item = item.detach().float().cpu()
    if encoder.modality == "vision":
        whole = item.ndim == 3 and item.shape[0] == 3
        return {"picture": _encoded(_pixels(transform, item)) if whole else "", "seconds": "", "envelope": ""}
    seconds = getattr(getattr(transform, "windows", transform), "seconds", "")
    if item.ndim == 1:
        size = -(-len(item) // POINTS)
        padded = torch.nn.functional.pad(item, (0, -len(item) % size))
        levels = padded.view(-1, size).square().mean(1).sqrt()
        return {"picture": "", "seconds": seconds, "envelope": " ".join(f"{level:.4g}" for level in levels.tolist())}
    frames = getattr(transform, "frames", None)
    if item.ndim == 2 and item.shape[1] == frames:  # bands, low ones first, by frames
        return {"picture": _encoded(_stretched(item.flip(0))[..., None].expand(-1, -1, 3)), "seconds": seconds}
    return {"picture": "", "seconds": seconds}


def _pixels(transform: Any, item: Tensor) -> Tensor:
    """[3, h, w] normalised -> [h, w, 3] in 0..1; stretched to that range where the transform does not tell its statistics."""
    scale, shift = getattr(transform, "scale", None), getattr(transform, "shift", None)
    if scale is None or shift is None:
        return _stretched(item).permute(1, 2, 0)
    scale, shift = (torch.as_tensor(x).float().view(3, 1, 1) for x in (scale, shift))  # x * scale - shift
    return ((item + shift) / scale / 255).clamp(0, 1).permute(1, 2, 0)


def _stretched(values: Tensor) -> Tensor:
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low if high > low else 1.0)


def _encoded(pixels: Tensor) -> str:
    """[h, w, 3] in 0..1 -> data URI of at most LARGEST pixels: PNG where small, else JPEG."""
    from PIL import Image

    image = Image.fromarray((255 * pixels).round().byte().numpy())
    image.thumbnail((2 * LARGEST, LARGEST))
    kind = "PNG" if image.width * image.height <= 128 * 256 else "JPEG"
    out = io.BytesIO()
    image.save(out, kind, quality=88)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(out.getvalue()).decode()
