"""Steps on packed rows against steps on the same batches padded: useful tokens per second on lengths with a long tail.

With the share p of padding in the padded batches, no packing can be faster than 1 / (1 - p) where time goes by the token; attention
goes by the token's row, so a step may even beat that. Both sides share the weights and take turns, batch by batch.
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace
from typing import Any

import torch

from benchmarks.harness import Result, Row, Spread
from benchmarks.tuning import mean_loss, sizes, stepper, turns
from mllm_factory import Batch, Message, Sample
from mllm_factory.assemble import build_collator, build_model

MARK = 0.9
SAME = 1e-5
BACKBONE, TINY = (
    {**size, "max_position_embeddings": 1024} for size in (sizes(256, 4, 4, 4, 688), sizes(64, 2, 4, 4, 128))
)
LONGEST = 500


def conversations(n: int, seed: int) -> list[Sample]:
    """Questions of log-normal length (median 40 bytes, one in a hundred above 400) and short answers."""
    draw = random.Random(seed)
    lengths = [min(LONGEST, math.ceil(math.exp(draw.gauss(math.log(40), 1.0)))) for _ in range(n)]
    words = [" ".join("the shape" for _ in range(k // 10 + 1))[:k] or "a" for k in lengths]
    return [Sample(str(i), (Message("user", text), Message("assistant", "blue"))) for i, text in enumerate(words)]


def tree(backbone: dict[str, Any]) -> dict[str, Any]:
    """A language model that learns everything."""
    return {
        "seed": 0,
        "backbone": {"name": "hf", "architecture": "llama", "sizes": backbone, "tokenizer": "bytes"},
        "tuning": {"backbone": {"name": "full"}},
        "data": {"max_length": 1024},
    }


def run(runs: int | None, small: bool) -> Result:
    """A run is a step on each of the batches with both sides."""
    runs, batches, rows = (runs or 1, 2, 8) if small else (runs or 5, 4, 32)
    node = tree(TINY if small else BACKBONE)
    model = build_model(node)
    collator = build_collator(node, model).for_training(packing=True)
    packed = [collator(conversations(rows, seed)) for seed in range(batches)]
    result = Result("packing", "the same batches padded")
    _compare_losses(result, model, packed[0])
    ours: list[list[tuple[float, float]]] = [[] for _ in range(runs)]
    other: list[list[tuple[float, float]]] = [[] for _ in range(runs)]
    twin = copy.deepcopy(model)
    for batch in packed:
        padded = replace(batch, packing=None)
        ahead = stepper(lambda batch=batch: mean_loss(model, batch), model)  # type: ignore[misc]
        behind = stepper(lambda batch=padded: mean_loss(twin, batch), twin)  # type: ignore[misc]
        for i, (a, b) in enumerate(zip(*turns(ahead, behind, runs), strict=True)):
            ours[i].append(a)
            other[i].append(b)
    tokens = sum(int(batch.attention_mask.sum()) for batch in packed)
    padding = 1 - tokens / sum(batch.attention_mask.numel() for batch in packed)
    area = sum(batch.packing.source.numel() for batch in packed if batch.packing is not None)
    for unit, k, mark in (("tokens/s", 0, MARK), ("tokens a CPU second", 1, None)):
        mine, theirs = ([1e3 * tokens / sum(t[k] for t in run) for run in side] for side in (ours, other))
        gains = Spread.of([(a / b) * (1 - padding) for a, b in zip(mine, theirs, strict=True)])
        result.rows.append(
            Row(
                "packed, gain as a part of 1 / (1 - padding)",
                unit,
                Spread.of(mine),
                Spread.of(theirs),
                gains,
                ">=",
                mark,
            )
        )
    result.facts |= {
        "padding": padding,
        "bound 1 / (1 - padding)": 1 / (1 - padding),
        "unused places of packed rows": 1 - tokens / area,
        "rows x tokens, padded": [list(batch.input_ids.shape) for batch in packed],
        "rows x tokens, packed": [list(batch.packing.source.shape) for batch in packed if batch.packing is not None],
    }
    return result


def _compare_losses(result: Result, model: Any, batch: Batch) -> None:
    """One batch, both ways."""
    with torch.no_grad():
        mine, theirs = (float(model(b).loss_sum) for b in (batch, replace(batch, packing=None)))
    result.facts["loss"] = {"ours": mine, "other": theirs, "difference": abs(mine / theirs - 1)}
    result.checks[f"losses equal to {SAME:g}"] = abs(mine / theirs - 1) <= SAME
