"""Learned keys and values in front of what a decoder attends to, and how they get there: hooks that live as long as the model.

A pre-hook on the decoder hands it a cache of transformers that already holds them. So no layer changes, hidden states stay
[B, T, D], and only keys and masks are P wider. Where nothing is to be kept the cache forgets what passes: a layer that runs
again in the backward pass (gradient checkpointing) finds what it found before.

Letters: L layers, P keys in front, Hkv key heads, d width of a head, B rows, T tokens, K tokens seen before, D width.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mllm_factory import ConfigError


class Prefix(nn.Module):
    """Keys and values in front of each layer's own; a child of the backbone. They pass behind the rotary embedding.

    Args:
        keys: [L, Hkv, P, d] at the start.
        values: [L, Hkv, P, d] at the start.
        decoder: the decoder of transformers that runs the layers.

    Attributes:
        keys_in_front: P; statistics of attention read it.
        names: arguments of the decoder's ``forward`` in order.
    """

    def __init__(self, keys: Tensor, values: Tensor, decoder: nn.Module) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(keys.float()), nn.Parameter(values.float())
        self.keys_in_front = keys.shape[2]
        self.names = tuple(inspect.signature(decoder.forward).parameters)

    def before(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of the decoder: a cache that starts with the prefix, a mask that shows it, positions that do not count it.

        Raises:
            ConfigError: a cache that does not start with a prefix, or a mask that is not [B, K + T].
        """
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tokens = given.get("inputs_embeds")
        tokens = given["input_ids"] if tokens is None else tokens
        keeps = given.get("use_cache")
        given["use_cache"] = bool(decoder.config.use_cache if keeps is None else keeps)
        if given.get("past_key_values") is None:
            given["past_key_values"] = _kind()(self.keys.unbind(), self.values.unbind(), given["use_cache"])
        elif not isinstance(given["past_key_values"], _kind()):
            raise ConfigError(
                "prefix: a cache was given that does not start with the prefix; give none, or one it made"
            )
        seen = given["past_key_values"].get_seq_length() - self.keys_in_front
        self._show(given, seen, tokens.shape[0], tokens.shape[1], tokens.device)
        return (), given

    def _show(self, given: dict[str, Any], seen: int, B: int, T: int, device: torch.device) -> None:
        """Set ``position_ids`` and ``attention_mask``; K is ``seen``. Positions without a mask are those of packed rows."""
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is None and positions is not None and not seen:
            given["attention_mask"] = apart(positions.expand(B, -1), self.keys_in_front, given)
            return
        if positions is None:
            counted = torch.arange(seen + T, device=device)[None] if mask is None else (mask.long().cumsum(1) - 1)
            given["position_ids"] = counted.clamp(min=0)[:, -T:]
        if mask is None:
            return
        if mask.shape != (B, seen + T):
            raise ConfigError(f"prefix: a mask of shape {[*mask.shape]} was given; give one of [{B}, {seen + T}]")
        given["attention_mask"] = torch.cat([mask.new_ones(B, self.keys_in_front), mask], 1)

    def after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: where no cache was asked for, none is in the output."""
        if kwargs["use_cache"] or not isinstance(output, dict):
            return output
        kept = {name: value for name, value in output.items() if name != "past_key_values"}
        return type(output)(**kept)

    def attach(self, decoder: nn.Module) -> list[Any]:
        """Put the hooks on a decoder; their handles."""
        before = decoder.register_forward_pre_hook(self.before, with_kwargs=True)
        return [before, decoder.register_forward_hook(self.after, with_kwargs=True)]


def apart(positions: Tensor, front: int, given: dict[str, Any]) -> Tensor:
    """The mask of packed rows, to be added to scores: a sample sees the prefix and itself up to where it is.

    It is made for rows of one sample too: where rows are packed, kernels may take the lack of a mask for plain attention.

    Args:
        positions: [R, T], each sample's counted from its start.
        front: P.
        given: arguments of the decoder; the mask has the dtype of the embeddings.

    Returns:
        [R, 1, T, P + T], 0 or the lowest number.
    """
    sample = nn.functional.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0)).cumsum(1)  # [R, T]
    seen = (sample[:, :, None] == sample[:, None]).tril()
    hidden = nn.functional.pad(~seen, (front, 0))[:, None]
    dtype = given["inputs_embeds"].dtype
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


@cache
def _kind() -> Any:
    """The class of our cache; made here because transformers is loaded where it is used."""
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

    class PrefixLayer(DynamicLayer):
        """A layer's cache [B, Hkv, P + K, d] that holds a prefix [Hkv, P, d] from the start; ``keeps``: and all that passes."""

        def __init__(self, keys: Tensor, values: Tensor, keeps: bool) -> None:
            super().__init__()
            self.front, self.keeps = (keys, values), keeps

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """[B, Hkv, T, d] of new tokens -> [B, Hkv, P + K + T, d] of all."""
            new, whole = (key_states, value_states), []
            for i, held in enumerate((self.keys, self.values)):
                before = self.front[i].to(new[i].dtype).expand(len(new[i]), -1, -1, -1) if held is None else held
                whole.append(torch.cat([before, new[i]], 2))
            if self.keeps:
                self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
                self.keys, self.values = whole
            return whole[0], whole[1]

        def get_seq_length(self) -> int:
            """P + K"""
            return (self.front[0] if self.keys is None else self.keys).shape[-2]

    class PrefixCache(DynamicCache):
        """Such a layer for each of the decoder's."""

        def __init__(self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], keeps: bool) -> None:
            Cache.__init__(self, layers=[PrefixLayer(k, v, keeps) for k, v in zip(keys, values, strict=True)])

    return PrefixCache
