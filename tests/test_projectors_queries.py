"""Projectors with learned queries, against transformers' modules with the same weights and against formulas."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from mllm_factory import ConfigError, Projector, build

D, OUT, T = 8, 10, 7


def projector(name: str, **options: Any) -> Any:
    return build(Projector, {"name": name, **options}, in_dim=D, out_dim=OUT, in_tokens=T)


def preset(name: str) -> dict[str, Any]:
    text = (Path(__file__).parent.parent / "conf" / "projector" / f"{name}.yaml").read_text(encoding="utf-8")
    node: dict[str, Any] = yaml.safe_load(text)
    return node


# ---------------------------------------------------------------- resampler


def flamingo(part: Any, depth: int, heads: int, head_dim: int, latents: int) -> Any:
    """transformers' Flamingo resampler with the weights of ours."""
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    options = SimpleNamespace(qk_layer_norms_perceiver=False)
    config: Any = SimpleNamespace(perceiver_config=options, vision_config=SimpleNamespace(embed_dim=D))
    theirs: Any = IdeficsPerceiverResampler(config, D, depth, heads, head_dim, latents)
    theirs.latents.data.copy_(part.latents)
    theirs.layer_norm.load_state_dict(part.norm.state_dict())
    for (attention, ffn), layer in zip(theirs.blocks, part.layers, strict=True):
        attention.context_layer_norm.load_state_dict(layer.norm_x.state_dict())
        attention.latents_layer_norm.load_state_dict(layer.norm_z.state_dict())
        attention.q_proj.weight.data.copy_(layer.q.weight)
        attention.k_proj.weight.data.copy_(layer.kv.weight.chunk(2)[0])
        attention.v_proj.weight.data.copy_(layer.kv.weight.chunk(2)[1])
        attention.output_proj.weight.data.copy_(layer.out.weight)
        ffn.act = nn.GELU()
        for mine, own in ((ffn.ln, layer.ffn[0]), (ffn.fc, layer.ffn[1]), (ffn.c_proj, layer.ffn[3])):
            mine.load_state_dict(own.state_dict())
    return theirs


def test_the_resampler_is_flamingos() -> None:
    part = projector("resampler", num_tokens=5, depth=3, heads=2, head_dim=6)
    for parameter in part.parameters():
        parameter.data = torch.randn_like(parameter) / 2
    x = torch.randn(3, T, D)
    theirs = flamingo(part, 3, 2, 6, 5)
    torch.testing.assert_close(part(x), part.outer(theirs(x)), rtol=1e-4, atol=1e-5)
    assert part(x).shape == (3, part.num_tokens, OUT) == (3, 5, OUT)


def test_features_of_another_width_pass_a_linear_layer_first() -> None:
    part = projector("resampler", num_tokens=5, depth=1, hidden_dim=12)
    narrow = build(Projector, {"name": "resampler", "num_tokens": 5, "depth": 1}, in_dim=12, out_dim=OUT, in_tokens=T)
    narrow.load_state_dict({k: v for k, v in part.state_dict().items() if not k.startswith("inner")})
    x = torch.randn(2, T, D)
    torch.testing.assert_close(part(x), narrow(x @ part.inner.weight.T + part.inner.bias))


@pytest.mark.parametrize("name", ["resampler", "qformer"])
def test_the_order_of_features_does_not_matter_and_their_values_do(name: str) -> None:
    part = projector(name, num_tokens=3, depth=2).eval()
    x = torch.randn(2, T, D)
    torch.testing.assert_close(part(x), part(x.flip(1)), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(part(x), part(x + torch.randn_like(x)), atol=1e-4)


# ---------------------------------------------------------------- qformer


def test_the_qformer_is_that_of_transformers() -> None:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    part = projector("qformer", num_tokens=4, depth=3, hidden_dim=16, heads=2, cross_every=2).train()
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    config = Blip2QFormerConfig(**sizes, encoder_hidden_size=D)
    config._attn_implementation = "eager"
    theirs = Blip2QFormerModel(config).eval()
    theirs.load_state_dict(part.model.state_dict())
    x = torch.randn(2, T, D)
    queries = part.queries.repeat(2, 1, 1)
    read = theirs(query_embeds=queries, encoder_hidden_states=x)[0]
    torch.testing.assert_close(part(x), read @ part.outer.weight.T + part.outer.bias)


@pytest.mark.parametrize(("every", "reading"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3]), (9, [0])])
def test_every_nth_layer_reads_the_features(every: int, reading: list[int]) -> None:
    part = projector("qformer", depth=4, hidden_dim=16, heads=2, cross_every=every)
    layers = part.model.encoder.layer
    assert [i for i, layer in enumerate(layers) if hasattr(layer, "crossattention")] == reading
    assert {p.shape[1] for n, p in part.named_parameters() if n.endswith("crossattention.attention.key.weight")} == {D}


def test_the_qformer_of_blip2_has_the_size_its_structure_says() -> None:
    """12 layers of BERT base, 6 of them with cross-attention to 1408 features, 32 queries, a linear layer to OPT-2.7B."""
    with torch.device("meta"):
        part = build(Projector, {"name": "qformer"}, in_dim=1408, out_dim=2560, in_tokens=257)
    h, wide, norm = 768, 1408, 2 * 768
    own = 4 * (h * h + h) + norm + (h * 4 * h + 4 * h) + (4 * h * h + h) + norm
    cross = 2 * (h * h + h) + 2 * (wide * h + h) + norm
    expected = norm + 12 * own + 6 * cross + 32 * h + (h * 2560 + 2560)
    assert sum(p.numel() for p in part.parameters()) == expected == 107_130_880


def test_dropout_only_while_it_learns() -> None:
    part = projector("qformer", num_tokens=3, depth=1, hidden_dim=16, heads=2, dropout=0.5)
    x = torch.randn(1, T, D)
    assert not torch.equal(part.train()(x), part(x))
    assert torch.equal(part.eval()(x), part(x))


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize(("window", "queries"), [(2, 1), (3, 2), (7, 1)])
def test_a_window_is_what_the_plain_qformer_reads_alone(window: int, queries: int) -> None:
    sizes = {"num_tokens": queries, "depth": 2, "hidden_dim": 16, "heads": 2}
    part = projector("qformer", **sizes, window=window)
    plain = build(Projector, {"name": "qformer", **sizes}, in_dim=D, out_dim=OUT, in_tokens=window)
    plain.load_state_dict(part.state_dict())
    x = torch.randn(2, T, D)
    alone = [plain(x[:, start : start + window]) for start in range(0, T - window + 1, window)]
    assert part.num_tokens == queries * len(alone)
    torch.testing.assert_close(part(x), torch.cat(alone, dim=1))


def test_salmonn_reads_30_seconds_with_88_tokens() -> None:
    """Whisper's encoder gives 1,500 features of 30 s; a window of 0.333 s is round(1500 / 30 * 0.333) = 17 of them."""
    with torch.device("meta"):
        part = build(Projector, preset("qformer_window"), in_dim=1280, out_dim=4096, in_tokens=1500)
        assert part(torch.empty(2, 1500, 1280)).shape == (2, part.num_tokens, 4096) == (2, 88, 4096)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        *(
            ("resampler", {o: 0}, f"{o}: 0 is no size")
            for o in ("num_tokens", "depth", "heads", "head_dim", "hidden_dim")
        ),
        *(("qformer", {o: 0}, f"{o}: 0 is no size") for o in ("num_tokens", "depth", "heads", "cross_every")),
        ("qformer", {"hidden_dim": 10, "heads": 3}, "heads: 3 do not divide hidden_dim: 10"),
        ("qformer", {"dropout": 1.0}, "dropout: 1.0 is no probability"),
        ("qformer", {"window": 0}, f"window: 0 features of the {T} of an item; use 1 to {T}"),
        ("qformer", {"window": 8}, f"window: 8 features of the {T} of an item; use 1 to {T}"),
    ],
)
def test_sizes_that_make_no_sense(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        projector(name, **options)
