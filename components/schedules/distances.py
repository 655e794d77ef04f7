"""Distances between two distributions over the next token, from logits: the d of CoMMIT (arXiv 2407.20454, eq. 3).

The paper leaves d open. The bound it builds on (eq. 2) needs the triangle inequality, which sqrt_js, tv, hellinger and l2
satisfy and kl does not. ORDER says how d grows with a small step: d ~ |step| ** ORDER[name].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 2**22
"""Numbers in a block of rows: distances are taken in double precision, block by block."""


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


def _js(a: Tensor, b: Tensor) -> Tensor:
    middle = torch.logaddexp(a, b) - math.log(2)
    return (_kl(a, middle) + _kl(b, middle)) / 2


def _root(x: Tensor) -> Tensor:
    return x.clamp_min(1e-30).sqrt()  # where the distributions coincide the root has no gradient


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sqrt_js": lambda a, b: _root(_js(a, b)),
    "kl": _kl,
    "reverse_kl": lambda a, b: _kl(b, a),
    "js": _js,
    "tv": lambda a, b: (a.exp() - b.exp()).abs().sum(-1) / 2,
    "hellinger": lambda a, b: _root(((a / 2).exp() - (b / 2).exp()).square().sum(-1) / 2),
    "l2": lambda a, b: _root((a.exp() - b.exp()).square().sum(-1)),
}
"""Name -> function of log-probabilities [N, V], [N, V] -> [N]. kl is KL(first || second)."""

ORDER = {"sqrt_js": 1, "kl": 2, "reverse_kl": 2, "js": 2, "tv": 1, "hellinger": 1, "l2": 1}
"""Exponent p of d ~ |step| ** p for a small step."""


def distance(name: str, before: Tensor, after: Tensor) -> Tensor:
    """d of each row, [N] float64.

    Args:
        name: key of DISTANCES.
        before, after: logits [N, V] of any precision.
    """
    rows = max(1, ROWS // max(1, before.shape[-1]))
    blocks = zip(before.split(rows), after.split(rows), strict=True)
    found = [DISTANCES[name](a.double().log_softmax(-1), b.double().log_softmax(-1)) for a, b in blocks]
    return torch.cat(found) if found else before.new_zeros(0, dtype=torch.float64)


def sample_sum(tokens: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Mean over the tokens of each sample, then the sum over samples: two samples of different length weigh the same.

    Args:
        tokens: [N] a number of each answer token.
        row: [N] int64, the sample of each token.
        rows: how many samples there may be.

    Returns:
        [] float64 sum, [] float64 number of samples that have a token.
    """
    total = tokens.new_zeros(rows).index_add(0, row, tokens)
    count = tokens.new_zeros(rows).index_add(0, row, torch.ones_like(tokens))
    return (total / count.clamp(min=1)).sum(), (count > 0).sum().to(tokens.dtype)
