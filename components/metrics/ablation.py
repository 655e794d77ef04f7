"""How much the answers depend on each modality: the score again with its items exchanged between samples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
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
        identity: [n] int64, equal for items that must not replace each other.
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


def identities(items: Tensor, row: Tensor) -> Tensor:
    """[n, *item_shape], [n] -> [n] int64, equal for items that show the same or belong to the same sample, directly or in a chain."""
    content = items.flatten(1).unique(dim=0, return_inverse=True)[1].cpu()
    label = torch.arange(len(items))
    while True:
        before = label
        for group in (content, row.cpu()):
            smallest = torch.full((int(group.max()) + 1,), len(items)).scatter_reduce(0, group, label, "amin")
            label = smallest[group]
        if torch.equal(label, before):
            return label


def select(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch with their items."""
    at = torch.tensor(list(rows), device=batch.input_ids.device)
    place = torch.full((len(batch.input_ids),), -1, device=at.device).index_put(
        (at,), torch.arange(len(at), device=at.device)
    )
    media, media_row = {}, {}
    for name, row in batch.media_row.items():
        kept = place[row] >= 0
        media[name], media_row[name] = batch.media[name][kept], place[row][kept]
    return replace(
        batch,
        **{name: getattr(batch, name)[at] for name in ("input_ids", "labels", "attention_mask", "modality", "role")},
        media=media,
        media_row=media_row,
        ids=tuple(batch.ids[i] for i in rows),
        references=tuple(batch.references[i] for i in rows),
    )


@register("ablation")
class Ablation(Metric):
    """The score with each modality's items exchanged between the samples of a batch, one modality at a time.

    Everything else stays: the question, the number of tokens, the statistics of the items. An item is never replaced by one
    that shows the same, nor by one of its own sample. What the score loses is what the answers owe to that modality; a score
    near the full one means that the model does not look (or listen). It cannot tell whether the modality was needed for the
    task. Samples without items of a modality do not enter its score.

    Keys: ``ablation/<modality>/<key of the score>``; ``ablation/<modality>/samples``, how many entered; and
    ``ablation/<modality>/skipped``, how many did not because their batch allowed no exchange.

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
        for modality in batch.media:
            rows = sorted(set(batch.media_row[modality].tolist()))
            if not rows:
                continue
            score = self.scores.setdefault(modality, copy.deepcopy(self.empty))
            carrying = select(batch, rows)
            items = carrying.media[modality]
            moved = derangement(identities(items, carrying.media_row[modality]), self.generator)
            counts = self.seen if moved is not None else self.skipped
            counts[modality] = counts.get(modality, 0) + len(rows)
            if moved is not None:
                exchanged = replace(carrying, media={**carrying.media, modality: items[moved.to(items.device)]})
                score.update(model, exchanged, Output(texts=model.generate(exchanged, self.max_new_tokens)))

    def compute(self) -> dict[str, float]:
        """The score of each modality seen, and the counts."""
        result: dict[str, float] = {}
        for modality, score in self.scores.items():
            result |= {f"ablation/{modality}/{key}": value for key, value in score.compute().items()}
            result[f"ablation/{modality}/samples"] = float(self.seen.get(modality, 0))
            result[f"ablation/{modality}/skipped"] = float(self.skipped.get(modality, 0))
        return result
