"""Samples that share rows: the layout by its rules, and everything a model does against the same samples unpacked."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from toys import Colours, tree

from mllm_factory import Backbone, Batch, ConfigError, build
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.components.backbones.packed_attention import samples
from mllm_factory.components.metrics.attention_capture import observe
from mllm_factory.components.tuning.positions import Positions
from mllm_factory.packing import lay_out, require_packable
from mllm_factory.types import Packing

# ---------------------------------------------------------------- the layout


@pytest.mark.parametrize("seed", range(20))
def test_every_position_has_one_place_and_samples_stay_whole(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.choice([1, 3, 9, 40]) + draw.randint(0, 20) for _ in range(draw.randint(1, 24))]
    limit = max(lengths) + draw.randint(0, 100)
    packing = lay_out(lengths, max(lengths), limit)
    R, L = packing.source.shape
    assert max(lengths) <= L <= limit
    assert len(lengths) * max(lengths) >= R * L, "never more area than one sample a row"
    seen = torch.zeros(R * L, dtype=torch.long)
    for b, n in enumerate(lengths):
        places = packing.place[b, :n]
        assert (places.diff() == 1).all() and places[0] // L == places[-1] // L, "side by side in one row"
        assert packing.source.flatten()[places].tolist() == [b * max(lengths) + t for t in range(n)]
        assert packing.position.flatten()[places].tolist() == list(range(n))
        seen[places] += 1
        assert (packing.place[b, n:] == 0).all()
    assert seen.max() == 1 and int(seen.sum()) == sum(lengths)
    for row, starts in zip(packing.position, (packing.position == 0), strict=True):
        ends = [*starts.nonzero()[:, 0].tolist(), L]
        for a, b in pairwise(ends):
            assert row[a:b].tolist() == list(range(b - a)), "positions count from each start, unused places too"


def test_short_samples_fill_up_beside_long_ones() -> None:
    assert lay_out([100, 10, 20, 30, 40], 100, 512).source.shape == (2, 100)
    assert lay_out([5, 5, 5, 5], 5, 512).source.shape == (4, 5), "nothing to gain: one sample a row"
    long_tailed = [400, *[20] * 40]
    assert lay_out(long_tailed, 400, 512).source.numel() == 1200


# ---------------------------------------------------------------- models

PARTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 256,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    },
    "gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
}


def model_and_batch(architecture: str = "llama", tuning: dict[str, Any] | None = None) -> tuple[Any, Batch, Batch]:
    """A toy model, a batch of pictures, texts and uneven lengths, and the same packed."""
    node = tree()
    sizes = (
        dict(PARTS[architecture]) if architecture == "gpt2" else {**node["backbone"]["sizes"], **PARTS[architecture]}
    )
    sizes |= {"initializer_range": 0.3}  # so large that samples which see one another answer otherwise
    node["backbone"] |= {"architecture": architecture, "sizes": sizes}
    if tuning is not None:
        node["tuning"]["backbone"] = tuning
    model = build_model(node)
    collator = build_collator(node, model)
    source = Colours(16, text_every=3)
    samples = [source[i] for i in range(9)]
    return model, collator(samples), collator.for_training(packing=True)(samples)


def run(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(batch, logits=True)
    output.loss_sum.backward()
    return (
        output.loss_sum.detach(),
        output.logits.detach(),
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("architecture", PARTS)
def test_loss_and_gradients_are_those_of_the_samples_unpacked(architecture: str) -> None:
    model, plain, packed = model_and_batch(architecture)
    assert packed.packing is not None and packed.packing.source.shape[0] < len(plain.ids)
    (loss, logits, grads), (loss_p, logits_p, grads_p) = run(model, plain), run(model, packed)
    torch.testing.assert_close(loss_p, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits_p, logits, rtol=1e-5, atol=1e-5)
    assert grads.keys() == grads_p.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grads_p[name], grad, rtol=1e-4, atol=1e-5, msg=name)
    wrong = replace(
        packed,
        packing=replace(
            packed.packing, position=torch.arange(packed.packing.source.shape[1]).expand_as(packed.packing.source)
        ),
    )
    assert not torch.allclose(model(wrong).loss_sum, loss, rtol=1e-4), "samples that see one another give another loss"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_samples_one_by_one_are_the_mask_of_the_library(architecture: str) -> None:
    """The same hidden states, and a mask that transformers makes after a packed batch as before."""
    model, plain, packed = model_and_batch(architecture)
    backbone = model.backbone
    assert backbone._apart
    before, apart = run(model, plain), run(model, packed)
    backbone._apart = False
    masked, after = run(model, packed), run(model, plain)
    torch.testing.assert_close(apart[1], masked[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)
    left = torch.ones(2, 5, dtype=torch.bool)
    left[0, :2] = False
    embeds = backbone.embed(torch.arange(10).view(2, 5))
    torch.testing.assert_close(backbone(embeds, left)[0, 2:], backbone(embeds[:1, 2:])[0], rtol=1e-4, atol=1e-5)


def test_stretches_of_positions() -> None:
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4], [3, 4, 0, 0, 1]])
    assert samples(positions) == [(0, 0, 2), (0, 2, 5), (1, 0, 5), (2, 0, 2), (2, 2, 3), (2, 3, 5)]


@pytest.mark.parametrize("placement", ["block_input", "block_output"])
@pytest.mark.parametrize("positions", ["f1+l1", "ratio:0.5", "all"])
def test_mores_steers_the_same_tokens_of_each_sample(placement: str, positions: str) -> None:
    tuning = {
        "name": "mores",
        "rank": 2,
        "positions": positions,
        "modalities": ["vision", "text"],
        "placement": placement,
    }
    model, plain, packed = model_and_batch(tuning={**tuning, "init": "random"})
    (loss, logits, grads), (loss_p, logits_p, grads_p) = run(model, plain), run(model, packed)
    assert any("base" in name for name in grads)
    torch.testing.assert_close(logits_p, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss_p, loss, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_p[name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_steered_places_are_those_of_the_row_moved() -> None:
    _, plain, packed = model_and_batch()
    picked = Positions("f1+l2", "vision", 0)
    here, there = picked.places(plain, False), picked.places(packed, False)
    R, L = packed.packing.source.shape
    assert there.size == (R, L) and here.size == tuple(plain.input_ids.shape)
    T = plain.input_ids.shape[1]
    assert packed.packing.source[there.rows, there.columns].tolist() == (here.rows * T + here.columns).tolist()


def test_recomputed_layers_give_the_same() -> None:
    model, plain, packed = model_and_batch(tuning={"name": "mores", "rank": 2, "positions": "all", "init": "random"})
    before = run(model, plain)[2]
    again = copy.deepcopy(model)
    again.checkpoint_activations()
    for name, grad in run(again, packed)[2].items():
        torch.testing.assert_close(grad, before[name], rtol=1e-4, atol=1e-5, msg=name)


def test_attention_statistics_are_those_of_each_sample() -> None:
    model, plain, packed = model_and_batch()
    found = []
    for batch in (plain, packed):
        with observe(model) as recorder, torch.no_grad():
            model(batch)
        found.append(recorder.stats())
    for name in ("mass", "count", "rows", "visible", "size"):
        torch.testing.assert_close(getattr(found[1], name), getattr(found[0], name))
    assert not model.unpacked


def test_a_batch_moves_with_its_packing() -> None:
    _, _, packed = model_and_batch()
    moved = packed.to("meta").packing
    assert isinstance(moved, Packing) and moved.place.device.type == moved.source.device.type == "meta"


# ---------------------------------------------------------------- backbones that cannot


def toy(architecture: str, **sizes: Any) -> Backbone:
    return build(Backbone, {"name": "hf", "architecture": architecture, "sizes": sizes, "tokenizer": "bytes"})


def test_backbones_that_mix_samples_up_are_refused() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 300}
    for architecture in ("llama", "gpt2", "gemma2"):
        model, *_ = model_and_batch(architecture)
        require_packable(model.backbone)
    recurrent = toy("mamba", **small, state_size=4, expand=1, time_step_rank=2)
    with pytest.raises(ConfigError, match=r"trainer.packing: Mamba.* (takes no position|does not keep|cannot run)"):
        require_packable(recurrent)
    bloom = toy("bloom", hidden_size=16, n_layer=1, n_head=2, vocab_size=300)
    with pytest.raises(ConfigError, match=r"trainer.packing: Bloom.*; set trainer.packing=false"):
        require_packable(bloom)


class Plain(Backbone):
    """Knows rows of one sample only."""

    def forward(self, embeds: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        return embeds


def test_a_backbone_without_positions_is_refused() -> None:
    Plain.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="Plain takes no positions, so samples cannot share a row"):
        require_packable(Plain())
