"""MoReS beside other parts: merging into the projector, published counts, presets, and lists of strategies."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from steered import FROZEN, RANDOM, built, gradients, logits, map_of, samples, strengthened
from toys import tree

from mllm_factory import (
    VISION,
    Backbone,
    ConfigError,
    MultimodalModel,
    Tuning,
    build,
)
from mllm_factory import run as engine
from mllm_factory.components.tuning.steering import FORMS, LowRankMap
from mllm_factory.components.tuning.steering_merge import fold, merge
from mllm_factory.config import compose

STRONG = {**RANDOM, "rank": 4, "positions": "all"}
CONF = Path(str(find_spec("mllm_factory.conf").origin)).parent  # type: ignore[union-attr]


def test_a20_steering_all_of_the_projectors_output_merges() -> None:
    strategy = {**STRONG, "layers": [0]}
    model, collator = built(strategy)
    strengthened(model)
    batch, prompts = collator(samples()), collator.prompts(samples())
    before, texts, count = logits(model, batch), model.generate(prompts, 8), sum(p.numel() for p in model.parameters())
    merge(model)
    torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=1e-5)
    assert model.generate(prompts, 8) == texts
    assert sum(p.numel() for p in model.parameters()) == count - 4 * (2 * 16 + 1)
    assert not any(layer._forward_pre_hooks for layer in model.backbone.layers)
    assert not torch.allclose(before, logits(built()[0], batch), atol=1e-3)


def test_a20_by_the_formula() -> None:
    change, linear = LowRankMap(8, 2, FORMS["orthonormal"], "random"), torch.nn.Linear(5, 8)
    R, M, b = change.up().detach(), (change.weight - change.up().T).detach(), change.bias.detach()
    W, c = linear.weight.detach().clone(), linear.bias.detach().clone()
    fold(change, linear)
    torch.testing.assert_close(linear.weight.detach(), (torch.eye(8) + R @ M) @ W)
    torch.testing.assert_close(linear.bias.detach(), (torch.eye(8) + R @ M) @ c + R @ b)


def test_a20_an_export_finds_the_merge_and_the_refusal(tmp_path: Path) -> None:
    from mllm_factory.export import write

    node = tree(tmp_path / "one", metrics={}, tuning__backbone={**STRONG, "layers": [0]}, trainer__max_steps=2)
    engine.train(node)
    start = tmp_path / "one" / "checkpoints" / "step_000002"
    write(str(start), merge=True, output=str(tmp_path / "plain"), trust_components=True)
    names_there = {name for file in (tmp_path / "plain").rglob("*.safetensors") for name in load_file(file)}
    assert names_there
    assert not [name for name in names_there if "steering" in name]
    engine.train(tree(tmp_path / "two", metrics={}, tuning__backbone=STRONG, trainer__max_steps=2))
    other = tmp_path / "two" / "checkpoints" / "step_000002"
    with pytest.raises(ConfigError, match=r"mores cannot be merged: .*layers \[0, 1\]"):
        write(str(other), merge=True, output=str(tmp_path / "not"), trust_components=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "all"}, r"block_input of layers \[0, 1\], not only"),
        ({"layers": [1]}, r"layers \[1\], not only at the input of layer 0"),
        ({"layers": [0], "placement": "block_output"}, "at the block_output of layers"),
        ({"layers": [0], "positions": "f4+l5"}, r"positions f4\+l5, not all"),
        ({"layers": [0], "modalities": ["vision", "text"]}, "it steers text"),
    ],
)
def test_a20_everything_else_refuses_to_merge(options: dict[str, Any], words: str) -> None:
    model, collator = built({**STRONG, **options})
    batch = collator(samples())
    before = logits(model, batch)
    with pytest.raises(ConfigError, match=f"mores cannot be merged: .*{words}"):
        merge(model)
    assert torch.equal(logits(model, batch), before)


def test_a20_learnt_positions_and_nonlinear_ends_refuse() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "n_positions": 128}
    gpt2 = {"name": "hf", "architecture": "gpt2", "sizes": sizes, "tokenizer": "bytes"}
    model, _ = built({**STRONG, "layers": [0]}, backbone=gpt2)
    with pytest.raises(ConfigError, match="changes its embeddings"):
        merge(model)
    model, _ = built({**STRONG, "layers": [0]})
    model.projectors["vision"].layers.append(torch.nn.GELU())
    with pytest.raises(ConfigError, match="does not end in a linear layer"):
        merge(model)


# ---------------------------------------------------------------- counts


def shape(dim: int, layers: int, heads: int, hidden_dim: int, architecture: str = "llama") -> dict[str, Any]:
    sizes = {
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": hidden_dim,
    }
    return {"name": "hf", "architecture": architecture, "sizes": sizes, "tokenizer": "bytes"}


PHI_2 = shape(2560, 32, 32, 10240, "phi")
VICUNA_7B, VICUNA_13B = shape(4096, 32, 32, 11008), shape(5120, 40, 40, 13824)


@pytest.mark.parametrize(
    ("node", "rank", "count"),
    [
        (PHI_2, 1, 163_872),
        (PHI_2, 2, 327_744),
        (PHI_2, 4, 655_488),
        (VICUNA_7B, 1, 262_176),
        (VICUNA_13B, 1, 409_640),
    ],
)
@pytest.mark.parametrize("preset", ["mores", "mores_paper", "loreft"])
def test_a3_published_counts(node: dict[str, Any], rank: int, count: int, preset: str) -> None:
    """L r (2 D + 1)"""
    strategy = yaml.safe_load((CONF / "tuning" / f"{preset}.yaml").read_text())["backbone"]
    with torch.device("meta"):
        backbone = build(Backbone, node)
        model = MultimodalModel(backbone, {"vision": torch.nn.Identity()}, {})
    del model.encoders["vision"]
    model.encoders["vision"] = torch.nn.Identity()
    model.tokens_per_item = {"vision": 1}
    with torch.device("meta"):
        build(Tuning, {**strategy, "rank": rank}).apply(backbone, model)
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == count


def test_a27_both_counts_are_told() -> None:
    """Trainable in the language model, as papers count, and with the projector: 6 D + D + D D + D."""
    for node, rank in ((tree()["backbone"], 3), (PHI_2, 1)):
        found = engine.check(tree(tuning__backbone={"name": "mores", "rank": rank}, backbone=node))
        dim, layers = node["sizes"]["hidden_size"], node["sizes"]["num_hidden_layers"]
        assert found["parts"]["backbone"]["trainable"] == layers * rank * (2 * dim + 1)
        assert found["trainable"] == layers * rank * (2 * dim + 1) + 6 * dim + dim + dim * dim + dim


# ---------------------------------------------------------------- presets and other strategies


@pytest.mark.parametrize("preset", ["mores", "mores_paper", "mores_released", "loreft", "noreft", "direft", "consreft"])
def test_presets_train(preset: str) -> None:
    strategy = yaml.safe_load((CONF / "tuning" / f"{preset}.yaml").read_text())["backbone"]
    model, collator = built(strategy)
    batch, base = collator(samples()), built()[0]
    starts_there = strategy["init"] == "identity"
    assert torch.equal(logits(model, batch), logits(base, batch)) == starts_there
    gradients(model, batch)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in learning if name.startswith("backbone")} == {"steering"}


def test_the_common_override_composes() -> None:
    composed = compose("train", ["experiment=smoke", "tuning=mores", "tuning.backbone.rank=4"])
    assert composed.check() == []
    assert composed.tree is not None
    assert composed.tree["tuning"]["backbone"]["rank"] == 4
    others = [
        "tuning.backbone.positions=ratio:0.01-0.25",
        "tuning.backbone.layers=[0,1]",
        "tuning.backbone.layers=every:2",
    ]
    for override in [*others, "tuning.backbone.positions=f2+l3", "tuning.backbone.modalities=[vision,text]"]:
        composed = compose("train", ["experiment=smoke", "tuning=mores", override])
        assert composed.check() == []
        assert composed.tree is not None
        engine.check(composed.tree)


@pytest.mark.parametrize("order", [0, 1])
def test_a28_mores_and_lora(order: int) -> None:
    lora: dict[str, Any] = {"name": "lora", "rank": 2, "targets": "all-linear"}
    mores: dict[str, Any] = {"name": "mores", "positions": "all"}
    strategies = [lora, mores] if order else [mores, lora]
    model, collator = built(*strategies)
    base, _ = built()
    batch = collator(samples())
    torch.testing.assert_close(logits(model, batch), logits(base, batch), atol=1e-6, rtol=0)
    learning = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("backbone")}
    assert all("lora_" in name or "steering" in name for name in learning)
    assert sum("steering" in name for name in learning) == 6
    assert sum("lora_" in name for name in learning) == 2 * 2 * 7
    assert all(torch.isfinite(g).all() for g in gradients(model, batch).values())
    with torch.no_grad():
        for name in learning:
            model.get_parameter(name).add_(0.1 * torch.randn_like(model.get_parameter(name)))
    both = logits(model.eval(), batch)
    merged = copy.deepcopy(model)
    for module in merged.backbone.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    torch.testing.assert_close(logits(merged, batch), both, atol=1e-4, rtol=1e-4)
    assert len(merged.backbone.layers[0]._forward_pre_hooks) == 1
    unsteered = copy.deepcopy(merged)
    for layer in range(2):
        change = map_of(unsteered, layer)
        with torch.no_grad():
            change.weight.copy_(change.up().T), change.bias.zero_()
    assert not torch.allclose(logits(unsteered, batch), both, atol=1e-3)


def test_mores_after_full_freezes_and_full_after_mores_does_not() -> None:
    def learning(*strategies: dict[str, Any]) -> set[bool]:
        return {"steering" in n for n, p in built(*strategies)[0].backbone.named_parameters() if p.requires_grad}

    assert learning({"name": "full"}, RANDOM) == {True}
    assert learning(RANDOM, {"name": "full"}) == {True, False}
    assert learning(RANDOM, FROZEN) == set()


def test_vision_code_is_what_the_maps_see() -> None:
    batch = built()[1](samples(1))
    assert int((batch.modality == VISION).sum()) == 4
