"""How much the answers depend on each modality: the score again with its items exchanged between samples."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from mllm_factory import Batch, Metric, MultimodalModel, Output, register


def derangement(identity: Tensor, generator: torch.Generator) -> Tensor | None:
    """A permutation of n items in which none is replaced by one of the same identity, or None where there is none.

    Items are put in an order in which equal ones are neighbours (the groups shuffled, each group shuffled) and rotated by the
    size of the largest group m: rotating by m leaves every group, as no group is longer, and lands in no group twice if
    2 m <= n.

    Args:
        identity: [n] int64, equal for items that show the same.
        generator: the source of randomness.

    Returns:
        [n] int64, the item that takes each item's place.
    """
    n = identity.numel()
    _, inverse, counts = identity.unique(return_inverse=True, return_counts=True)
    m = int(counts.max()) if n else 0
    if n == 0 or 2 * m > n:
        return None
    group_rank = torch.randperm(counts.numel(), generator=generator)[inverse]
    shuffled = torch.randperm(n, generator=generator)
    order = shuffled[torch.argsort(group_rank[shuffled], stable=True)]
    result = torch.empty_like(order)
    result[order] = order.roll(-m)
    return result


def same_content(items: Tensor) -> Tensor:
    """[n, *item_shape] -> [n] int64, equal for equal items."""
    return items.flatten(1).unique(dim=0, return_inverse=True)[1]


@register("ablation")
class Ablation(Metric):
    """The score with each modality's items exchanged between the samples of a batch, one modality at a time.

    Everything else stays: the question, the number of tokens, the statistics of the items. An item is never replaced by one
    that shows the same, nor (where the batch allows) does a sample keep its own. What the score loses is what the answers
    owe to that modality; a score near the full one means that the model does not look (or listen). It cannot tell whether
    the modality was needed for the task. Samples without items of a modality do not enter its score.

    Keys: ``ablation/<modality>/<key of the score>``, and ``ablation/<modality>/samples``, how many entered.

    Args:
        score: any metric on generated answers.
        seed: of the exchange.

    Raises:
        ValueError: a score that does not generate.
    """

    def __init__(self, score: Metric, seed: int = 0) -> None:
        if score.max_new_tokens < 1:
            raise ValueError("the score of an ablation must be a metric on generated answers, such as exact_match")
        self.max_new_tokens = score.max_new_tokens
        self.empty = score
        self.scores: dict[str, Metric] = {}
        self.seen: dict[str, int] = {}
        self.skipped: dict[str, int] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def update(self, model: MultimodalModel, batch: Batch, output: Output) -> None:
        """Answer the batch again, once for each modality it carries."""
        for modality, items in batch.media.items():
            if len(items) == 0:
                continue
            score = self.scores.setdefault(modality, copy.deepcopy(self.empty))
            rows = sorted(set(batch.media_row[modality].tolist()))
            moved = derangement(same_content(items).cpu(), self.generator)
            if moved is None:
                self.skipped[modality] = self.skipped.get(modality, 0) + len(rows)
                continue
            exchanged = replace(batch, media={**batch.media, modality: items[moved.to(items.device)]})
            texts = model.generate(exchanged, self.max_new_tokens)
            touched = replace(exchanged, references=tuple(batch.references[i] for i in rows))
            score.update(model, touched, Output(texts=[texts[i] for i in rows]))
            self.seen[modality] = self.seen.get(modality, 0) + len(rows)

    def compute(self) -> dict[str, float]:
        """The score of each modality seen; samples whose batch allowed no exchange are counted as ``skipped``."""
        result: dict[str, float] = {}
        for modality, score in self.scores.items():
            result |= {f"ablation/{modality}/{key}": value for key, value in score.compute().items()}
            result[f"ablation/{modality}/samples"] = float(self.seen.get(modality, 0))
            result[f"ablation/{modality}/skipped"] = float(self.skipped.get(modality, 0))
        return result
