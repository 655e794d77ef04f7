"""Trainable parameters of every method on the shapes of Phi-2 and Vicuna, on the meta device, against published counts."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from mllm_factory import Backbone, MultimodalModel, Tuning, build

SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "phi_2": (
        "phi",
        {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "vicuna_7b": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "vicuna_13b": (
        "llama",
        {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    ),
}
PHI_MLP, LLAMA_MLP = ["fc1", "fc2"], ["gate_proj", "up_proj", "down_proj"]
QKV = ["q_proj", "k_proj", "v_proj"]


def trainable(shape: str, node: dict[str, Any]) -> int:
    architecture, sizes = SHAPES[shape]
    with torch.device("meta"):
        part: Any = build(Backbone, {"name": "hf", "architecture": architecture, "sizes": sizes, "tokenizer": "bytes"})
        build(Tuning, node).apply(part, cast(MultimodalModel, None))
    assert {p.device.type for p in part.parameters()} == {"meta"}
    return sum(p.numel() for p in part.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("shape", "rank", "published"),
    [
        ("phi_2", 128, 188_743_680),
        ("phi_2", 4, 5_898_240),
        ("vicuna_7b", 128, 319_815_680),
        pytest.param("vicuna_13b", 128, 500_695_040, marks=pytest.mark.slow),
    ],
)
def test_lora_on_every_linear_layer(shape: str, rank: int, published: int) -> None:
    assert trainable(shape, {"name": "lora", "rank": rank}) == published


@pytest.mark.parametrize(
    ("shape", "published"),
    [("phi_2", 189_480_960), pytest.param("vicuna_7b", 321_175_552, marks=pytest.mark.slow)],
)
def test_dora_has_a_length_for_each_output_more(shape: str, published: int) -> None:
    assert trainable(shape, {"name": "lora", "rank": 128, "dora": True}) == published


@pytest.mark.parametrize(
    ("shape", "inputs", "published"),
    [("phi_2", ["fc2"], 491_520), ("vicuna_7b", ["down_proj"], 614_400)],
)
def test_ia3_on_keys_values_and_the_feed_forward(shape: str, inputs: list[str], published: int) -> None:
    assert trainable(shape, {"name": "ia3", "targets": ["k_proj", "v_proj"], "inputs": inputs}) == published


@pytest.mark.parametrize(
    ("shape", "targets", "published"),
    [("phi_2", PHI_MLP, 83_886_080), ("vicuna_7b", LLAMA_MLP, 201_326_592)],
)
def test_adapters_of_width_256_in_the_feed_forward(shape: str, targets: list[str], published: int) -> None:
    assert trainable(shape, {"name": "adapter", "width": 256, "targets": targets}) == published


@pytest.mark.parametrize(("shape", "published"), [("phi_2", 39_321_600), ("vicuna_7b", 100_663_296)])
def test_oft_keeps_half_of_the_published_square_blocks(shape: str, published: int) -> None:
    """The published code trains each block in full, b s^2 values a layer; Cayley needs its b s (s - 1) / 2 above the diagonal."""
    ours = trainable(shape, {"name": "oft", "blocks": 16, "targets": QKV})
    size = SHAPES[shape][1]["hidden_size"] // 16
    layers = 3 * SHAPES[shape][1]["num_hidden_layers"]
    assert layers * 16 * size * size == published
    assert ours == layers * 16 * size * (size - 1) // 2
    assert ours == {"phi_2": 19_537_920, "vicuna_7b": 50_135_040}[shape]


def test_vera_learns_two_vectors_a_layer() -> None:
    """32 x (4 x (256 + 2560) + (256 + 10240) + (256 + 2560)), by hand."""
    assert trainable("phi_2", {"name": "vera", "rank": 256}) == 32 * (4 * 2816 + 10496 + 2816)
