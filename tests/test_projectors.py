"""Projectors that treat each token by itself, against the same layers written by hand and against published counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from mllm_factory import ConfigError, Projector, build

GIVEN = {"in_dim": 6, "out_dim": 10, "in_tokens": 4}
CONF = Path(__file__).parent.parent / "conf" / "projector"


def preset(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())


def test_depth_one_is_the_linear_projector() -> None:
    projector = build(Projector, preset("linear"), **GIVEN)
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


@pytest.mark.parametrize(
    ("in_dim", "out_dim", "published"),
    [(1152, 2560, 9_507_840), (1024, 4096, 20_979_712), (1024, 5120, 31_467_520)],
    ids=["siglip_phi2", "clip_vicuna_7b", "clip_vicuna_13b"],
)
def test_published_parameter_counts(in_dim: int, out_dim: int, published: int) -> None:
    with torch.device("meta"):
        projector = build(Projector, preset("mlp2x_gelu"), in_dim=in_dim, out_dim=out_dim, in_tokens=576)
    assert sum(p.numel() for p in projector.parameters()) == published


def test_the_number_in_a_presets_name_is_its_depth() -> None:
    for name, linear in (("linear", 1), ("mlp", 2), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)):
        layers = list(build(Projector, preset(name), **GIVEN).modules())
        assert sum(isinstance(layer, torch.nn.Linear) for layer in layers) == linear
        assert sum(isinstance(layer, torch.nn.GELU) for layer in layers) == linear - 1


@pytest.mark.parametrize("options", [{"depth": 0}, {"depth": -1}, {"hidden_dim": 0}])
@pytest.mark.parametrize("name", ["mlp", "mof_mlp"])
def test_sizes_that_make_no_sense(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(Projector, {"name": name, **options}, **GIVEN)


# ---------------------------------------------------------------- identity


def test_identity_changes_nothing_and_has_no_weight() -> None:
    projector = build(Projector, {"name": "identity"}, in_dim=6, out_dim=6, in_tokens=5)
    x = torch.randn(2, 5, 6)
    assert projector(x) is x
    assert projector.num_tokens == 5
    assert list(projector.parameters()) == []


def test_identity_refuses_unequal_widths() -> None:
    with pytest.raises(ConfigError, match="6 wide but the backbone's embeddings 10; use the projector linear or mlp"):
        build(Projector, {"name": "identity"}, **GIVEN)


# ---------------------------------------------------------------- mof_mlp


def test_tokens_take_turns_through_adapters_of_their_own() -> None:
    projector: Any = build(Projector, {"name": "mof_mlp", "encoders": 3}, in_dim=6, out_dim=10, in_tokens=12)
    x = torch.randn(2, 12, 6)
    given = projector(x)
    assert given.shape == (2, projector.num_tokens, 10) == (2, 12, 10)
    for t in range(12):
        torch.testing.assert_close(given[:, t], projector.adapters[t % 3](x[:, t]))
    ours = sum(p.numel() for p in projector.parameters())
    assert ours == 3 * sum(p.numel() for p in build(Projector, {"name": "mlp"}, **GIVEN).parameters())


@pytest.mark.parametrize("encoders", [0, 1, 3])
def test_turns_that_do_not_come_out_even(encoders: int) -> None:
    with pytest.raises(ConfigError, match=f"encoders: {encoders} cannot take turns in 4 tokens"):
        build(Projector, {"name": "mof_mlp", "encoders": encoders}, **GIVEN)
