"""Per-sample counterfactual values to means with intervals, tests and baselines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm_factory.components.metrics import statistics

SHARES = ("accuracy", "blind_accuracy/", "flip_rate/")
"""How the keys begin that are shares of samples."""


@dataclass
class Row:
    """One sample: its id, reference answer, hashes of its media, number of answer tokens, and its value under each key.

    Keys that begin with ``_`` are for tests and ratios, and are not averaged.
    """

    id: str
    reference: str
    shown: list[str]
    tokens: int
    values: dict[str, float]

    def line(self) -> dict[str, Any]:
        """As a line of a table."""
        what = {"id": self.id, "reference": self.reference, "shown": " ".join(self.shown), "answer_tokens": self.tokens}
        return {**what, **{key: value for key, value in self.values.items() if not key.startswith("_")}}


class _Table:
    """Columns by key, their clusters, and the means of the same resamples for all of them."""

    def __init__(self, rows: Sequence[Row], resamples: int, seed: int) -> None:
        keys = dict.fromkeys(key for row in rows for key in row.values)
        self.keys = {key: i for i, key in enumerate(keys)}
        values = [[row.values.get(key, math.nan) for key in keys] for row in rows]
        self.values = torch.tensor(values, dtype=torch.float64).reshape(len(rows), len(keys))
        self.cluster = statistics.clusters([row.shown for row in rows])
        self.resamples, self.seed = resamples, seed
        self.draws = statistics.bootstrap(self.values, self.cluster, resamples, seed)
        self.means = statistics.means(self.values)

    def column(self, key: str) -> Tensor:
        """[N]; all NaN where the key does not exist."""
        return (
            self.values[:, self.keys[key]] if key in self.keys else self.values.new_full((len(self.values),), math.nan)
        )

    def told(self, key: str) -> dict[str, float]:
        """The mean of a column with its interval."""
        i = self.keys[key]
        low, high = (float(end) for end in statistics.interval(self.draws[:, i : i + 1]))
        mean = float(self.means[i])
        if key.startswith(SHARES) and mean in (0.0, 1.0):
            n = len(self.cluster[~self.column(key).isnan()].unique())
            low, high = statistics.wilson(mean * n, n)
        return _with_interval(key, mean, low, high)

    def derived(self, key: str, of_means: float, of_draws: Tensor) -> dict[str, float]:
        """A function of means, [], with the same function of every resample's means, [R]."""
        low, high = (float(end) for end in statistics.interval(of_draws[:, None]))
        return _with_interval(key, of_means, low, high)


def _with_interval(key: str, value: float, low: float, high: float) -> dict[str, float]:
    return {key: _number(value), f"{key}/low": _number(low), f"{key}/high": _number(high)}


def _number(value: float) -> float:
    return math.nan if math.isnan(value) else float(value)


def summary(rows: Sequence[Row], resamples: int, seed: int) -> dict[str, float]:
    """Means and intervals of every column, tests, shares and baselines."""
    if not rows:
        return {}
    table = _Table(rows, resamples, seed)
    result: dict[str, float] = {}
    for key in table.keys:
        if not key.startswith("_"):
            result |= table.told(key)
    for name, gain in (("vision", "image_gain"), ("audio", "audio_gain")):
        if f"blind_accuracy/{name}/blank" in table.keys:
            result |= _of_modality(table, rows, name, gain)
    result |= _shares(table)
    return {**result, "blind_accuracy/majority": _majority(rows), "clusters": float(len(table.cluster.unique()))}


def _of_modality(table: _Table, rows: Sequence[Row], name: str, gain: str) -> dict[str, float]:
    """Tests, spread over exchanges, the normalised perceptual score and its ceiling."""
    result = {f"{gain}/samples": float((~table.column(gain).isnan()).sum())}
    result[f"{gain}/p"] = _number(statistics.sign_flip(table.column(gain), table.cluster, table.resamples, table.seed))
    full = table.column("accuracy")
    result[f"multimodal_gain/{name}/p"] = _mcnemar(full, table.column(f"blind_accuracy/{name}/blank"))
    result[f"perceptual_score/{name}/p"] = _mcnemar(full, table.column(f"_right/{name}"))
    spread = [table.means[i] for key, i in table.keys.items() if key.startswith(f"_gain/{name}/")]
    if len(spread) > 1:
        result[f"{gain}/draws_sd"] = float(torch.stack(spread).std())
    key = f"perceptual_score/{name}"
    if key in table.keys:
        result |= _normalised(table, key, name)
        entered = (~table.column(key).isnan()).tolist()
        result[f"{key}/ceiling"] = ceiling([row.reference for row, inside in zip(rows, entered, strict=True) if inside])
    return result


def _normalised(table: _Table, key: str, name: str) -> dict[str, float]:
    """(accuracy - accuracy under shuffle) / accuracy over the samples that were exchanged; NaN where accuracy is 0."""
    lost, kept = table.keys[key], table.keys[f"blind_accuracy/{name}/shuffle"]

    def ratio(means: Tensor) -> Tensor:
        accuracy = means[..., lost] + means[..., kept]
        return means[..., lost] / accuracy.masked_fill(accuracy == 0, torch.nan)

    return table.derived(f"{key}/normalised", float(ratio(table.means)), ratio(table.draws))


def _mcnemar(full: Tensor, changed: Tensor) -> float:
    """p that a change of condition changes as many answers to right as to wrong; NaN without a pair."""
    there = ~(full.isnan() | changed.isnan())
    if not bool(there.any()):
        return math.nan
    return statistics.mcnemar(int(((full > changed) & there).sum()), int(((full < changed) & there).sum()))


def ceiling(references: Sequence[str]) -> float:
    """1 - sum_c pi_c^2, how often two random samples have different answers; NaN for none."""
    counts = Counter(references)
    n = sum(counts.values())
    return 1 - sum((k / n) ** 2 for k in counts.values()) if n else math.nan


def _majority(rows: Sequence[Row]) -> float:
    counts: Mapping[str, int] = Counter(row.reference for row in rows)
    return max(counts.values()) / len(rows)


def _shares(table: _Table) -> dict[str, float]:
    """|phi_i| / sum_j |phi_j| of the mean Shapley values; NaN where all are 0."""
    place = {
        key.removeprefix("modality_shapley/"): i
        for key, i in table.keys.items()
        if key.startswith("modality_shapley/") and "total" not in key and not key.endswith("/accuracy")
    }
    if not place:
        return {}
    at = list(place.values())

    def shares(means: Tensor) -> Tensor:
        size = means[..., at].abs()
        whole = size.nansum(-1, keepdim=True)
        return size / whole.masked_fill(whole == 0, torch.nan)

    of_means, of_draws = shares(table.means), shares(table.draws)
    result: dict[str, float] = {}
    for j, name in enumerate(place):
        result |= table.derived(f"modality_shapley/share/{name}", float(of_means[j]), of_draws[:, j])
    return result
