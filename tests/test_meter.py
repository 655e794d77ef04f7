"""The quick way through the meta device gives what torch's own way gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mllm_factory.meter import ELEMENTWISE, Quick, quick_result

aten = torch.ops.aten
SHAPES = [(2, 3, 4, 5), (4, 5), (5,), (2, 3, 4, 1), (1, 3, 1, 5), ()]
DTYPES = [torch.float32, torch.bfloat16]


def facts(x: Tensor) -> tuple[object, ...]:
    """What a tensor without values has."""
    return tuple(x.shape), x.stride(), x.dtype, x.device.type


def calls() -> list[tuple[object, list[object]]]:
    """Each operation with arguments of many shapes."""
    found: list[tuple[object, list[object]]] = []
    for func, dtype in itertools.product(sorted(ELEMENTWISE, key=str), DTYPES):
        tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in SHAPES]
        kind = str(func)
        if kind.endswith(".Tensor"):
            found += [(func, [a, b]) for a, b in itertools.product(tensors, tensors) if a.dim() and b.dim()]
        elif kind.endswith("Scalar"):
            found += [(func, [a, 2.0]) for a in tensors]
        else:
            found += [(func, [a]) for a in tensors]
    return found


def test_elementwise_results_have_torchs_shape_strides_and_type() -> None:
    for func, args in calls():
        quick = quick_result(func, args)
        assert quick is not None, (func, args)
        assert facts(quick) == facts(func(*args)), (func, [facts(a) for a in args if isinstance(a, Tensor)])  # type: ignore[operator]


def test_addmm_has_torchs_shape() -> None:
    bias, one, other = (torch.empty(shape, device="meta") for shape in ((7,), (3, 4), (7, 4)))
    quick = quick_result(aten.addmm.default, [bias, one, other.t()])
    assert quick is not None
    assert facts(quick) == facts(torch.addmm(bias, one, other.t()))


@pytest.mark.parametrize(
    "args",
    [
        [torch.empty(2, 3, device="meta").t(), torch.empty(3, 2, device="meta")],
        [torch.empty(3, device="meta", dtype=torch.long), 2],
        [torch.empty(3, device="meta"), torch.empty(3, device="meta", dtype=torch.bfloat16)],
        [torch.empty(3, device="meta"), torch.tensor(2.0)],
        [torch.empty(3), torch.empty(3)],
        [torch.empty(3, device="meta"), 1j],
    ],
    ids=["transposed", "whole numbers", "two types", "a scalar of the CPU", "with values", "complex"],
)
def test_torch_answers_what_is_not_plain(args: list[object]) -> None:
    assert quick_result(aten.mul.Tensor, args) is None
    if not any(isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() for x in args):
        expected = torch.mul(*args)  # type: ignore[call-overload]
        with Quick():
            assert facts(torch.mul(*args)) == facts(expected)  # type: ignore[call-overload]


def test_a_model_is_differentiated_as_usual() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.LayerNorm(6)).to("meta")
    with Quick():
        layer(torch.empty(5, 4, device="meta")).sum().backward()
    assert [facts(p.grad) for p in layer.parameters() if p.grad is not None] == [facts(p) for p in layer.parameters()]
