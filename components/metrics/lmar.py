"""The formulas on attention statistics: share, LMAR, MDI and AEI, for one sample and layer each.

LMAR is equation 2 of MoReS (arXiv 2412.12359, section 3); MDI and AEI are those of arXiv 2508.10552. With the same keys and
the same order of averaging LMAR = 1 / MDI for one sample and layer; averaged over samples they differ, as a mean of ratios and
a geometric mean do.

Letters: L layers, B samples, R wanted rows, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mllm_factory.components.metrics.attention_capture import AttentionStats
from mllm_factory.components.metrics.attention_groups import GROUPS

REASONS = ("no_media", "no_answer", "out_of_sight", "no_text", "zero_text", "zero_media")
"""Why a value is undefined: the sample has no item of the modality; no row predicts an answer token; no such row sees the
items (they left a sliding window); there is no key of the text groups; text, or media, get no mass at all."""


def shares(stats: AttentionStats) -> Tensor:
    """[L, B, G], the mass of each group, mean over heads, then over wanted rows; NaN for a sample without such a row.

    Range [0, 1]; over the groups it sums to 1 - the mean of ``stats.null``.
    """
    valid = stats.valid[None, :, :, None]
    return (stats.rows * valid).sum(2) / valid.sum(2)


def head_shares(stats: AttentionStats) -> Tensor:
    """[L, H, B, G], the same for each head."""
    return stats.mass.sum(3) / stats.count.sum(1)[None, None, :, None]


@dataclass(frozen=True)
class PerToken:
    """Mean attention of a key, for the keys of one modality and for those of the text; NaN where undefined.

    Attributes:
        media, text: [L, B] mean over rows of (mass / visible keys), over the rows that see keys of both kinds.
        n_media, n_text: [L, B] visible keys, mean over those rows.
        reason: [L, B] int64, 0 where both are defined, else 1 + the place in ``REASONS``.
    """

    media: Tensor
    text: Tensor
    n_media: Tensor
    n_text: Tensor
    reason: Tensor


def per_token(stats: AttentionStats, modality: str, text: Sequence[str]) -> PerToken:
    """alpha_m = mean over rows of (1 / n_m(i)) sum_{j in m} A[i, j], heads averaged first.

    ``text`` names the groups that count as text. A row counts if it sees both kinds, so uniform attention gives the same
    value for both whatever their sizes.
    """
    m, t = GROUPS.index(modality), [GROUPS.index(name) for name in text]
    mass = torch.stack([stats.rows[..., m], stats.rows[..., t].sum(-1)])  # [2, L, B, R]
    n = torch.stack([stats.visible[..., m], stats.visible[..., t].sum(-1)])
    valid = stats.valid[None]  # [1, B, R]
    both = (valid & (n > 0).all(0)).float()  # [L, B, R]
    rows = both.sum(-1)  # [L, B]; 0 makes NaN of what follows
    alpha = (mass / n.clamp(min=1) * both).sum(-1) / rows
    media, words = alpha
    n_media, n_text = (n * both).sum(-1) / rows
    carried = stats.size[:, m] > 0  # [B]
    reason = torch.zeros_like(rows, dtype=torch.long)
    for name, where in (
        ("zero_media", media == 0),
        ("zero_text", words == 0),
        ("no_text", ~((n[1] > 0) & valid).any(-1)),
        ("out_of_sight", ~((n[0] > 0) & valid).any(-1)),
        ("no_answer", ~valid.any(-1).expand_as(reason)),
        ("no_media", ~carried.expand_as(reason)),
    ):  # the last that holds is the one to tell
        reason = reason.masked_fill(where, 1 + REASONS.index(name))
    return PerToken(media, words, n_media, n_text, reason)


def lmar(parts: PerToken) -> Tensor:
    """[L, B] LMAR = alpha_media / alpha_text of a sample, in [0, inf); NaN where there is no text or it gets no mass.

    1: a media token gets as much attention as a text token. Equation 2 averages it over samples (a mean of ratios).
    """
    return parts.media / parts.text.masked_fill(parts.text == 0, torch.nan)


def log_mdi(parts: PerToken) -> Tensor:
    """[L, B] log MDI = log alpha_text - log alpha_media, any real number; NaN where either is undefined or 0.

    Positive: a text token gets more attention than a media token.
    """
    return _log(parts.text) - _log(parts.media)


def log_aei(parts: PerToken) -> tuple[Tensor, Tensor]:
    """[L, B] each: log AEI of the text and of the media.

    AEI_m = P_m / Q_m, the part of the attention over the part of the tokens, with text and media as the whole. It follows
    from MDI and the part Q_T of text tokens: AEI_T = MDI / (1 + Q_T (MDI - 1)) and AEI_O = AEI_T / MDI.
    """
    mdi = log_mdi(parts)
    q = parts.n_text / (parts.n_text + parts.n_media)
    text = mdi - torch.log1p(q * torch.expm1(mdi))
    return text, text - mdi


def _log(alpha: Tensor) -> Tensor:
    return alpha.masked_fill(alpha <= 0, torch.nan).log()
