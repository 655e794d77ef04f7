"""One class for every family of decoders: composite logits, padding and generation against the plain transformers model."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from mllm_factory import Backbone, Batch, ConfigError, MultimodalModel, build
from mllm_factory.types import ASSISTANT, TEXT

LENGTH = 24  # of the test texts: three times the sliding window
DENSE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ALL_HEADS = {**DENSE, "num_key_value_heads": 4}
HEADS = {**DENSE, "head_dim": 8}
WINDOW = {**DENSE, "sliding_window": 8}
FEW = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
TURNS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**DENSE, "head_dim": 8},
    "phi": {**ALL_HEADS, "rope_parameters": PARTIAL},
    "phi3": {**WINDOW, "original_max_position_embeddings": 64},
    "qwen2": {**DENSE, "tie_word_embeddings": True},
    "qwen3": {**HEADS, "tie_word_embeddings": True},
    "gemma": {**HEADS, "num_key_value_heads": 1},
    "gemma2": {**HEADS, "sliding_window": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**HEADS, "sliding_window": 8, "layer_types": TURNS, "tie_word_embeddings": False},
    "stablelm": {**DENSE, "use_qkv_bias": True},
    "olmo2": DENSE,
    "mistral": {**WINDOW, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**FEW, "intermediate_size": 64},
    "opt": {**FEW, "ffn_dim": 64, "word_embed_proj_dim": 16},  # narrower embeddings than hidden states
    "falcon": {**FEW, "new_decoder_architecture": True, "num_kv_heads": 2},
    "smollm3": {**DENSE, "no_rope_layers": [1, 0, 1], "layer_types": ["full_attention"] * 3},
    "internlm3": {**DENSE, "head_dim": 8},
    "granite": {**DENSE, "embedding_multiplier": 3.0, "logits_scaling": 7.0, "residual_multiplier": 0.5},
    "cohere": {**DENSE, "logit_scale": 0.3},
    "cohere2": {**WINDOW, "logit_scale": 0.3, "layer_types": TURNS},
    "starcoder2": WINDOW,
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "tie_word_embeddings": False},
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "modernbert-decoder": {**FEW, "intermediate_size": 64, "local_attention": 8},  # get_decoder() names its head
    "minicpm3": {  # divides hidden states before the head
        **ALL_HEADS,
        "dim_model_base": 8,
        "tie_word_embeddings": False,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "llama4_text": {  # names no decoder at all
        **HEADS,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 8,
    },
    "mixtral": {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
}
NO_SDPA = {"gemma2", "bloom", "mpt", "gptj"}


def node(architecture: str, **options: Any) -> dict[str, Any]:
    return {
        "name": "hf",
        "architecture": architecture,
        "sizes": FAMILIES[architecture],
        "tokenizer": "bytes",
        **options,
    }


def made(architecture: str, **options: Any) -> Any:
    """A backbone with weights so large that every score differs."""
    torch.manual_seed(0)
    part: Any = build(Backbone, node(architecture, **options))
    with torch.no_grad():
        for weight in part.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.2)
    return part.eval()


@cache
def kept(architecture: str) -> Any:
    return made(architecture)


@pytest.fixture(params=list(FAMILIES))
def each(request: pytest.FixtureRequest) -> Any:
    return kept(request.param)


def text(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(0, 256, (rows, length))


def batch_of(ids: Tensor, mask: Tensor) -> Batch:
    """Text alone, every position but the first labelled."""
    labels = ids.masked_fill(~mask, -100)
    full = torch.full_like(ids, TEXT)
    return Batch(ids, labels, mask, full, torch.full_like(ids, ASSISTANT), {}, {})


def counted(mask: Tensor) -> dict[str, Tensor]:
    """Mask and positions as transformers' own generation makes them."""
    places = mask.long().cumsum(-1) - 1
    return {"attention_mask": mask.long(), "position_ids": places.masked_fill(~mask, 0)}


# ---------------------------------------------------------------- the whole model is the oracle


@torch.no_grad()
def test_text_through_the_composite_is_the_plain_model_bit_for_bit(each: Any) -> None:
    ids = text()
    whole = each.model(input_ids=ids).logits
    model = MultimodalModel(each, {}, {}).eval()
    batch = batch_of(ids, torch.ones_like(ids).bool())
    assert torch.equal(each.logits(each(model.embed(batch), model._mask(batch))), whole)
    output = model(batch, logits=True)
    wanted = whole[:, :-1].flatten(0, 1)
    torch.testing.assert_close(output.logits, wanted, atol=1e-5, rtol=1e-5)  # fewer rows in one product
    loss = torch.nn.functional.cross_entropy(wanted, ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(output.loss_sum, loss)


@torch.no_grad()
def test_padding_on_the_left_is_the_librarys_bit_for_bit(each: Any) -> None:
    ids = text()
    mask = torch.arange(LENGTH)[None] >= torch.tensor([[5], [0]])
    given = counted(mask) if each._takes_positions else {"attention_mask": mask.long()}
    whole = each.model(input_ids=ids, **given).logits
    model = MultimodalModel(each, {}, {}).eval()
    batch = batch_of(ids, mask)
    assert batch.left_padded
    parts = each.logits(each(model.embed(batch), model._mask(batch)))
    assert torch.equal(parts[mask], whole[mask])
    alone = each.model(input_ids=ids[:1, 5:]).logits  # the same text with no padding at all
    torch.testing.assert_close(parts[:1, 5:], alone, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_padding_on_the_right_needs_no_mask(each: Any) -> None:
    ids = text()
    mask = torch.arange(LENGTH)[None] < torch.tensor([[LENGTH - 7], [LENGTH]])
    model = MultimodalModel(each, {}, {}).eval()
    batch = batch_of(ids, mask)
    assert model._mask(batch) is None
    parts = each.logits(each(model.embed(batch), None))
    masked = each.model(input_ids=ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(parts[mask], masked[mask], atol=2e-4, rtol=1e-3)
    assert torch.equal(parts, each.model(input_ids=ids).logits)


def test_generation_cached_and_uncached_is_the_librarys_greedy_search(each: Any) -> None:
    ids = text(2, 12)  # with 10 new tokens beyond the window
    mask = torch.arange(12)[None] >= torch.tensor([[4], [0]])
    greedy = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=300, pad_token_id=256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = each.model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=greedy)[:, 12:]
    options = {"max_new_tokens": 10, "stop_ids": [300]}
    assert torch.equal(each.generate(each.embed(ids), mask, **options), whole)
    assert torch.equal(each.generate(each.embed(ids), mask, use_cache=False, **options), whole)
    assert whole.unique().numel() > 2  # a model that repeats itself would prove little


def test_layers_are_run_in_order(each: Any) -> None:
    seen: list[int] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, _o, i=i: seen.append(i)) for i, layer in enumerate(each.layers)]
    with torch.no_grad():
        each(each.embed(text(1, 3)))
    for hook in hooks:
        hook.remove()
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "granite", "opt"])
@torch.no_grad()
def test_bfloat16_is_bit_for_bit_too(architecture: str) -> None:
    part, ids = made(architecture, dtype="bfloat16"), text()
    assert torch.equal(part.logits(part(part.embed(ids))), part.model(input_ids=ids).logits)


# ---------------------------------------------------------------- what makes families differ


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3_text"])
def test_gemma_scales_token_embeddings_by_the_root_of_the_width(architecture: str) -> None:
    part, ids = kept(architecture), text()
    table = part.model.get_input_embeddings().weight
    assert torch.equal(part.embed(ids), table[ids] * torch.tensor(32**0.5))


@pytest.mark.parametrize(
    "architecture", ["phi3", "mistral", "starcoder2", "gemma2", "gemma3_text", "cohere2", "mixtral"]
)
@torch.no_grad()
def test_a_sliding_window_hides_what_lies_before_it(architecture: str) -> None:
    """Without the window the first tokens are the same and those beyond it are not: the tests above do pass it."""
    sizes = {**FAMILIES[architecture], "sliding_window": 1000}
    narrow, wide, ids = kept(architecture), made(architecture, sizes=sizes), text()
    one, other = (part.logits(part(part.embed(ids))) for part in (narrow, wide))
    torch.testing.assert_close(one[:, :8], other[:, :8], atol=1e-5, rtol=1e-4)
    assert (one[:, 8:] - other[:, 8:]).abs().amax(dim=(0, 2)).min() > 1e-3


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
@torch.no_grad()
def test_learnt_positions_count_the_unpadded_tokens(architecture: str) -> None:
    part, ids = kept(architecture), text(1)
    mask = torch.arange(LENGTH)[None] >= 6
    embeds = part.embed(ids)
    torch.testing.assert_close(part(embeds, mask)[:, 6:], part(embeds[:, 6:]), atol=2e-5, rtol=1e-4)
    shifted = part.model(input_ids=ids, **{**counted(mask), "position_ids": torch.arange(LENGTH)[None]}).logits
    assert not torch.allclose(part.logits(part(embeds, mask))[:, 6:], shifted[:, 6:], atol=1e-3)


@torch.no_grad()
def test_scores_are_finished_as_the_papers_say() -> None:
    """By hand: Cohere multiplies, Granite divides, MiniCPM divides before the head, Gemma 2 caps with tanh."""
    hidden = torch.randn(5, 32)
    by_hand = {
        "cohere": lambda head: head(hidden) * 0.3,
        "granite": lambda head: head(hidden) / 7.0,
        "minicpm3": lambda head: head(hidden / (32 / 8)),
        "gemma2": lambda head: torch.tanh(head(hidden) / 2.0) * 2.0,
    }
    for architecture, formula in by_hand.items():
        part = kept(architecture)
        torch.testing.assert_close(part.logits(hidden), formula(part.model.lm_head))
        assert part.logits(hidden[0]).shape == (261,)


def test_the_default_kernel_is_the_best_the_architecture_has(each: Any) -> None:
    kind = each.model.config.model_type
    assert each.model.config._attn_implementation == ("eager" if kind in NO_SDPA else "sdpa")


@pytest.mark.parametrize("architecture", sorted(NO_SDPA))
def test_a_kernel_asked_for_by_name_is_refused_in_one_line(architecture: str) -> None:
    with pytest.raises(ConfigError, match="no 'sdpa' for this model here .* set attention: null") as caught:
        build(Backbone, node(architecture, attention="sdpa"))
    assert "\n" not in str(caught.value)


def test_the_head_leaves_the_model_as_it_was_and_passes_gradients(each: Any) -> None:
    modules = dict(each.model.named_modules())
    hidden = torch.randn(2, 3, 16 if each.model.config.model_type == "opt" else 32, requires_grad=True)
    each.logits(hidden).square().sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
    assert each.model.get_output_embeddings().weight.grad.abs().sum() > 0
    each.zero_grad()
    assert {name: id(module) for name, module in each.model.named_modules()} == {k: id(m) for k, m in modules.items()}
