"""The maps that steer: affine edits of a hidden state inside a subspace of rank r, as plain modules.

All of them add R s to a hidden state h [D], with R [D, r] and s [r]:

==============  =====================  ===========  ==========================================================
name            s                      R            source
==============  =====================  ===========  ==========================================================
orthonormal     W h + b - R^T h        R^T R = I    MoReS (arXiv 2412.12359, eq. 3-4, A.4), LoReFT (2404.03592, eq. 2)
none            W h + b - R^T h        free         NoReFT of pyreft; MoReS without orthonormality
untied          W h + b - V h          free         MoReS as its eq. 3-4 are printed: up, down and linear apart
direct          W h + b                free         DiReFT (2404.03592, eq. 3)
constant        b - R^T h              R^T R = I    ConsReFT of pyreft
==============  =====================  ===========  ==========================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Form:
    """How s and R of a map are made.

    Attributes:
        orthonormal: R has orthonormal columns.
        linear: s has the term W h.
        minus: what s subtracts from: ``up`` (R^T h), ``down`` (V h), or nothing.
    """

    orthonormal: bool
    linear: bool
    minus: str


FORMS = {
    "orthonormal": Form(True, True, "up"),
    "none": Form(False, True, "up"),
    "untied": Form(False, True, "down"),
    "direct": Form(False, True, ""),
    "constant": Form(True, False, "up"),
}
"""Every map by its name."""

INITS = ("identity", "random")
SITES = ("update", "state")
"""What dropout acts on: the update R s, or the whole steered state as in the code released with MoReS."""


def orthonormal(A: Tensor) -> Tensor:
    """[D, r] -> [D, r], an orthonormal basis of the columns: A / ||A|| for r = 1, else Q of the thin A = Q T, diag T > 0.

    The signs make Q unique and smooth in A; columns that are orthonormal already are returned as they are, up to rounding.
    The length of A has no influence, so weight decay cannot bend R.
    """
    if A.shape[1] == 1:
        return A / A.norm()
    Q, T = torch.linalg.qr(A)
    return Q * torch.where(T.diagonal() < 0, -1.0, 1.0)


class LowRankMap(nn.Module):
    """h' = h + R (M h + b), with M = W - R^T, W - V, W or -R^T by the form; computed in float32.

    Parameters: ``base`` [D, r] (R, or the free matrix whose basis R is), ``weight`` W [r, D], ``bias`` b [r], ``down`` V
    [r, D]. There is no buffer, and no random number is drawn but by dropout in training.

    ``identity``: s = 0 for every h (W = R^T, V or 0; b = 0), so that h' = h exactly. ``random``: W and b uniform in
    +-1/sqrt(D), as of a linear layer. R is a random orthonormal basis in both cases.

    Args:
        dim: D.
        rank: r.
        form: of ``FORMS``.
        init: ``identity`` or ``random``.
        dropout: probability, in training only.
        dropout_on: ``update`` or ``state``.
        device: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        form: Form,
        init: str = "identity",
        dropout: float = 0.0,
        dropout_on: str = "update",
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.form, self.dropout, self.dropout_on = form, dropout, dropout_on
        start = torch.randn(dim, rank, device=device, dtype=torch.float32)
        self.base = nn.Parameter(orthonormal(start).contiguous())
        self.bias = nn.Parameter(torch.zeros(rank, device=device, dtype=torch.float32))
        if form.minus == "down":
            down = torch.empty(rank, dim, device=device, dtype=torch.float32)
            self.down = nn.Parameter(down.uniform_(-1 / math.sqrt(dim), 1 / math.sqrt(dim)))
        if form.linear:
            self.weight = nn.Parameter(self._neutral())
        if init == "random":
            self._randomise(1 / math.sqrt(dim))

    @torch.no_grad()
    def _neutral(self) -> Tensor:
        """W that makes s = 0."""
        if self.form.minus == "down":
            return self.down.clone()
        up = self.up().T.contiguous()
        return up.clone() if self.form.minus == "up" else torch.zeros_like(up)

    @torch.no_grad()
    def _randomise(self, bound: float) -> None:
        self.bias.uniform_(-bound, bound)
        if self.form.linear:
            self.weight.uniform_(-bound, bound)

    def up(self) -> Tensor:
        """R [D, r]"""
        base = self.base.float()
        return orthonormal(base) if self.form.orthonormal else base

    def inner(self, R: Tensor) -> Tensor:
        """M [r, D]"""
        if not self.form.linear:
            return -R.T
        W = self.weight.float()
        if self.form.minus == "":
            return W
        return W - (R.T if self.form.minus == "up" else self.down.float())

    def forward(self, h: Tensor) -> Tensor:
        """[n, D] of any dtype -> [n, D] of the same"""
        with torch.autocast(h.device.type, enabled=False):
            x, R = h.float(), self.up()
            update = F.linear(F.linear(x, self.inner(R), self.bias.float()), R)
            if self.dropout_on == "update":
                steered = x + F.dropout(update, self.dropout, self.training)
            else:
                steered = F.dropout(x + update, self.dropout, self.training)
            return steered.to(h.dtype)
