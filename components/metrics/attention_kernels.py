"""How a function of ours gets between a backbone's layers and their attention kernel, and out again.

Every attention module of transformers that uses ``AttentionInterface`` asks its config for the kernel's name at each call.
For the time of an observation that name is one of ours. The kernel itself runs as before, and its output for one row of each
layer is compared with what the recomputed probabilities give: a model that adds something to softmax(q k) is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mllm_factory import Backbone, ConfigError
from mllm_factory.components.metrics.attention_mass import Plan, along

PREFIX = "mllm_factory|"
"""Of our names; transformers offers no name with a bar to users."""


@dataclass(frozen=True)
class Call:
    """One call of a layer's attention. B rows, Q queries, K keys, H heads, Hkv key heads, D and D' widths of a head.

    Attributes:
        module: whose attention it is.
        layer: its layer's number in the backbone's list.
        query: [B, H, Q, D].
        key: [B, Hkv, K, D].
        value: [B, Hkv, K, D'].
        mask: bool (True: visible) or additive, [B or 1, H or 1, Q, K]; None: no mask.
        scale: of the scores.
        causal: without a mask, row i sees the keys 0 ... i.
        weights: [B, H, Q, K] where the kernel gave them, else None.
        output: [B, Q, H, D'] of the kernel.
        exact: no dropout was in it.
        front: how many of the K keys, the first ones, are no position of the batch but a prefix's.
    """

    module: nn.Module
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    causal: bool
    weights: Tensor | None
    output: Tensor
    exact: bool
    front: int

    @property
    def again(self) -> bool:
        """True where a layer runs once more because gradients are computed."""
        return torch._C._current_graph_task_id() != -1


Watch = Callable[[Call], Tensor]
"""Told of a call; gives the output that the layer goes on with, which is ``call.output`` for those who only look."""

_watched: dict[nn.Module, tuple[int, Watch, int]] = {}
"""Modules inside observed layers: the layer's number, who wants to know, and the keys in front of every row."""

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far recomputed outputs may be from the kernel's, relative to the largest value."""


def _register() -> None:
    """Make our two names known to transformers; again and again changes nothing."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    for kernel in ("sdpa", "eager"):
        AttentionInterface.register(PREFIX + kernel, partial(_attend, kernel))
        AttentionMaskInterface.register(PREFIX + kernel, MASKS[kernel])


def _attend(
    kernel: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,  # what the architecture gives its kernel
) -> tuple[Tensor, Tensor | None]:
    """What the kernel gives; statistics go to whoever watches the module."""
    run = _kernel(kernel, module)
    output, weights = run(module, query, key, value, attention_mask, **options)
    if module not in _watched:
        return output, weights
    layer, watch, front = _watched[module]
    scaling, causal, exact = options.get("scaling"), options.get("is_causal"), not options.get("dropout")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    causal = getattr(module, "is_causal", True) if causal is None else causal
    causal = bool(causal) and query.shape[2] > 1 and weights is None
    call = Call(module, layer, query, key, value, attention_mask, scale, causal, weights, output, exact, front)
    with torch.autocast(query.device.type, enabled=False):
        return watch(call), weights


def _kernel(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' function of that name; ``eager`` is the one in the file of the module's own class."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name != "eager":
        found: Any = ALL_ATTENTION_FUNCTIONS[name]
        return found
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ConfigError(
        f"attention of {type(module).__name__} cannot be observed with the eager kernel; set backbone.attention=sdpa"
    )


@torch.no_grad()
def require_softmax(call: Call, plan: Plan, A: Tensor) -> None:
    """Refuse a layer whose output for its first wanted row is not A v.

    Args:
        call: of the layer.
        plan: the wanted rows.
        A: [B, H, K'] recomputed probabilities of the first one.

    Raises:
        ConfigError: output and A v differ by more than rounding does.
    """
    if not call.exact:
        return
    theirs = along(call.output.transpose(1, 2), plan.index[:, :1])[:, :, 0].float()
    gap = (mixed(A, call.value) - theirs).abs().amax((1, 2))[plan.valid[:, 0]].max()
    bound = TOLERANCE.get(call.value.dtype, 1e-3) * float(call.value[:, :, : A.shape[2]].abs().max())
    if not float(gap) <= bound:
        raise ConfigError(
            f"attention of {type(call.module).__name__} in layer {call.layer} is more than softmax(q k) v: output and statistics "
            f"differ by {float(gap):.2g}; set backbone.attention=eager, whose weights are read as they are"
        )


def mixed(A: Tensor, value: Tensor) -> Tensor:
    """A v of one row: [B, H, K'], [B, Hkv, K, D'] -> [B, H, D'] float32; a head of v serves H / Hkv of A."""
    B, _, K = A.shape
    v = value[:, :, :K].float()
    return torch.matmul(A.view(B, v.shape[1], -1, K), v).flatten(1, 2)


@contextmanager
def observed_kernels(backbone: Backbone, watch: Watch) -> Iterator[None]:
    """Send the attention of a backbone's layers through ``watch``; the kernels' names are as before afterwards.

    Raises:
        ConfigError: the backbone is no model of transformers, does not use ``AttentionInterface``, or is observed already.
    """
    configs = _configs(backbone)
    _register()
    front = keys_in_front(backbone)
    watched = {m: (number, watch, front) for number, layer in enumerate(backbone.layers) for m in layer.modules()}
    if any(module in _watched for module in watched):
        raise ConfigError("observe: this backbone is being observed already; end that first")
    before = [(config, config._attn_implementation_internal) for config in configs]
    _watched.update(watched)
    try:
        for config, name in before:
            kernel = "eager" if name in (None, "eager") or not _has_sdpa(backbone) else "sdpa"
            config._attn_implementation_internal = PREFIX + kernel
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        for module in watched:
            del _watched[module]


def keys_in_front(backbone: Backbone) -> int:
    """How many keys every layer sees before those of the row: what the backbone's modules say, as a learned prefix does."""
    return sum(int(getattr(module, "keys_in_front", 0)) for module in backbone.children())


def _configs(backbone: Backbone) -> list[Any]:
    """The configs inside a backbone that name a kernel."""
    found: dict[int, Any] = {}
    for module in backbone.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
        can: Any = getattr(module, "_can_set_attn_implementation", None)
        if can is not None and not can():
            raise ConfigError(
                f"attention of {type(module).__name__} cannot be observed: transformers gives it no AttentionInterface; leave "
                "out the metrics on attention"
            )
    if not found:
        raise ConfigError(
            f"attention of {type(backbone).__name__} cannot be observed: it is no model of transformers; leave out the metrics "
            "on attention"
        )
    return list(found.values())


def _has_sdpa(backbone: Backbone) -> bool:
    """Whether every model inside can run sdpa; one with capped scores or learned sinks cannot."""
    return all(getattr(module, "_supports_sdpa", True) for module in backbone.modules())
