"""Whether a backbone can attend to a prefix: its decoder by structure, its caches by transformers' own choice, then a trial.

The trial asks the decoder about tokens of which the first two are given as a prefix, filled with the keys and values that it
computed for them. Hidden states must be those of the whole sequence: a layer that keeps no cache, another shape, positions
taken from elsewhere, or a mask of its own would show.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mllm_factory import Backbone, ConfigError, one_line
from mllm_factory.components.tuning.prefix_keys import Prefix

NEAR = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest difference of the trial, relative to the largest hidden state; 5e-2 for other types."""

KERNELS = ("sdpa", "eager")
"""Attention kernels that a prefix was tried with."""

WAY_OUT = "choose lora or reft, or another backbone"


def decoder_of(part: nn.Module) -> Any:
    """The decoder of transformers that runs a backbone's layers.

    Raises:
        ConfigError: there is none, it takes no cache, or its layers do not keep all that they saw.
    """
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if not isinstance(part, Backbone):
        raise ConfigError(
            f"prefix: {type(part).__name__} is no backbone, and only a backbone attends to what came before; choose frozen, "
            "full or lora for this part"
        )
    around: list[Any] = [
        m
        for m in part.modules()
        if isinstance(m, PreTrainedModel) and any(part.layers is inner for inner in m.modules())
    ]
    if not around:
        raise ConfigError(f"prefix: {type(part).__name__} is no decoder of transformers; {WAY_OUT}")
    decoder, name = around[-1], type(around[-1]).__name__
    takes = inspect.signature(decoder.forward).parameters
    if missing := [word for word in ("past_key_values", "position_ids", "attention_mask") if word not in takes]:
        raise ConfigError(f"prefix: {name} takes no {missing[0]}, so nothing can stand in front; {WAY_OUT}")
    layers = DynamicCache(config=decoder.config).layers
    if other := sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}):
        raise ConfigError(
            f"prefix: {name} has layers that do not keep all keys ({', '.join(other)}), so the prefix would fall out; {WAY_OUT}"
        )
    if decoder.config._attn_implementation not in KERNELS:
        raise ConfigError(
            f"prefix: attention kernel '{decoder.config._attn_implementation}' is not among those that a prefix was tried with; "
            f"set backbone.attention to {' or '.join(KERNELS)}"
        )
    return decoder


def shape_of(config: Any) -> tuple[int, int, int]:
    """L, Hkv and d of a decoder, as its config says."""
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return config.num_hidden_layers, shared, getattr(config, "head_dim", None) or config.hidden_size // heads


@contextmanager
def quiet(part: nn.Module) -> Iterator[None]:
    """Inside, a part is in eval mode and no graph is made."""
    modes = {module: module.training for module in part.modules()}
    part.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def computed(decoder: Any, embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [L, Hkv, P, d] that a decoder computes for one row of embeddings [1, P, D] at positions [1, P].

    Raises:
        ConfigError: they have no such shape.
    """
    made = decoder(inputs_embeds=embeds, position_ids=positions, use_cache=True).past_key_values
    L, Hkv, d = shape_of(decoder.config)
    wanted = (1, Hkv, embeds.shape[1], d)
    pairs = [(layer.keys, layer.values) for layer in made.layers]
    odd = [tensor for pair in pairs for tensor in pair if tensor is None or tensor.shape != wanted]
    if odd or len(pairs) != L:
        found = f"{len(pairs)} layers" if not odd else "none" if odd[0] is None else f"{[*odd[0].shape]}"
        raise ConfigError(
            f"prefix: {type(decoder).__name__} keeps keys or values of another shape than its config says ({found}, not "
            f"{[*wanted]} in each of {L} layers); {WAY_OUT}"
        )
    return torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs])


def require_attended(part: Backbone, decoder: Any) -> None:
    """Make the trial.

    Raises:
        ConfigError: the hidden states differ, or it does not run.
    """
    device, name = next(part.parameters()).device, type(decoder).__name__
    ids = (torch.arange(5, device=device) * 7 + 3)[None] % len(part.tokenizer)
    positions = torch.arange(5, device=device)[None]
    handles: list[Any] = []
    with quiet(part):
        try:
            embeds = part.embed(ids)
            whole = decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state[:, 2:]
            front = Prefix(*computed(decoder, embeds[:, :2], positions[:, :2]), decoder)
            handles = front.attach(decoder)
            given = {
                "attention_mask": torch.ones_like(ids[:, 2:]),
                "position_ids": positions[:, 2:],
                "use_cache": False,
            }
            rest = decoder(inputs_embeds=embeds[:, 2:], **given)
        except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
            raise ConfigError(f"prefix: {name} does not run behind one ({one_line(error, 200)}); {WAY_OUT}") from error
        finally:
            for handle in handles:
                handle.remove()
    gap, size = float((rest.last_hidden_state - whole).abs().max()), float(whole.abs().max())
    if not gap <= NEAR.get(whole.dtype, 5e-2) * size:
        raise ConfigError(
            f"prefix: {name} does not attend to keys in front as to tokens: hidden states differ by {gap / size:.1g} of the "
            f"largest; {WAY_OUT}"
        )
