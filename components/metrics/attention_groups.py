"""Which group a position of a batch belongs to, and which positions predict an answer.

The groups of attention statistics come from the batch's own maps, made where the conversation is rendered, so they hold for
any template, any number of media items and padding on either side. Rules: reference of the capture of attention in
"Capture contract" of docs/imbalance.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mllm_factory import ASSISTANT, AUDIO, IGNORE_INDEX, PAD, SYSTEM, USER, VISION, Batch

GROUPS = ("system", "user", "vision", "audio", "answer", "bos")
"""The groups by code: ``system`` holds the system prompt and the template's words, ``user`` the texts of the user, ``answer``
the texts of every assistant turn. Media count as media, whoever sent them."""

NOBODY = len(GROUPS)
"""Code of padding, which belongs to no group."""

ANSWER = GROUPS.index("answer")

_OF_ROLE = {SYSTEM: "system", USER: "user", ASSISTANT: "answer"}
_OF_MODALITY = {VISION: "vision", AUDIO: "audio"}


def key_groups(batch: Batch, bos_id: int | None) -> Tensor:
    """[B, T] int64, each position's code in ``GROUPS``, or ``NOBODY`` on padding.

    Args:
        batch: its maps are read.
        bos_id: the tokenizer's first token. Where a row's first position that is no padding holds it, that position is
            ``bos``: much attention rests there whatever the row says.
    """
    groups = torch.full_like(batch.role, NOBODY)
    for role, name in _OF_ROLE.items():
        groups[batch.role == role] = GROUPS.index(name)
    for code, name in _OF_MODALITY.items():
        groups[batch.modality == code] = GROUPS.index(name)
    if bos_id is not None and batch.input_ids.shape[1]:
        first = batch.attention_mask.int().argmax(1, keepdim=True)  # [B, 1]
        starts = (batch.input_ids.gather(1, first) == bos_id) & (batch.modality.gather(1, first) == 0)
        groups.scatter_(1, first, groups.gather(1, first).masked_fill(starts, GROUPS.index("bos")))
    return groups.masked_fill(~batch.attention_mask, NOBODY)


def answer_rows(batch: Batch) -> Tensor:
    """[B, T] bool: positions that predict an answer token, that is, whose next position carries a label.

    With a prompt of P tokens and an answer of Y they are P - 1 ... P + Y - 2. In a batch without any label (prompts, to be
    continued by generation) it is the last token of each row.
    """
    there = batch.role != PAD
    labelled = batch.labels[:, 1:] != IGNORE_INDEX
    if bool(labelled.any()):
        return torch.nn.functional.pad(labelled, (0, 1)) & there
    after = torch.nn.functional.pad(there[:, 1:], (0, 1))
    return there & ~after


def query_groups(groups: Tensor, predicts: Tensor) -> Tensor:
    """[B, T], [B, T] -> [B, T]: a row's group as a query, ``answer`` where it predicts an answer token, else its own.

    The row that predicts an answer's first token is a word of the template, and an answer's last token predicts nothing.
    """
    return groups.masked_fill(predicts, ANSWER)
