"""The mlp projector against the same layers written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mllm_factory import ConfigError, Projector, build

GIVEN = {"in_dim": 6, "out_dim": 10, "in_tokens": 4}


def test_depth_one_is_the_linear_projector() -> None:
    projector = build(Projector, {"name": "mlp", "depth": 1}, **GIVEN)
    weight, bias = projector.parameters()
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(projector(x), x @ weight.T + bias)
    assert projector.num_tokens == 4


@pytest.mark.parametrize(("depth", "hidden", "widths"), [(2, None, [6, 10, 10]), (3, 7, [6, 7, 7, 10])])
def test_gelu_between_linear_layers(depth: int, hidden: int | None, widths: list[int]) -> None:
    projector = build(Projector, {"name": "mlp", "depth": depth, "hidden_dim": hidden}, **GIVEN)
    parameters = list(projector.parameters())
    x = by_hand = torch.randn(3, 4, 6)
    for i, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
        assert weight.shape == (widths[i + 1], widths[i])
        by_hand = (F.gelu(by_hand) if i else by_hand) @ weight.T + bias
    torch.testing.assert_close(projector(x), by_hand)


@pytest.mark.parametrize("options", [{"depth": 0}, {"depth": -1}, {"hidden_dim": 0}])
def test_sizes_that_make_no_sense(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(Projector, {"name": "mlp", **options}, **GIVEN)
