"""How much the answers depend on each modality: the score again with its items exchanged between samples."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import torch

from mllm_factory import Batch, Metric, MultimodalModel, Output, register
from mllm_factory.components.metrics import statistics
from mllm_factory.components.metrics.interventions import derangement, digests, identities, select


@register("ablation")
class Ablation(Metric):
    """The score with each modality's items exchanged between the samples of a batch, one modality at a time.

    Everything else stays: the question, the number of tokens, the statistics of the items. An item is never replaced by one
    that shows the same, nor by one of its own sample. What the score loses is what the answers owe to that modality; a score
    near the full one means that the model does not look (or listen). It cannot tell whether the modality was needed for the
    task. Samples without items of a modality do not enter its score.

    Keys: ``ablation/<modality>/<key of the score>``; ``.../drop``, the mean over samples of what each one's score loses, with a
    paired interval ``/low``, ``/high`` that resamples pictures (recordings); ``ablation/<modality>/samples``, how many entered;
    and ``ablation/<modality>/skipped``, how many did not because their batch allowed no exchange.

    Args:
        score: any metric on generated answers.
        seed: of the exchange and of the interval.
        resamples: of the interval.

    Raises:
        ValueError: a score that does not generate, or no resamples.
    """

    def __init__(self, score: Metric, seed: int = 0, resamples: int = 2000) -> None:
        if score.max_new_tokens < 1:
            raise ValueError("the score of an ablation must be a metric on generated answers, such as exact_match")
        if resamples < 1:
            raise ValueError(f"resamples: {resamples} give no interval; use 1 or more, 2000 for reports")
        self.max_new_tokens = score.max_new_tokens
        self.empty = score
        self.scores: dict[str, Metric] = {}
        self.seen: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.drops: dict[str, list[dict[str, float]]] = {}  # by modality: a sample's losses by key of the score
        self.shown: dict[str, list[list[str]]] = {}  # by modality: hashes of what each sample shows
        self.seed, self.resamples = seed, resamples
        self.generator = torch.Generator().manual_seed(seed)

    def update(self, model: MultimodalModel, batch: Batch, output: Output) -> None:
        """Answer the batch again, once for each modality it carries."""
        for modality in batch.media:
            rows = sorted(set(batch.media_row[modality].tolist()))
            if not rows:
                continue
            score = self.scores.setdefault(modality, copy.deepcopy(self.empty))
            carrying = select(batch, rows)
            items = carrying.media[modality]
            moved = derangement(identities(items, carrying.media_row[modality]), self.generator)
            counts = self.seen if moved is not None else self.skipped
            counts[modality] += len(rows)
            if moved is not None:
                exchanged = replace(carrying, media={**carrying.media, modality: items[moved.to(items.device)]})
                texts = model.generate(exchanged, self.max_new_tokens)
                score.update(model, exchanged, Output(texts=texts))
                before = [(output.texts or [])[i] for i in rows]
                self._keep(modality, self._each(model, carrying, before), self._each(model, exchanged, texts))
                shown = self.shown.setdefault(modality, [])
                each = [digests(carrying, name) for name in carrying.media]
                shown += [[thing for things in row for thing in things] for row in zip(*each, strict=True)]

    def _each(self, model: MultimodalModel, batch: Batch, texts: list[str]) -> list[dict[str, float]]:
        """The score of every sample alone."""
        found = []
        for i, text in enumerate(texts):
            score = copy.deepcopy(self.empty)
            score.update(model, select(batch, [i]), Output(texts=[text]))
            found.append(score.compute())
        return found

    def _keep(self, modality: str, full: list[dict[str, float]], changed: list[dict[str, float]]) -> None:
        self.drops.setdefault(modality, []).extend(
            {key: a[key] - b[key] for key in b} for a, b in zip(full, changed, strict=True)
        )

    def compute(self) -> dict[str, float]:
        """The score of each modality seen, what it lost, and the counts."""
        result: dict[str, float] = {}
        for modality, score in self.scores.items():
            result |= {f"ablation/{modality}/{key}": value for key, value in score.compute().items()}
            result |= self._lost(modality)
            result[f"ablation/{modality}/samples"] = float(self.seen[modality])
            result[f"ablation/{modality}/skipped"] = float(self.skipped[modality])
        return result

    def _lost(self, modality: str) -> dict[str, float]:
        rows = self.drops.get(modality, [])
        if not rows:
            return {}
        keys = list(rows[0])
        values = torch.tensor([[row[key] for key in keys] for row in rows], dtype=torch.float64)
        draws = statistics.bootstrap(values, statistics.clusters(self.shown[modality]), self.resamples, self.seed)
        low, high = statistics.interval(draws)
        result: dict[str, float] = {}
        for i, key in enumerate(keys):
            name = f"ablation/{modality}/{key}/drop"
            ends = {name: values[:, i].nanmean(), f"{name}/low": low[i], f"{name}/high": high[i]}
            result |= {end: float(value) for end, value in ends.items()}
        return result
