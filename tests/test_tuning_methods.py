"""Every method against its formula by hand, its parameter count, and its merge into plain weights."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mllm_factory import Backbone, ConfigError, Encoder, MultimodalModel, Projector, Tuning, build

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
LLAMA = {"name": "hf", "architecture": "llama", "sizes": SIZES, "tokenizer": "bytes"}
GPT2 = {
    "name": "hf",
    "architecture": "gpt2",
    "sizes": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "n_positions": 64},
    "tokenizer": "bytes",
}
NO_MODEL = cast(MultimodalModel, None)  # these strategies look at the part alone
MERGEABLE: list[dict[str, Any]] = [
    {"name": "lora", "rank": 3},
    {"name": "lora", "rank": 3, "rslora": True},
    {"name": "lora", "rank": 3, "dora": True},
    {"name": "lora", "rank": 3, "init": "pissa"},
    {"name": "oft", "blocks": 4},
    {"name": "ia3", "targets": ["k_proj", "v_proj"], "inputs": ["down_proj"]},
    {"name": "vera", "rank": 5},
]


def named(node: dict[str, Any]) -> str:
    return "-".join(
        str(value if key == "name" else key) for key, value in node.items() if key not in ("rank", "targets")
    )


def backbone(node: dict[str, Any] = LLAMA) -> Any:
    torch.manual_seed(0)
    return build(Backbone, node).eval()


def tune(part: nn.Module, node: dict[str, Any]) -> Any:
    strategy = build(Tuning, node)
    strategy.apply(part, NO_MODEL)
    return strategy


def learning(part: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in part.named_parameters() if p.requires_grad}


def stir(part: nn.Module) -> None:
    """As after training: every trainable value is moved."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in learning(part).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


# ---------------------------------------------------------------- formulas


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    part = backbone()
    layer = part.layers[0].mlp.down_proj
    weight = layer.weight.clone()
    tune(part, {"name": "lora", "rank": 4, "alpha": 6.0, "rslora": True, "targets": ["down_proj"]})
    stir(part)
    layer, x = part.layers[0].mlp.down_proj, torch.randn(3, 32)
    b, a = layer.lora_B.default.weight, layer.lora_A.default.weight
    torch.testing.assert_close(layer(x), x @ (weight + 6.0 / math.sqrt(4) * b @ a).T)


def test_dora_by_its_formula() -> None:
    part = backbone()
    weight = part.layers[0].mlp.down_proj.weight.clone()
    tune(part, {"name": "lora", "rank": 4, "alpha": 8.0, "dora": True, "targets": ["down_proj"]})
    layer, x = part.layers[0].mlp.down_proj, torch.randn(3, 32)
    torch.testing.assert_close(layer.lora_magnitude_vector.default.weight.data, weight.norm(dim=1))
    stir(part)
    v = weight + 8.0 / 4 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    m = layer.lora_magnitude_vector.default.weight
    torch.testing.assert_close(layer(x), x @ (m[:, None] * v / v.norm(dim=1, keepdim=True)).T)


def test_pissa_starts_from_the_principal_components() -> None:
    part = backbone()
    weight = part.layers[0].mlp.down_proj.weight.clone()
    tune(part, {"name": "lora", "rank": 4, "alpha": 8.0, "init": "pissa", "targets": ["down_proj"]})
    layer, x = part.layers[0].mlp.down_proj, torch.randn(3, 32)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-4, atol=1e-5)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    update = 8.0 / 4 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    torch.testing.assert_close(update, u[:, :4] @ s[:4].diag() @ v[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.base_layer.weight, weight - update, rtol=1e-4, atol=1e-5)


def test_oft_rotates_the_input_in_blocks() -> None:
    part = backbone()
    weight = part.layers[0].mlp.down_proj.weight.clone()
    tune(part, {"name": "oft", "blocks": 4, "targets": ["down_proj"]})
    stir(part)
    layer, x = part.layers[0].mlp.down_proj, torch.randn(3, 32)
    values = layer.oft_R.default.weight
    assert values.shape == (4, 8 * 7 // 2)
    blocks = []
    for row in values:
        q = torch.zeros(8, 8)
        q[*torch.triu_indices(8, 8, 1)] = row
        q = q - q.T
        blocks.append(torch.linalg.inv(torch.eye(8) + q) @ (torch.eye(8) - q))
    r = torch.block_diag(*blocks)
    torch.testing.assert_close(r @ r.T, torch.eye(32), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x), (x @ r) @ weight.T, rtol=1e-4, atol=1e-5)


def test_ia3_rescales_outputs_and_inputs() -> None:
    part = backbone()
    k, down = (m.weight.clone() for m in (part.layers[0].self_attn.k_proj, part.layers[0].mlp.down_proj))
    strategy = tune(part, {"name": "ia3", "targets": ["k_proj"], "inputs": ["down_proj"]})
    assert len(strategy.resolved) == 6
    stir(part)
    layer, x = part.layers[0].self_attn.k_proj, torch.randn(3, 16)
    torch.testing.assert_close(layer(x), layer.ia3_l.default.flatten() * (x @ k.T))
    layer, x = part.layers[0].mlp.down_proj, torch.randn(3, 32)
    torch.testing.assert_close(layer(x), (layer.ia3_l.default.flatten() * x) @ down.T)


def test_vera_shares_one_frozen_pair_of_factors() -> None:
    part = backbone()
    weight = part.layers[0].self_attn.q_proj.weight.clone()
    tune(part, {"name": "vera", "rank": 5, "d_initial": 0.3, "targets": ["q_proj", "down_proj"]})
    frozen = {name: p for name, p in part.named_parameters() if "vera_A" in name or "vera_B" in name}
    assert sorted(p.shape for p in frozen.values()) == [(5, 32), (16, 5)]
    assert not any(p.requires_grad for p in frozen.values())
    assert not [name for name, _ in part.named_buffers() if "vera" in name]
    stir(part)
    layer, x = part.layers[0].self_attn.q_proj, torch.randn(3, 16)
    a, b = layer.vera_A.default[:, :16], layer.vera_B.default[:16]
    torch.testing.assert_close(
        layer(x), x @ (weight + layer.vera_lambda_b.default[:, None] * b * layer.vera_lambda_d.default @ a).T
    )
    other = backbone()
    torch.manual_seed(1)
    tune(other, {"name": "vera", "rank": 5})
    assert not torch.equal(other.layers[0].self_attn.q_proj.vera_A.default[:, :16], a)  # drawn from the run's seed


@pytest.mark.parametrize(("side", "target"), [("input", "q_proj"), ("output", "down_proj"), ("narrow", "up_proj")])
def test_an_adapter_by_its_formula(side: str, target: str) -> None:
    part = backbone()
    ends = {"q_proj": "self_attn.q_proj", "down_proj": "mlp.down_proj", "up_proj": "mlp.up_proj"}[target]
    layer = part.layers[0].get_submodule(ends)
    x = torch.randn(3, layer.in_features)
    plain = layer(x)
    tune(part, {"name": "adapter", "width": 4, "side": side, "targets": [target], "activation": "tanh"})
    assert torch.equal(layer(x), plain)  # the identity at the start
    assert len(learning(part)) == 2 * 3
    stir(part)
    down, up = (layer.get_submodule(f"bottleneck_adapter.{name}").weight for name in ("down", "up"))
    assert down.shape == (4, 16)

    def a(x: Tensor) -> Tensor:
        return x + torch.tanh(x @ down.T) @ up.T

    expected = a(x @ layer.weight.T) if side == "output" else a(x) @ layer.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_an_adapter_knows_which_way_gpt2_layers_go() -> None:
    part = backbone(GPT2)
    tune(part, {"name": "adapter", "width": 4, "targets": ["c_fc", "mlp.c_proj"]})
    assert {p.shape for p in learning(part).values()} == {(4, 16), (16, 4)}
    part(torch.randn(1, 3, 16)).sum().backward()
    assert all(p.grad is not None for p in learning(part).values())


def test_a_copy_of_an_adapted_part_uses_its_own_adapters() -> None:
    part = backbone()
    tune(part, {"name": "adapter", "width": 4})
    other, hidden = copy.deepcopy(part), torch.randn(1, 3, 16)
    plain = part(hidden)
    stir(other)
    assert torch.equal(part(hidden), plain)
    assert not torch.allclose(other(hidden), plain)


# ---------------------------------------------------------------- types and merging


@pytest.mark.parametrize("node", [*MERGEABLE, {"name": "adapter", "width": 4}], ids=named)
def test_what_learns_is_float32_on_a_half_precision_part(node: dict[str, Any]) -> None:
    part = backbone({**LLAMA, "dtype": "bfloat16"})
    tune(part, node)
    assert {p.dtype for p in learning(part).values()} == {torch.float32}
    out = part(torch.randn(1, 3, 16, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad is not None for p in learning(part).values())


@pytest.mark.parametrize("node", MERGEABLE, ids=named)
def test_a_merged_part_is_plain_and_computes_the_same(node: dict[str, Any]) -> None:
    part, plain = backbone(), backbone()
    strategy = tune(part, node)
    stir(part)
    ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = part.logits(part(part.embed(ids)))
        strategy.merge(part, NO_MODEL)
        got = part.logits(part(part.embed(ids)))
        assert (got - expected).abs().max() <= 1e-5
        assert not torch.allclose(plain.logits(plain(plain.embed(ids))), expected, atol=1e-3)
    assert part.state_dict().keys() == plain.state_dict().keys()
    assert {type(m) for m in part.modules()} == {type(m) for m in plain.modules()}


def test_biases_are_merged_too() -> None:
    torch.manual_seed(0)
    part: Any = build(Projector, {"name": "mlp"}, in_dim=6, out_dim=10, in_tokens=4)
    strategy = tune(part, {"name": "ia3"})
    stir(part)
    x = torch.randn(2, 4, 6)
    expected = part(x)
    strategy.merge(part, NO_MODEL)
    torch.testing.assert_close(part(x), expected)
    assert type(part.layers[0]) is nn.Linear


@pytest.mark.parametrize("name", ["lora", "oft", "ia3", "vera", "adapter"])
def test_any_part_can_be_adapted(name: str) -> None:
    options = {"oft": {"blocks": 2}}.get(name, {})
    torch.manual_seed(0)
    vit: Any = build(Encoder, {"name": "timm", "architecture": "test_vit", "image_size": 32})
    items = torch.randn(2, 3, 32, 32)
    vit.eval()
    with torch.no_grad():
        plain = vit(items)
        strategy = tune(vit, {"name": name, **options})
        torch.testing.assert_close(vit(items), plain)
    assert len(strategy.resolved) == 6 * 4
    vit(items).sum().backward()
    assert all(p.grad is not None for p in learning(vit).values())


# ---------------------------------------------------------------- layers


def test_the_last_decoder_layers_learn() -> None:
    part = backbone()
    strategy = tune(part, {"name": "layers", "last": 2})
    assert strategy.resolved == ["model.model.layers.1", "model.model.layers.2"]
    expected = {
        n for n, _ in part.named_parameters() if n.startswith(("model.model.layers.1.", "model.model.layers.2."))
    }
    assert set(learning(part)) == expected


@pytest.mark.parametrize(
    ("architecture", "block"), [("test_vit", "model.blocks.5"), ("tf_efficientnet_lite0", "model.blocks.6")]
)
def test_the_blocks_of_an_encoder_are_found_by_structure(architecture: str, block: str) -> None:
    encoder: Any = build(Encoder, {"name": "timm", "architecture": architecture, "image_size": 32})
    assert tune(encoder, {"name": "layers", "last": 1}).resolved == [block]
    assert learning(encoder)
    assert all(name.startswith(f"{block}.") for name in learning(encoder))


def test_layers_beside_lora_and_where_they_meet() -> None:
    part = backbone()
    tune(part, {"name": "layers", "last": 1})
    tune(part, {"name": "lora", "targets": ["0.self_attn.q_proj", "1.self_attn.q_proj"]})
    assert {name.split(".")[3] for name in learning(part) if "lora_" in name} == {"0", "1"}
    assert {name.split(".")[3] for name in learning(part) if "lora_" not in name} == {"2"}
    with pytest.raises(ConfigError, match=r"another strategy trains model.model.layers.2"):
        tune(part, {"name": "lora", "targets": ["v_proj"]})
    with pytest.raises(ConfigError, match=r"another strategy adapts model.model.layers.1.self_attn.q_proj already"):
        tune(part, {"name": "layers", "last": 2})


def test_layers_of_what_has_none() -> None:
    with pytest.raises(ConfigError, match="Mlp is no stack of blocks"):
        tune(build(Projector, {"name": "mlp"}, in_dim=6, out_dim=10, in_tokens=4), {"name": "layers"})
    with pytest.raises(ConfigError, match=r"last: 4 is more than the 3 blocks"):
        tune(backbone(), {"name": "layers", "last": 4})


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "oft", "blocks": 0}, "blocks: 0"),
        ({"name": "oft", "blocks": 5}, r"blocks: 5 do not cut the 16 inputs of .*q_proj"),
        ({"name": "oft", "blocks": 16}, r"blocks: 16 do not cut the 16 inputs"),
        ({"name": "oft", "dropout": 1.0}, "dropout: 1.0"),
        ({"name": "ia3", "targets": []}, "targets: nothing"),
        ({"name": "ia3", "targets": ["k_proj"], "inputs": ["k_proj"]}, r"inputs: .*k_proj is among targets too"),
        ({"name": "ia3", "targets": ["k_proj"], "inputs": ["down_prj"]}, r"ia3: inputs: .*did you mean 'down_proj'"),
        ({"name": "vera", "rank": 0}, "rank: 0"),
        ({"name": "vera", "d_initial": 0.0}, "d_initial: 0"),
        ({"name": "vera", "targets": ["q_prj"]}, r"vera: targets: no linear layer .*did you mean 'q_proj'"),
        ({"name": "adapter", "width": 0}, "width: 0"),
        ({"name": "adapter", "activation": "gellu"}, "activation: 'gellu'; did you mean 'gelu'"),
        ({"name": "adapter", "side": "left"}, "side: 'left'"),
        ({"name": "layers", "last": 0}, "last: 0"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_bad_options_say_what_is_wrong(node: dict[str, Any], message: str) -> None:
    part = backbone()
    with pytest.raises(ConfigError, match=message):
        tune(part, node)
    assert all(p.requires_grad for p in part.parameters())  # refused before anything changed


def test_the_output_layer_of_fused_attention_is_no_target() -> None:
    part = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert tune(part, {"name": "lora", "rank": 2}).resolved == ["1"]
