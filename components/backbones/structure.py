"""Where a language model of transformers keeps its decoder and its decoder layers, and whether they may be used one by one.

Nothing is looked up by model name: the decoder is the first of ``get_decoder()``, ``base_model`` and the model's own children in which
a list of ``num_hidden_layers`` modules is found; and before the first use the parts are compared with the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from mllm_factory import Backbone, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEAR = {torch.float32: 1e-4}
"""Largest difference between parts and whole, relative to the largest score; 5e-2 for other types."""


def parts_of(model: PreTrainedModel) -> tuple[str, str]:
    """The names of the decoder and of its list of layers.

    Raises:
        ValueError: no candidate holds such a list, or it would be empty.
    """
    names = {id(module): name for name, module in model.named_modules()}
    count = model.config.get_text_config().num_hidden_layers
    if count < 1:
        raise ValueError(f"sizes: {count} decoder layers make no language model; use 1 or more")
    for decoder in _candidates(model):
        if not names.get(id(decoder)):  # the model itself, which would include its head
            continue
        for module in decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return names[id(decoder)], names[id(module)]
    raise ValueError(
        f"architecture: {type(model).__name__} keeps no list of its {count} decoder layers, so it cannot be a backbone"
    )


def _candidates(model: PreTrainedModel) -> Iterator[nn.Module]:
    """What may be the decoder, the likeliest first."""
    yield model.get_decoder()
    yield model.base_model  # where get_decoder() names something else, as ModernBERT's head
    yield from model.children()  # where neither leads anywhere, as in Llama 4


@torch.no_grad()
def check_parts(model: PreTrainedModel, backbone: Backbone) -> None:
    """Refuse an architecture whose parts used one by one give something else than the whole, or that looks ahead.

    One token through ``backbone`` is compared with the first of three tokens through ``model``.

    Raises:
        ValueError: they differ, or these sizes do not run.
    """
    training, ids = backbone.training, torch.arange(3)[None]
    backbone.eval()
    kind = type(model).__name__
    try:
        whole = model(input_ids=ids, use_cache=False).logits[:, :1].float()
        parts = backbone.logits(backbone(backbone.embed(ids[:, :1]))).float()
    except Exception as error:
        reason = one_line(error, 200)
        raise ValueError(
            f"architecture: {kind} with these sizes cannot be a backbone ({type(error).__name__}: {reason})"
        ) from error
    finally:
        backbone.train(training)
    bound = NEAR.get(model.dtype, 5e-2) * float(whole.abs().max())
    if not torch.allclose(parts, whole, rtol=0, atol=bound):
        raise ValueError(
            f"architecture: {kind} cannot be a backbone: it looks ahead, or treats embeddings or scores in a way of its own"
        )
