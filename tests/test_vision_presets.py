"""Every vision preset: its sizes are those its first line tells, its hub id is the library's own, its parameters the published."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import yaml
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from mllm_factory import Encoder, build

CONF = Path(str(find_spec("mllm_factory.conf").origin)).parent / "vision"  # type: ignore[union-attr]
OURS = ("timm", "open_clip", "hf_vision", "patch")
PRESETS = {
    file.stem: node
    for file in sorted(CONF.glob("*.yaml"))
    if (node := yaml.safe_load(file.read_text(encoding="utf-8")))["name"] in OURS
}
PUBLISHED = {  # parameters of the whole vision tower
    "clip_vit_b_32": 87_456_000,
    "clip_vit_l_336": 303_507_456,
    "siglip_b_224": 92_884_224,
    "siglip_so400m_384": 428_225_600,
    "dinov2_s": 22_056_576,
    "dinov2_b": 86_580_480,
    "dinov2_l": 304_368_640,
}


def on_meta(name: str, **options: Any) -> Any:
    with torch.device("meta"):
        return build(Encoder, {**PRESETS[name], **options})


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_offline_with_the_sizes_it_tells(name: str) -> None:
    part = on_meta(name)
    told = re.search(r"(\d+) tokens(?: of width (\d+))?", (CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    if told:
        assert part.num_tokens == int(told[1])
        assert told[2] is None or part.dim == int(told[2])
    else:
        assert name == "timm"


@pytest.mark.parametrize("name", [n for n, node in PRESETS.items() if node["name"] == "hf_vision"])
def test_what_is_kept_is_the_tower_without_what_lies_behind(name: str) -> None:
    """Counted by transformers: the whole tower less its last block, and less what only the pooled output uses."""
    node = PRESETS[name]
    config = CONFIG_MAPPING[node["architecture"]](**node["sizes"])
    model_class: Any = MODEL_MAPPING[type(config)]
    with torch.device("meta"):
        tower = model_class._from_config(config)
    (blocks,) = [
        m for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == config.num_hidden_layers
    ]
    cut = count(blocks[-1])
    for child in ("post_layernorm", "layernorm", "norm", "head", "pooler"):
        cut += count(getattr(tower, child, None) or torch.nn.Identity())
    mask = getattr(tower.embeddings, "mask_token", None)
    cut += 0 if mask is None else mask.numel()
    assert count(on_meta(name)) == count(tower) - cut
    if name in PUBLISHED:
        assert count(tower) == PUBLISHED[name]


def test_the_tokens_and_widths_of_the_papers() -> None:
    for name, tokens, dim in (("clip_vit_l_336", 576, 1024), ("siglip_so400m_384", 729, 1152), ("dinov2_l", 576, 1024)):
        part = on_meta(name)
        assert (part.num_tokens, part.dim) == (tokens, dim)
    both = on_meta("clip_vit_l_336", select="cls_patch"), on_meta("open_clip_vit_l_336", prefix_tokens=True)
    assert [part.num_tokens for part in both] == [577, 577]
    assert [count(part) for part in both] == [303_507_456 - 12_596_224 - 2048] * 2


@pytest.mark.parametrize(
    "name", [n for n, node in PRESETS.items() if node.get("pretrained") and node["name"] != "patch"]
)
def test_hub_ids_are_those_the_library_lists(name: str) -> None:
    node = PRESETS[name]
    if node["name"] == "open_clip":
        tags = open_clip.list_pretrained_tags_by_model(node["architecture"])
        listed = [open_clip.get_pretrained_cfg(node["architecture"], tag)["hf_hub"].rstrip("/") for tag in tags]
        assert node["pretrained"] in listed
    elif node["name"] == "timm" and not node["pretrained"].startswith("pkg://"):
        tag = node["pretrained"].rpartition("/")[2]
        config = timm.get_pretrained_cfg(tag)
        assert config is not None
        assert tag.startswith(f"{node['architecture']}.")
        assert (config.hf_hub_id, config.hf_hub_filename) == (node["pretrained"], None)
    elif node["name"] == "hf_vision":
        assert re.fullmatch(r"(openai|google|facebook)/[\w.-]+", node["pretrained"])


def test_every_family_has_a_small_preset_without_weights() -> None:
    small = {
        node["name"]
        for name, node in PRESETS.items()
        if not node.get("pretrained") and count(on_meta(name)) < 8_000_000
    }
    assert small == set(OURS)
