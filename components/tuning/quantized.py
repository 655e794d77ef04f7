"""Frozen linear layers in 8 or 4 bits through bitsandbytes, for QLoRA (arXiv 2305.14314)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from torch import nn

from mllm_factory import on_meta

KINDS = {"nf4": 4, "fp4": 4, "int8": 8}
"""Bits of each kind."""


@contextmanager
def quantize_layers(part: nn.Module, names: Sequence[str], kind: str | None) -> Iterator[None]:
    """Quantise layers, and tell peft of it within the context. None, and any kind on the meta device, leaves them as they are.

    Raises:
        ValueError: bitsandbytes is missing, or a layer is no ``nn.Linear``.
    """
    if kind is None:
        yield
        return
    if find_spec("bitsandbytes") is None:
        raise ValueError("quantize: bitsandbytes is not installed; pip install bitsandbytes, or set it to null")
    if on_meta():
        yield
        return
    for name in names:
        layer = part.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"quantize: {name} is a {type(layer).__name__}, not a Linear; set it to null")
        parent, _, child = name.rpartition(".")
        setattr(part.get_submodule(parent), child, _eight_bits(layer) if KINDS[kind] == 8 else _four_bits(layer, kind))
    mark: Any = f"is_loaded_in_{KINDS[kind]}bit"  # what peft looks at
    setattr(part, mark, True)
    try:
        yield
    finally:
        delattr(part, mark)


def _four_bits(layer: nn.Linear, kind: str) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    made: Any = Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype, quant_type=kind
    )
    made.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type=kind)
    made.bias = layer.bias
    made.support_avx512bf16_for_cpu = False  # it would re-pack the weights in evaluation, with rounder scales
    return made.to(layer.weight.device)  # the move is what quantises


def _eight_bits(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    made: Any = Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    made.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to(layer.weight.device)
