"""Every preset of conf/tuning in real training steps: what learns moves, what is frozen stays, checkpointing changes nothing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import Colours

from mllm_factory import Batch, ConfigError, MultimodalModel
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.checkpoint import Writer, fingerprints, load
from mllm_factory.config import compose
from mllm_factory.distributed import World
from mllm_factory.errors import CheckpointError
from mllm_factory.trainer import parameter_groups

PRESETS = sorted(file.stem for file in (Path(__file__).parent.parent / "conf" / "tuning").glob("*.yaml"))
ALONE = World(0, 1, torch.device("cpu"))


def composed(preset: str, *overrides: str) -> dict[str, Any]:
    tree = compose("train", ["experiment=smoke", f"tuning={preset}", *overrides]).tree
    assert tree is not None
    return tree


def needs(tree: dict[str, Any]) -> None:
    """Skip where a preset needs a library that is not installed."""
    if tree["tuning"]["backbone"].get("quantize") and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")


def made(tree: dict[str, Any]) -> tuple[MultimodalModel, Batch]:
    model = build_model(tree)
    samples = Colours(8, pictures=2)
    return model, build_collator(tree, model)([samples[i] for i in range(4)])


def backward(model: MultimodalModel, batch: Batch) -> dict[str, Tensor]:
    """Gradients of one step by name."""
    torch.manual_seed(3)
    model.zero_grad()
    output = model(batch)
    (output.loss_sum / output.num_labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def steps(model: MultimodalModel, batch: Batch, count: int = 3) -> set[str]:
    """Train a few steps without weight decay; names of the tensors whose gradient was zero in every step."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-2)
    zero = {name for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(count):
        grads = backward(model, batch)
        zero -= {name for name, grad in grads.items() if grad.any()}
        optimizer.step()
    return zero


def values(model: MultimodalModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("preset", PRESETS)
def test_what_learns_moves_and_what_is_frozen_stays(preset: str) -> None:
    tree = composed(preset)
    needs(tree)
    model, batch = made(tree)
    before = values(model.train())
    idle = steps(model, batch)
    moved = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert moved == learning - idle
    # What is done to media positions behind the last layer reaches no loss: the published placement has one such map.
    at_the_end = tree["tuning"]["backbone"].get("placement") == "block_output"
    last = len(model.backbone.layers) - 1
    assert all(at_the_end and f".{last}." in name for name in idle), idle


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_checkpointing_changes_no_gradient(preset: str) -> None:
    tree = composed(preset)
    needs(tree)
    grads = []
    for recompute in (False, True):
        model, batch = made(tree)
        model.train()
        if recompute:
            model.checkpoint_activations()
        steps(model, batch, 2)
        grads.append(backward(model, batch))
    assert grads[0].keys() == grads[1].keys()
    assert [name for name, grad in grads[0].items() if not torch.equal(grad, grads[1][name])] == []


@pytest.mark.parametrize("preset", PRESETS)
def test_a_checkpoint_of_what_learns_restores_the_model(preset: str, tmp_path: Path) -> None:
    tree = composed(preset)
    needs(tree)
    model, batch = made(tree)
    steps(model.train(), batch, 2)
    folder = Writer(tmp_path, tree, fingerprints(model), None, ALONE).save(model, {"step": 2})
    other, _ = made(tree)
    load(folder, other)
    with torch.no_grad():
        expected, got = (m.eval()(batch, logits=True).logits for m in (model, other))
    assert torch.equal(expected, got)
    state, again = model.state_dict(), other.state_dict()
    assert state.keys() == again.keys()
    assert [name for name, value in state.items() if not torch.equal(value, again[name])] == []


# ---------------------------------------------------------------- combinations


def test_a_strategy_of_its_own_for_each_part() -> None:
    tree = composed("lora")
    tree["tuning"] = {
        "vision": {"name": "layers", "last": 1},
        "projector": {"name": "lora", "rank": 2},
        "backbone": [{"name": "layers", "last": 1}, {"name": "ia3", "targets": ["0.self_attn.k_proj"]}],
    }
    model, batch = made(tree)
    before = values(model.train())
    idle = steps(model, batch)
    moved = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad} - idle
    parts = {name: {n for n, p in part.named_parameters() if p.requires_grad} for name, part in model.parts().items()}
    assert all(name.startswith("model.blocks.5.") for name in parts["vision"])
    assert parts["projector"] == {f"layers.{i}.lora_{f}.default.weight" for i in (0, 2) for f in "AB"}
    assert "model.model.layers.0.self_attn.k_proj.ia3_l.default" in parts["backbone"]
    assert len([name for name in parts["backbone"] if name.startswith("model.model.layers.1.")]) == 9
    assert len(parts["backbone"]) == 10
    # of test_vit's last block the biases of the keys move nothing: softmax does not see them, but they lie in one tensor
    assert idle == set()


def test_steering_and_lora_on_one_backbone() -> None:
    tree = composed("mores")
    alone, _ = made(tree)
    tree["tuning"]["backbone"] = [tree["tuning"]["backbone"], {"name": "lora", "rank": 2, "targets": ["q_proj"]}]
    model, batch = made(tree)
    before = values(model.train())
    assert steps(model, batch) == set()
    moved = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == learning
    assert {n for n, p in alone.named_parameters() if p.requires_grad} == {n for n in learning if "lora_" not in n}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [{"name": "lora", "targets": ["q_proj"]}, {"name": "ia3", "targets": ["q_proj"]}],
            r"tuning.backbone: ia3: another strategy adapts .*0.self_attn.q_proj already",
        ),
        (
            [{"name": "layers", "last": 1}, {"name": "lora"}],
            r"tuning.backbone: lora: another strategy trains .*layers.1.self_attn.q_proj already",
        ),
        ([{"name": "adapter"}, {"name": "layers", "last": 1}], r"tuning.backbone: layers: another strategy adapts"),
    ],
)
def test_two_strategies_that_claim_one_tensor(nodes: list[dict[str, Any]], message: str) -> None:
    tree = composed("lora")
    tree["tuning"]["backbone"] = nodes
    with pytest.raises(ConfigError, match=message):
        build_model(tree)


def test_an_adapter_is_not_loaded_onto_another_base(tmp_path: Path) -> None:
    tree = composed("lora")
    model, _ = made(tree)
    folder = Writer(tmp_path, tree, fingerprints(model), None, ALONE).save(model, {"step": 0})
    other, _ = made({**tree, "seed": 1})
    with pytest.raises(
        CheckpointError, match=r"the frozen weights of (backbone and vision|vision and backbone) are not those"
    ):
        load(folder, other)


def test_beside_quantised_weights_only_the_factors_learn() -> None:
    tree = composed("qlora")
    needs(tree)
    model, _ = made(tree)
    learning = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert learning
    assert all("lora_" in name for name in learning)
    assert {str(p.dtype) for p in model.backbone.model.model.layers[0].mlp.parameters()} == {
        "torch.uint8",
        "torch.float32",
    }


def test_quantised_weights_need_bitsandbytes() -> None:
    if find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ConfigError, match=r"quantize: bitsandbytes is not installed; pip install bitsandbytes"):
        made(composed("qlora"))
