"""Answer tokens under two conditions to numbers of a sample: log-probability, divergence, flips; and Shapley values of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import factorial
from typing import TypeVar

import torch
from torch import Tensor

ROWS = 2**22
"""Numbers in a block of rows, in double precision."""


def js(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two distributions, [N, V], [N, V] -> [N] in [0, ln 2] nats; exactly 0 for equal ones.

    1/2 sum p log(p / m) + 1/2 sum q log(q / m), m = (p + q) / 2.
    """
    m = (p + q) / 2
    m = m.masked_fill(m == 0, 1.0)  # p and q are 0 there too
    return ((torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum(-1) / 2).clamp(min=0.0)


@dataclass
class Scores:
    """The answers of B samples under one condition, [B] float64 each; NaN for a sample without answer tokens.

    Attributes:
        logp: mean over a sample's answer tokens of log p(token | what precedes it), in nats.
        first: the same of the first answer token alone, which no answer prefix can give away.
        right: 1 where every answer token is the likeliest one: greedy decoding would give the reference; else 0.
        js: mean over the answer tokens of the divergence from the full condition.
        js_first: the same of the first.
        flip: 1 where the likeliest token of any answer position differs from the full condition; else 0.
    """

    logp: Tensor
    first: Tensor
    right: Tensor
    js: Tensor
    js_first: Tensor
    flip: Tensor


def score(full: Tensor, other: Tensor, targets: Tensor, row: Tensor, rows: int) -> Scores:
    """Scores under a condition.

    Args:
        full: [N, V] logits of the unchanged batch, at the positions that predict an answer token, row by row.
        other: [N, V] the same under the condition.
        targets: [N] int64, the answer tokens.
        row: [N] int64, the sample of each.
        rows: how many samples, B.
    """
    size = max(1, ROWS // max(1, full.shape[-1]))
    parts = [_tokens(a, b, y) for a, b, y in zip(full.split(size), other.split(size), targets.split(size), strict=True)]
    logp, hit, distance, flip = (torch.cat(found) for found in zip(*parts, strict=True))
    row = row.cpu()
    count = torch.zeros(rows, dtype=torch.float64).index_add_(0, row, torch.ones(len(row), dtype=torch.float64))
    count = count.masked_fill(count == 0, torch.nan)
    start = torch.ones(len(row), dtype=torch.bool)
    start[1:] = row[1:] != row[:-1]

    def added(tokens: Tensor) -> Tensor:
        return torch.zeros(rows, dtype=torch.float64).index_add_(0, row, tokens)

    def firsts(tokens: Tensor) -> Tensor:
        return torch.full((rows,), torch.nan, dtype=torch.float64).index_copy_(0, row[start], tokens[start])

    known = count / count  # 1, or NaN
    return Scores(
        added(logp) / count,
        firsts(logp),
        (added(1 - hit) == 0) * known,
        added(distance) / count,
        firsts(distance),
        (added(flip) > 0) * known,
    )


def _tokens(full: Tensor, other: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[n] float64 each: log p of the target, whether it is the likeliest, JS from the full condition, whether that flips."""
    a, b = full.double().log_softmax(-1), other.double().log_softmax(-1)
    logp = b.gather(1, targets[:, None])[:, 0]
    best = other.argmax(-1)
    found = (logp, best == targets, js(a.exp(), b.exp()), best != full.argmax(-1))
    return tuple(value.double().cpu() for value in found)  # type: ignore[return-value]


# ---------------------------------------------------------------- Shapley

V = TypeVar("V", float, Tensor)
Value = Callable[[frozenset[str]], V]


def _subsets(players: Sequence[str]) -> list[frozenset[str]]:
    return [frozenset(s) for size in range(len(players) + 1) for s in combinations(players, size)]


def shapley(players: Sequence[str], v: Value[V]) -> dict[str, V]:
    """Exact Shapley values (Shapley 1953): phi_i = sum_{S without i} |S|! (n - |S| - 1)! / n! (v(S + i) - v(S)).

    They sum to v(all) - v(nobody).

    Args:
        players: n names.
        v: the value of a coalition; called 2^n times or more, so it should remember.
    """
    n = len(players)
    result: dict[str, V] = {}
    for i in players:
        terms = [
            (v(s | {i}) - v(s)) * (factorial(len(s)) * factorial(n - len(s) - 1) / factorial(n))
            for s in _subsets([p for p in players if p != i])
        ]
        result[i] = sum(terms[1:], start=terms[0])
    return result


def interactions(players: Sequence[str], v: Value[V]) -> dict[tuple[str, str], V]:
    """Shapley interaction index of each pair (Grabisch & Roubens 1999); with two players v(TV) - v(T) - v(V) + v(nobody).

    I_ij = sum_{S without i, j} |S|! (n - |S| - 2)! / (n - 1)! (v(S + ij) - v(S + i) - v(S + j) + v(S)). Positive: both are
    needed (synergy); negative: either would do (redundancy).
    """
    n = len(players)
    result: dict[tuple[str, str], V] = {}
    for i, j in combinations(players, 2):
        terms = [
            (v(s | {i, j}) - v(s | {i}) - v(s | {j}) + v(s))
            * (factorial(len(s)) * factorial(n - len(s) - 2) / factorial(n - 1))
            for s in _subsets([p for p in players if p not in (i, j)])
        ]
        result[i, j] = sum(terms[1:], start=terms[0])
    return result
