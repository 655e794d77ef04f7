"""Every encoder preset with every backbone preset: they fit, or one line says why not. Nothing is downloaded or loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from mllm_factory import Backbone, ConfigError, Encoder, MultimodalModel, Projector, build, estimate
from mllm_factory.assemble import build_collator
from mllm_factory.config import compose
from mllm_factory.run import check
from mllm_factory.weightless import weightless

CONF = Path(__file__).parents[1] / "conf"
LENGTH = 2048


def presets(group: str) -> dict[str, dict[str, Any]]:
    """The presets of a group whose every value is there."""
    found = {file.stem: yaml.safe_load(file.read_text()) for file in sorted((CONF / group).glob("*.yaml"))}
    return {name: node for name, node in found.items() if "???" not in node.values()}


def reason(error: ConfigError) -> str:
    """The one line of a refusal."""
    text = str(error)
    assert text and "\n" not in text, text
    return text


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, Any]]:
    """Every encoder and backbone, each built once on the meta device."""
    with weightless():
        kinds = {"vision": Encoder, "audio": Encoder, "backbone": Backbone}
        return {g: {name: build(kind, node) for name, node in presets(g).items()} for g, kind in kinds.items()}


def pairs(parts: dict[str, dict[str, Any]], group: str) -> Iterator[tuple[str, Any]]:
    """Label and model of each pair, without tuning."""
    projectors: dict[tuple[int, ...], Any] = {}
    for name, encoder in parts[group].items():
        for language, backbone in parts["backbone"].items():
            sizes = (encoder.dim, backbone.dim, encoder.num_tokens)
            if sizes not in projectors:
                given = dict(zip(("in_dim", "out_dim", "in_tokens"), sizes, strict=True))
                with weightless():
                    projectors[sizes] = build(Projector, {"name": "mlp"}, **given)
            yield f"{name} + {language}", MultimodalModel(backbone, {group: encoder}, {group: projectors[sizes]})


@pytest.mark.parametrize("group", ["vision", "audio"])
def test_each_pair_fits_or_says_why_not(parts: dict[str, dict[str, Any]], group: str) -> None:
    tree = {"data": {"train": None, "max_length": LENGTH, "overflow": "cut"}}
    refused, fitting = {}, 0
    for label, model in pairs(parts, group):
        limit = model.backbone.max_positions
        tree["data"]["max_length"] = length = LENGTH if limit is None else min(LENGTH, limit)
        try:
            build_collator(tree, model)
            room = estimate.context(model, length)
        except ConfigError as error:
            refused[label] = reason(error)
            continue
        fitting += 1
        assert room["text"] == length - sum(room["media"].values()) > 0
        assert room["media"][group] % model.tokens_per_item[group] == 0
    assert fitting >= 0.9 * len(parts[group]) * len(parts["backbone"])
    assert all(line.startswith("data.max_length: ") for line in refused.values()), refused


def test_media_above_the_limit_of_a_backbone_are_refused(parts: dict[str, dict[str, Any]]) -> None:
    """gpt2 has 1,024 positions, so two encoders of 576 and 1,500 tokens find no room."""
    backbone = parts["backbone"]["gpt2"]
    encoder = parts["vision"]["clip_vit_l_336"]
    model = MultimodalModel(backbone, {"vision": encoder}, {"vision": Stub(576, backbone.dim)})
    assert estimate.context(model, 1024) == {
        "media": {"vision": 576},
        "text": 448,
        "max_length": 1024,
        "max_positions": 1024,
    }
    with pytest.raises(
        ConfigError, match=r"data\.max_length: one item of each encoder \(vision 576\) fills all 576 .*takes 1024"
    ):
        estimate.context(model, 576)


class Stub(nn.Module):
    """Says how many tokens it gives."""

    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.linear = nn.Linear(1, dim)


WHOLE = {group: [*presets(group)][::5] for group in ("backbone", "vision")}  # seconds each; every pair is built above


@pytest.mark.slow
@pytest.mark.parametrize("backbone", WHOLE["backbone"])
def test_each_backbone_is_checked_whole(backbone: str) -> None:
    composed = compose("train", [f"backbone={backbone}", "vision=clip_vit_b_32", "data.max_length=512"])
    assert composed.tree is not None and composed.check() == []
    found = check(composed.tree)
    assert found["flops_per_step"] > 0, found["notes"]
    assert found["memory"]["activations"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("vision", WHOLE["vision"])
def test_each_encoder_is_checked_whole(vision: str) -> None:
    composed = compose("train", [f"vision={vision}", "backbone=tiny", "data.max_length=2048"])
    assert composed.tree is not None and composed.check() == []
    found = check(composed.tree)
    assert found["flops_per_step"] > 0, found["notes"]
    assert found["context"]["text"] > 0
