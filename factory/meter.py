"""Modes for the meta device: one is quick, one counts the bytes and FLOPs of a training step, one acts as real devices do."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten: Any = torch.ops.aten
FLASH, FLASH_BACK = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
)
LOWERED: frozenset[Any] = frozenset(
    (
        *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention),
        *(torch.conv1d, torch.conv2d, torch.conv3d),
        *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm),
    )
)
"""What autocast computes in the lower precision."""


ELEMENTWISE: frozenset[Any] = frozenset(
    (
        *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar),
        *(aten.neg.default, aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.sigmoid.default),
        *(aten.gelu.default, aten.silu.default, aten.relu.default, aten.tanh.default),
    )
)
"""Operations whose result has the type of their arguments, if that is a floating one."""


def quick_result(func: Any, args: Sequence[Any]) -> Tensor | None:
    """What a frequent operation gives on the meta device, a hundred times sooner than torch's own way to it (0.2 to 1 ms each).

    Returns:
        None for other operations, and unless all tensors are contiguous, on meta, and of one floating type.
    """
    if func is aten.addmm.default:
        shape = (args[1].shape[0], args[2].shape[1])
    elif func in ELEMENTWISE:
        shape = torch.broadcast_shapes(*(x.shape for x in args if isinstance(x, Tensor)))
    else:
        return None
    tensors = [x for x in args if isinstance(x, Tensor)]
    dtype = tensors[0].dtype
    plain = dtype.is_floating_point and not any(isinstance(x, complex) for x in args)
    if not plain or not all(x.is_meta and x.dtype is dtype for x in tensors):
        return None
    if func in ELEMENTWISE and not all(x.is_contiguous() for x in tensors):
        return None
    return torch.empty(shape, dtype=dtype, device="meta")


class Quick(TorchDispatchMode):
    """Takes the short way of ``quick_result`` where there is one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = quick_result(func, args)
        return func(*args, **(kwargs or {})) if out is None else out


def storage_of(tensor: Tensor) -> int:
    """What identifies a tensor's storage while that lives."""
    return tensor.untyped_storage()._cdata


class Meter(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the FLOPs of what makes them.

    Args:
        known: storages that were there before.

    Attributes:
        most: most bytes alive at one moment.
        most_activations: the same without gradients.
        flops: so far.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = dict.fromkeys(known, (None, 0))
        self.gradients: set[int] = set()
        self.now = self.most = self.now_activations = self.most_activations = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = quick_result(func, args)
        if out is None:
            out = func(*args, **(kwargs or {}))
        self.flops += _flops(func, args, kwargs or {}, out)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._take(tensor)
        return out

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            size = storage.nbytes()
            self.alive[key] = (weakref.ref(storage, lambda _: self._drop(key)), size)
            self.now += size
            self.now_activations += size
            self.most = max(self.most, self.now)
            self.most_activations = max(self.most_activations, self.now_activations)

    def _drop(self, key: int) -> None:
        _, size = self.alive.pop(key)
        self.now -= size
        if key in self.gradients:
            self.gradients.discard(key)
        else:
            self.now_activations -= size

    def is_gradient(self, tensor: Tensor) -> None:
        """From now on this tensor is no activation."""
        key = storage_of(tensor)
        if key in self.alive and key not in self.gradients:
            self.gradients.add(key)
            self.now_activations -= self.alive[key][1]


def _flops(func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> int:
    packet = func.overloadpacket
    if packet is FLASH:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if packet is FLASH_BACK:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    count = flop_registry.get(packet)
    return count(*args, **kwargs, out_val=out) if count is not None else 0


class Kernels(TorchFunctionMode):
    """What devices do and the meta device does not: fused attention, autocast, and answers to questions about values.

    Without values, ``all()`` is taken as true, ``any()`` and every other condition as false: the questions of libraries look for a
    shortcut that full rows allow (is nothing masked?) or for an exception (is the row beyond the usual?).
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.copies: dict[int, Tensor] = {}  # autocast, too, casts a weight once

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].is_meta:
            if func in (Tensor.all, torch.all):
                return torch.tensor(True, device="cpu")
            if func in (Tensor.any, torch.any):
                return torch.tensor(False, device="cpu")
            if func is Tensor.__bool__:
                return False
        if func in LOWERED and self.dtype is not torch.float32:
            args = [self._lowered(value) for value in args]
            kwargs = {name: self._lowered(value) for name, value in kwargs.items()}
        args, kwargs = _together(args, kwargs)
        if func is F.scaled_dot_product_attention:
            return _fused(*args, **kwargs)
        return func(*args, **kwargs)

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function in this mode."""
        with self:
            return forward(*args, **kwargs)

    @contextmanager
    def instead_of_autocast(self) -> Iterator[None]:
        """Take the place of ``torch.autocast``, which does not know the meta device and fails even where it is turned off."""
        real = torch.autocast

        @contextmanager
        def autocast(device_type: str, dtype: Any = None, enabled: bool = True, **options: Any) -> Iterator[None]:
            before = self.dtype
            self.dtype = (dtype or before) if enabled else torch.float32
            try:
                yield
            finally:
                self.dtype = before

        setattr(torch, "autocast", autocast)  # noqa: B010 - a class gives way to a function
        try:
            yield
        finally:
            setattr(torch, "autocast", real)  # noqa: B010

    def _lowered(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(self._lowered, value))
        if not isinstance(value, Tensor) or value.dtype is not torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(self.dtype)
        return self.copies[id(value)]


def _together(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments of one call with indices of the CPU brought to the meta device, if others are there."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not (any(t.is_meta for t in tensors) and any(t.device.type == "cpu" and t.dim() for t in tensors)):
        return args, kwargs
    moved = [value.to("meta") if isinstance(value, Tensor) and value.dim() else value for value in args]
    return moved, {
        name: value.to("meta") if isinstance(value, Tensor) and value.dim() else value for name, value in kwargs.items()
    }


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as one kernel that keeps no [T, T] matrix: [..., h, T, d] each."""
    groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    if groups > 1:  # kernels read the shared heads in place, so they are counted once
        key, value = (
            x[..., None, :, :].expand(*x.shape[:-2], groups, *x.shape[-2:]).flatten(-4, -3) for x in (key, value)
        )
    if query.dim() != 4 or query.shape[-1] != value.shape[-1]:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    return FLASH(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
