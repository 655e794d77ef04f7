"""Which normaliser of attention means anything for a model: how MDI moves with the number of media tokens.

Two null models bracket reality. A model that wants a constant mass on the picture has MDI proportional to the number n of its
tokens: slope of log MDI on log n is 1, and shares are what to report. A model to which every key is alike has an MDI that does
not depend on n: slope 0, and ratios a token are what to report. In between, report both, at one fixed number of tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_factory import (
    IGNORE_INDEX,
    MODALITIES,
    PAD,
    TEXT,
    Batch,
    ConfigError,
    Metric,
    MultimodalModel,
    Output,
    register,
)
from mllm_factory.components.metrics import lmar
from mllm_factory.components.metrics.attention_capture import observe


def fixed_effects_slope(x: Tensor, y: Tensor) -> float:
    """OLS of y on x with an intercept of its own for each sample.

    b = sum (x - mean_i x) (y - mean_i y) / sum (x - mean_i x)^2, the means over a sample's own values. NaN where no sample
    has two values of x that differ.

    Args:
        x, y: [N, K], K measurements of N samples; a measurement with NaN in y is left out.
    """
    x, y = x.double(), y.double()
    there = ~y.isnan()
    x = x.masked_fill(~there, torch.nan)
    dx = (x - x.nanmean(1, keepdim=True)).nan_to_num(0)
    dy = (y - y.nanmean(1, keepdim=True)).nan_to_num(0)
    ground = float(dx.square().sum())
    return float((dx * dy).sum()) / ground if ground > 1e-12 else math.nan


def scaled(tokens: int, scale: float) -> int:
    """How many tokens an item of ``tokens`` has at a scale; a square grid stays square."""
    side = math.isqrt(tokens)
    return max(1, round(side * math.sqrt(scale))) ** 2 if side * side == tokens else max(1, round(tokens * scale))


class Resized(nn.Module):
    """A projector whose items get another number of tokens: means over neighbours, or copies of them.

    A number of tokens that is a square is taken as a grid in rows. Tokens of a smaller grid are means over cells, as of a
    smaller picture; a multiple in each direction repeats tokens exactly.

    Args:
        projector: what is resized; it stays as it is.
        tokens: how many it gives an item.
        count: how many to give instead.
    """

    def __init__(self, projector: nn.Module, tokens: int, count: int) -> None:
        super().__init__()
        self.projector, self.num_tokens = projector, count
        side, other = math.isqrt(tokens), math.isqrt(count)
        self.sides = (side, other) if side * side == tokens and other * other == count else None

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, count, out_dim]"""
        tokens = self.projector(features).transpose(1, 2)  # [n, D, k]
        if self.sides is None:
            return F.adaptive_avg_pool1d(tokens, self.num_tokens).transpose(1, 2)
        side, other = self.sides
        return F.adaptive_avg_pool2d(tokens.unflatten(2, (side, side)), other).flatten(2).transpose(1, 2)


def with_tokens(batch: Batch, modality: str, tokens: int, count: int, pad_id: int) -> Batch:
    """The batch with ``count`` positions an item of one modality instead of ``tokens``; padded on the right."""
    of_media = batch.modality == MODALITIES[modality]
    place = (of_media.cumsum(1) - 1) % tokens  # of a position inside its item
    repeats = torch.where(of_media, (place < count).long(), batch.attention_mask.long())
    repeats += (of_media & (place == 0)) * max(count - tokens, 0)
    rows = [torch.arange(len(r), device=r.device).repeat_interleave(r) for r in repeats]
    width = max(len(row) for row in rows)

    def taken(values: Tensor, fill: int | bool) -> Tensor:
        return torch.stack(
            [F.pad(v[row], (0, width - len(row)), value=fill) for v, row in zip(values, rows, strict=True)]
        )

    return replace(
        batch,
        input_ids=taken(batch.input_ids, pad_id),
        labels=taken(batch.labels, IGNORE_INDEX),
        attention_mask=taken(batch.attention_mask, False),
        modality=taken(batch.modality, TEXT),
        role=taken(batch.role, PAD),
        left_padded=False,
    )


@contextmanager
def resized(model: MultimodalModel, modality: str, count: int) -> Iterator[None]:
    """Give the model another number of tokens an item of one modality; as before afterwards."""
    tokens, projector = model.tokens_per_item[modality], model.projectors[modality]
    model.projectors[modality] = Resized(projector, tokens, count).train(projector.training)
    model.tokens_per_item[modality] = count
    try:
        yield
    finally:
        model.projectors[modality] = projector
        model.tokens_per_item[modality] = tokens


@register("scale_slope")
class ScaleSlope(Metric):
    """Slope of log MDI on log n, n the number of media tokens, with an intercept for each sample; OLS over samples and scales.

    Source: the scaling paradox of arXiv 2508.10552's MDI, stated as two null models (see this module). 0: attention a token
    does not depend on n; 1: the medium keeps a constant share. Any real number; NaN where fewer than two different n occur.

    An encoder gives a fixed number of tokens an item, so n is varied behind the projector: neighbouring tokens are averaged
    (scales below 1, as of a smaller picture) or repeated (above 1). What follows moves closer or further. It cannot tell what
    another encoder, or the same one at another input resolution, would give, nor whether the media are used. 0 and 1 are exact
    for one head and row; means over heads and rows that differ lie in between or beside.

    Keys, by modality: ``scale_slope/vision`` (mean over layers), ``/layer_NN``, ``/tokens_min`` and ``/tokens_max`` (means over
    samples), ``/samples``, ``/undefined`` ((sample, scale, layer) values left out, by reason of ``lmar.REASONS``). It costs one
    forward for each scale and modality.

    Args:
        scales: how many tokens to give, as parts of the model's own number; at least two that differ.

    Raises:
        ValueError: fewer than two scales, or one that is not positive.
    """

    teacher_forced = True

    def __init__(self, scales: list[float] | None = None) -> None:
        self.scales = [0.25, 0.5625, 1.0] if scales is None else scales
        if len(set(self.scales)) < 2 or min(self.scales) <= 0:
            raise ValueError(f"scales: {self.scales} has no slope; give two or more different numbers above 0")
        self.layers: tuple[int, ...] = ()
        self.x: dict[str, list[Tensor]] = {}  # by modality: [K, B], log n
        self.y: dict[str, list[Tensor]] = {}  # by modality: [K, L, B], log MDI
        self.reasons: Counter[str] = Counter()

    def update(self, model: MultimodalModel, batch: Batch, output: Output) -> None:
        """Run the batch once for each scale and modality that it carries.

        Raises:
            ConfigError: attention cannot be observed, or a scaled row is longer than the backbone allows.
        """
        for modality in model.tokens_per_item:
            if batch.media[modality].shape[0]:
                points = [self._point(model, batch, modality, scale) for scale in self.scales]
                self.x.setdefault(modality, []).append(torch.stack([x for x, _ in points]))
                self.y.setdefault(modality, []).append(torch.stack([y for _, y in points]))

    def _point(self, model: MultimodalModel, batch: Batch, modality: str, scale: float) -> tuple[Tensor, Tensor]:
        """log n [B] and log MDI [L, B] at one scale."""
        tokens = model.tokens_per_item[modality]
        count = scaled(tokens, scale)
        pad_id = model.backbone.tokenizer.pad_token_id
        changed = with_tokens(batch, modality, tokens, count, 0 if pad_id is None else int(pad_id))
        limit, width = model.backbone.max_positions, changed.input_ids.shape[1]
        if limit is not None and width > limit:
            raise ConfigError(
                f"scales: {scale} makes a row of {width} tokens but the backbone takes {limit}; choose smaller ones"
            )
        with resized(model, modality, count), observe(model) as recorder:
            model(changed)
        stats = recorder.stats()
        self.layers = stats.layers
        parts = lmar.per_token(stats, modality, ("system", "user"))
        y = lmar.log_mdi(parts)
        for code, number in zip(*(t.tolist() for t in parts.reason[y.isnan()].unique(return_counts=True)), strict=True):
            self.reasons[f"{modality}/undefined/{lmar.REASONS[code - 1]}"] += number
            self.reasons[f"{modality}/undefined"] += number
        return parts.n_media.nanmean(0).log().cpu(), y.cpu()

    def compute(self) -> dict[str, float]:
        """The slopes; NaN under ``scale_slope`` where no sample carried media."""
        result: dict[str, float] = {}
        for modality in self.x:
            x, y = torch.cat(self.x[modality], 1).T, torch.cat(self.y[modality], 2)  # [N, K], [K, L, N]
            slopes = [fixed_effects_slope(x, y[:, number].T) for number in range(len(self.layers))]
            key = f"scale_slope/{modality}"
            defined = [slope for slope in slopes if not math.isnan(slope)]
            result[key] = sum(defined) / len(defined) if defined else math.nan
            result |= {f"{key}/layer_{n:02d}": slope for n, slope in zip(self.layers, slopes, strict=True)}
            result |= self._facts(key, modality, x, y)
        return result or {"scale_slope": math.nan}

    def _facts(self, key: str, modality: str, x: Tensor, y: Tensor) -> dict[str, float]:
        there = x[~x.isnan().any(1)].exp()
        low, high = (float(there.amin(1).mean()), float(there.amax(1).mean())) if len(there) else (math.nan, math.nan)
        counts = {f"scale_slope/{name}": float(n) for name, n in self.reasons.items() if name.startswith(modality)}
        samples = float((~y.isnan()).any(0).any(0).sum())
        return {
            f"{key}/tokens_min": low,
            f"{key}/tokens_max": high,
            f"{key}/samples": samples,
            f"{key}/undefined": 0.0,
            **counts,
        }
