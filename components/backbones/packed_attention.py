"""Attention of rows that hold several samples, one sample at a time: what no sample may see is not computed.

transformers keeps packed samples apart by a mask, and the kernel then computes the whole square of a row. On a CPU a call for each
sample costs less: sum over samples of n^2 / 2 scores instead of L^2 a row. A kernel of ours, registered with transformers'
``AttentionInterface``, does that where the layer is given no mask and positions that start again; everything else it hands on to
``sdpa``. So layers that are run again in the backward pass take the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

NAME = "mllm_factory|samples"
_apart: ContextVar[bool] = ContextVar("apart", default=False)


class UnsuitedError(Exception):
    """A layer does not tell its kernel the positions, or wants more of it than attention to what came before."""


def fits(model: Any) -> bool:
    """Whether every layer of a model runs ``sdpa`` over all that came before: no window, no chunks, no mask of its own."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    limited = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return config._attn_implementation in ("sdpa", NAME) and kinds == {"full_attention"} and not limited


def install(model: Any) -> None:
    """Let the model's layers ask for the kernel by its name."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation_internal", None) == "sdpa":
            config._attn_implementation_internal = NAME


@contextmanager
def apart() -> Iterator[None]:
    """Inside, masks are left out: the kernel keeps samples apart by their positions."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def _mask(**given: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    return None if _apart.get() else sdpa_mask(**given)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,  # what the architecture gives its kernel
) -> tuple[Tensor, Tensor | None]:
    """[B, H, T, d], [B, Hkv, T, d] twice -> [B, T, H, d]

    Raises:
        UnsuitedError: samples are to be kept apart but the layer gives no positions, or a bias.
    """
    from transformers.integrations import sdpa_attention

    run: Any = sdpa_attention.sdpa_attention_forward
    positions = options.get("position_ids")
    told = positions is not None and positions.shape == (query.shape[0], query.shape[2])
    if _apart.get() and (not told or options.get("position_bias") is not None):
        raise UnsuitedError
    spans = samples(positions) if positions is not None and told and attention_mask is None else []
    if len(spans) <= query.shape[0]:
        output: tuple[Tensor, Tensor | None] = run(module, query, key, value, attention_mask, **options)
        return output
    lengths = [end - start for _, start, end in spans]
    triples = zip(*(_apiece(tensor, lengths) for tensor in (query, key, value)), strict=True)
    parts = [run(module, *triple, None, **options)[0] for triple in triples]  # [1, n, H, d] each
    return torch.cat(parts, 1).view(query.shape[0], query.shape[2], query.shape[1], -1), None


def _apiece(tensor: Tensor, lengths: list[int]) -> list[Tensor]:
    """[R, H, L, d] -> [1, H, n, d] of each sample; split at once, so that its gradient is put together at once."""
    return [part.transpose(0, 1)[None] for part in tensor.transpose(1, 2).flatten(0, 1).split(lengths)]


def samples(positions: Tensor) -> list[tuple[int, int, int]]:
    """(row, start, end) of each stretch of positions [B, T] that counts from 0."""
    rows, width = positions.shape
    starts = positions == 0
    starts[:, 0] = True
    flat = [*starts.flatten().nonzero()[:, 0].tolist(), rows * width]
    return [(a // width, a % width, a % width + b - a) for a, b in pairwise(flat)]
