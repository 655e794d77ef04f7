"""Intervals and tests for means over samples that share pictures.

The unit of resampling is the cluster: samples that show the same picture, never a question or a token. With and without a
medium share their samples, so differences are analysed. Miller 2024 (arXiv 2411.00640) argues for both.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

LEVEL = 0.95
"""Of every interval."""

_BLOCK = 2**22  # numbers of a block of resamples


def clusters(shared: Sequence[Sequence[Hashable]]) -> Tensor:
    """[N] int64, equal for samples that share something, directly or in a chain; a sample with nothing is one of its own.

    Args:
        shared: what each sample shows, such as hashes of its pictures.
    """
    parent = list(range(len(shared)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[Hashable, int] = {}
    for i, things in enumerate(shared):
        for thing in things:
            parent[root(i)] = root(first.setdefault(thing, i))
    return torch.tensor([root(i) for i in range(len(shared))], dtype=torch.long)


def means(values: Tensor) -> Tensor:
    """[N, M] -> [M], over what is not NaN."""
    return values.nanmean(0)


def bootstrap(values: Tensor, cluster: Tensor, resamples: int, seed: int) -> Tensor:
    """Means over resampled clusters: all M columns on the same resamples, so that functions of them can be resampled too.

    mean*_j = sum_c w_c sum_{i in c} x_ij / sum_c w_c n_cj, w the counts of C draws out of C clusters with replacement.

    Args:
        values: [N, M]; NaN is left out.
        cluster: [N] int64.
        resamples: how many, R.
        seed: of the draws.

    Returns:
        [R, M] float64; NaN in columns with values in fewer than two clusters.
    """
    _, inverse = cluster.unique(return_inverse=True)
    size = int(inverse.max()) + 1 if len(inverse) else 0
    if size < 2:
        return values.new_full((resamples, values.shape[1]), math.nan, dtype=torch.float64)
    there = ~values.isnan()
    sums, counts = torch.zeros(2, size, values.shape[1], dtype=torch.float64)
    sums.index_add_(0, inverse, values.double().nan_to_num(0.0))
    counts.index_add_(0, inverse, there.double())
    generator, blocks, left = torch.Generator().manual_seed(seed), [], resamples
    while left:
        rows = min(left, max(1, _BLOCK // size))
        drawn = torch.randint(size, (rows, size), generator=generator)
        w = torch.zeros(rows, size, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
        blocks.append((w @ sums) / (w @ counts))
        left -= rows
    return torch.cat(blocks).masked_fill((counts > 0).sum(0) < 2, math.nan)


def interval(draws: Tensor) -> tuple[Tensor, Tensor]:
    """[R, M] -> [M] each: the percentiles that hold LEVEL of the resamples between them."""
    tail = (1 - LEVEL) / 2
    low, high = draws.nanquantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype), dim=0)
    return low, high


def wilson(right: float, n: float) -> tuple[float, float]:
    """Interval of a share ``right / n``, for 0 and 1 where resampling gives none (Wilson 1927).

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.96; NaN for n = 0.
    """
    if n <= 0:
        return math.nan, math.nan
    z = 2**0.5 * float(torch.special.erfinv(torch.tensor(LEVEL, dtype=torch.float64)))
    p = right / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    ground = 1 + z * z / n
    return max(0.0, (middle - half) / ground), min(1.0, (middle + half) / ground)


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p of McNemar's test: of b + c samples that changed, b changed one way (McNemar 1947).

    min(1, 2 P(X <= min(b, c))), X ~ Binomial(b + c, 1/2).
    """
    n, term, total = b + c, 1, 0
    for k in range(min(b, c) + 1):
        total += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * total / 2**n)


def sign_flip(differences: Tensor, cluster: Tensor, resamples: int, seed: int) -> float:
    """Two-sided p that the mean of paired differences is 0, each cluster's differences changing their sign together.

    (1 + #{|sum_c e_c d_c| >= |sum_c d_c|}) / (R + 1), e_c = +-1; the smallest p is 1 / (R + 1). NaN without a difference.

    Args:
        differences: [N]; NaN is left out.
        cluster: [N] int64.
    """
    there = ~differences.isnan()
    _, inverse = cluster[there].unique(return_inverse=True)
    if not len(inverse):
        return math.nan
    d = torch.zeros(int(inverse.max()) + 1, dtype=torch.float64).index_add_(0, inverse, differences[there].double())
    generator, extreme, left = torch.Generator().manual_seed(seed), 0, resamples
    limit = abs(float(d.sum())) - 1e-12 * float(d.abs().sum())  # sums in another order still count as equal
    while left:
        rows = min(left, max(1, _BLOCK // len(d)))
        e = 2.0 * torch.randint(2, (rows, len(d)), generator=generator).double() - 1
        extreme += int(((e @ d).abs() >= limit).sum())
        left -= rows
    return (1 + extreme) / (resamples + 1)
