"""Tuning strategies: what learns, what the inserted layers compute, and how strategies of one part combine."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from mllm_factory import Backbone, ConfigError, Encoder, MultimodalModel, Tuning, build

LLAMA = {
    "name": "hf",
    "architecture": "llama",
    "sizes": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "tokenizer": "bytes",
}
GPT2 = {
    "name": "hf",
    "architecture": "gpt2",
    "sizes": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "n_positions": 64},
    "tokenizer": "bytes",
}
NO_MODEL = cast(MultimodalModel, None)  # these strategies look at the part alone


def backbone(node: dict[str, Any] = LLAMA) -> Any:
    torch.manual_seed(0)
    return build(Backbone, node).eval()


def tune(part: nn.Module, name: str, **options: Any) -> Any:
    strategy = build(Tuning, {"name": name, **options})
    strategy.apply(part, NO_MODEL)
    return strategy


def learning(part: nn.Module) -> set[str]:
    return {name for name, p in part.named_parameters() if p.requires_grad}


def test_frozen_and_full_the_last_one_wins() -> None:
    part = backbone()
    tune(part, "frozen")
    assert learning(part) == set()
    tune(part, "full")
    assert learning(part) == {name for name, _ in part.named_parameters()}


def test_lora_by_its_formula() -> None:
    part = backbone()
    hidden = torch.randn(2, 5, 16)
    before = {key: value.clone() for key, value in part.state_dict().items()}
    plain = part(hidden)
    strategy = tune(part, "lora", rank=4, alpha=8.0, targets=["down_proj"])
    assert strategy.resolved == [f"model.model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert torch.equal(part(hidden), plain)  # B is zero at the start
    assert learning(part) == {f"{name}.lora_{f}.default.weight" for name in strategy.resolved for f in "AB"}
    layer = part.layers[0].mlp.down_proj
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    assert (a.shape, b.shape) == ((4, 32), (16, 4))
    with torch.no_grad():
        b.normal_()
    x = torch.randn(3, 32)
    weight = before["model.model.layers.0.mlp.down_proj.weight"]
    torch.testing.assert_close(layer(x), x @ (weight + 8.0 / 4 * b @ a).T)
    after = {key.replace(".base_layer", ""): value for key, value in part.state_dict().items()}
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(("node", "layers"), [(LLAMA, 7), (GPT2, 4)])
def test_all_linear_is_every_linear_layer_of_the_decoder_and_no_head(
    node: dict[str, Any], layers: int, recwarn: pytest.WarningsRecorder
) -> None:
    part = backbone(node)
    strategy = tune(part, "lora", rank=2)
    assert len(strategy.resolved) == layers * 2
    assert not any("head" in name for name in strategy.resolved)
    part.train()(torch.randn(1, 5, 16)).square().sum().backward()
    factors = [name for name, p in part.named_parameters() if p.requires_grad]
    assert len(factors) == layers * 2 * 2
    assert all(part.get_parameter(name).grad is not None for name in factors)
    assert not [warning for warning in recwarn if "fan_in" in str(warning.message)]


def test_targets_end_at_a_dot() -> None:
    assert tune(backbone(), "lora", targets="1.self_attn.q_proj").resolved == ["model.model.layers.1.self_attn.q_proj"]
    assert len(tune(backbone(), "lora", targets=["q_proj", "lm_head"]).resolved) == 3
    with pytest.raises(ConfigError, match=r"named 'proj'; did you mean .*down_proj, gate_proj"):
        tune(backbone(), "lora", targets=["proj"])


def test_a_target_that_matches_nothing_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"named 'q_porj'; did you mean 'q_proj'\? .*all-linear"):
        tune(backbone(), "lora", targets=["q_porj"])
    part = backbone(GPT2)
    with pytest.raises(ConfigError, match=r"named 'q_proj'.*c_attn, c_fc, c_proj"):
        tune(part, "lora", targets=["c_attn", "q_proj"])
    assert learning(part) == {name for name, _ in part.named_parameters()}  # refused before anything changed


def test_lora_on_an_encoder_and_on_a_part_without_linear_layers() -> None:
    vit: Any = build(Encoder, {"name": "timm", "architecture": "test_vit", "image_size": 32})
    assert len(tune(vit, "lora", rank=2).resolved) == 6 * 4
    assert learning(vit)
    with pytest.raises(ConfigError, match="Conv2d has no linear layer"):
        tune(nn.Conv2d(3, 3, 1), "lora")


def test_factors_of_a_half_precision_part_are_float32() -> None:
    part = backbone({**LLAMA, "dtype": "bfloat16"})
    tune(part, "lora", rank=2)
    assert {p.dtype for p in part.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in part.parameters() if not p.requires_grad} == {torch.bfloat16}
    out = part(torch.randn(1, 3, 16, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.sum().backward()


def test_lora_twice_is_allowed_on_other_layers_only() -> None:
    part, hidden = backbone(), torch.randn(1, 4, 16)
    first, second = tune(part, "lora", targets="q_proj", rank=2), tune(part, "lora", targets="v_proj", rank=3)
    names = {f"{n}.lora_{f}.default.weight" for n in [*first.resolved, *second.resolved] for f in "AB"}
    assert learning(part) == names
    assert {part.get_parameter(n).shape[0] for n in names if "lora_A" in n} == {2, 3}
    part(hidden).sum().backward()
    assert all(part.get_parameter(name).grad is not None for name in names)
    with pytest.raises(ConfigError, match=r"another strategy adapts model.model.layers.0.self_attn.q_proj already"):
        tune(part, "lora", targets="q_proj")


class Bias(Tuning):
    """Another strategy: inserts one vector that learns, and freezes the rest."""

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        part.requires_grad_(False)
        part.register_parameter("extra", nn.Parameter(torch.zeros(3)))


def test_lists_of_strategies_are_applied_in_order() -> None:
    part = backbone()
    Bias().apply(part, NO_MODEL)
    strategy = tune(part, "lora", targets="q_proj")
    factors = {f"{name}.lora_{f}.default.weight" for name in strategy.resolved for f in "AB"}
    assert learning(part) == factors | {"extra"}
    alone, after_full, after_frozen = backbone(), backbone(), backbone()
    tune(alone, "lora", targets="q_proj")
    tune(after_full, "full")
    tune(after_full, "lora", targets="q_proj")
    tune(after_frozen, "frozen")
    tune(after_frozen, "lora", targets="q_proj")
    assert learning(alone) == learning(after_full) == learning(after_frozen) == factors
    tune(alone, "full")
    assert learning(alone) == {name for name, _ in alone.named_parameters()}


def test_what_another_strategy_trains_stays_so_but_is_not_adapted() -> None:
    part = backbone()
    tune(part, "frozen")
    part.layers[0].input_layernorm.requires_grad_(True)
    part.layers[0].self_attn.q_proj.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"another strategy trains model.model.layers.0.self_attn.q_proj already"):
        tune(part, "lora", targets="q_proj")
    tune(part, "lora", targets="v_proj")
    others = {name for name in learning(part) if "lora_" not in name}
    assert others == {f"model.model.layers.0.{name}.weight" for name in ("input_layernorm", "self_attn.q_proj")}


def test_the_factors_follow_the_seed() -> None:
    parts = []
    for _ in range(2):
        part = backbone()
        torch.manual_seed(7)
        tune(part, "lora", rank=2)
        parts.append(part.state_dict())
    assert all(torch.equal(parts[0][key], parts[1][key]) for key in parts[0])


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"targets": []},
        {"targets": ""},
        {"init": "pisa"},
        {"quantize": "nf5"},
        {"init": "pissa", "quantize": "nf4"},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(Tuning, {"name": "lora", **options})
