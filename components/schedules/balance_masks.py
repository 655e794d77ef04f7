"""What a model answers with one modality only: the responses that OGM-GE and AGM compare.

Those methods were made for parallel branches, each with a prediction of its own. A serial model (encoder -> projector -> LLM)
has none, so a modality is taken away instead, which is our adaptation:

    phi(v, q)    logits at the answer tokens, nothing taken away
    phi(v, 0)    every word of the user replaced by the padding token: the media with a neutral question
    phi(0, q)    every feature of the media replaced by 0: the question alone

The encoder's component (everything before the backbone) stands for v, the LLM's for q. Answers are teacher-forced, so what
their own first tokens tell is in all three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mllm_factory import IGNORE_INDEX, TEXT, USER, Batch, MultimodalModel, TrainState, total
from mllm_factory.components.schedules.balance import Component, partition
from mllm_factory.components.schedules.balance_turns import require_whole
from mllm_factory.components.schedules.distances import sample_sum
from mllm_factory.components.schedules.probe import answer_rows, probing

Score = Callable[[Tensor, Tensor, Tensor, Tensor], Sequence[Tensor]]
"""phi(v, q), phi(v, 0), phi(0, q) [N, V] float32 and labels [N] -> one number a token and modality: media [N], text [N]."""


def two_components(model: MultimodalModel) -> tuple[Component, Component]:
    """The components that stand for media and text: encoder and LLM.

    Raises:
        ConfigError: one of them learns nothing, or weights are sharded.
    """
    encoder, llm = partition(model, None)
    require_whole([*encoder.params, *llm.params])
    return encoder, llm


def without_text(model: MultimodalModel, batch: Batch) -> Batch:
    """The batch with the padding token in the place of every word that the user says."""
    tokenizer = model.backbone.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    words = (batch.modality == TEXT) & (batch.role == USER)
    return replace(batch, input_ids=batch.input_ids.masked_fill(words, pad if pad is not None else 0))


def no_media(model: MultimodalModel, batch: Batch) -> dict[str, Tensor]:
    """Zero features [n, k, D] of every modality."""
    weight = next(model.backbone.parameters())
    return {
        name: weight.new_zeros(len(items), model.tokens_per_item[name], model.backbone.dim)
        for name, items in batch.media.items()
    }


@torch.no_grad()
def responses(model: MultimodalModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """phi(v, q), phi(v, 0) and phi(0, q), [N, V] each: float32, dropout off, nothing of the training touched."""
    with probing(model):
        both = _logits(model, batch, None)
        media = _logits(model, without_text(model, batch), None)
        return both, media, _logits(model, batch, no_media(model, batch))


def _logits(model: MultimodalModel, batch: Batch, features: dict[str, Tensor] | None) -> Tensor:
    logits: Tensor = model(batch, logits=True, features=features).logits
    return logits


def mean_scores(state: TrainState, score: Score) -> tuple[float, float] | None:
    """The score of media and of text: tokens of a sample first, then samples, over all batches and processes of the step.

    Samples without media do not count; None where no sample has any.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=state.world.device)
    for batch in state.batches:
        placed = batch.to(state.world.device)
        row, rows = answer_rows(placed), len(placed.labels)
        labels = placed.labels[:, 1:]
        tokens = score(*responses(state.model, placed), labels[labels != IGNORE_INDEX])
        keep = carrying(placed)[row]
        pairs = [sample_sum(of[keep].double(), row[keep], rows) for of in tokens]
        sums += torch.stack([pairs[0][0], pairs[1][0], pairs[0][1]])
    media, text, samples = total(sums, state.world).tolist()
    return (media / samples, text / samples) if samples else None


def carrying(batch: Batch) -> Tensor:
    """[B] bool: rows that have an item of any modality."""
    found = torch.zeros(len(batch.labels), dtype=torch.bool, device=batch.labels.device)
    for rows in batch.media_row.values():
        found[rows] = True
    return found
