"""Prefix tuning against attention written out, transformers' own cache, peft, and the same model behind real tokens."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_toys import ARCHITECTURES, EAGER, brute_mass, left, made, samples
from torch import Tensor, nn
from toys import tree

from mllm_factory import IGNORE_INDEX, SYSTEM, TEXT, Batch, ConfigError, MultimodalModel, Tuning, build
from mllm_factory.assemble import build_model
from mllm_factory.components.metrics.attention_capture import observe
from mllm_factory.components.metrics.attention_groups import GROUPS
from mllm_factory.components.metrics.attention_routes import Routes
from mllm_factory.components.tuning.prefix import words
from mllm_factory.packing import lay_out, require_packable
from mllm_factory.weightless import weightless

P = 3
NEAR: dict[str, Any] = {"rtol": 0, "atol": 1e-5}
FULL = ["llama", "qwen3", "phi", "gpt2", "opt", "gpt_neox"]
ROTARY = ["llama", "qwen3", "phi", "gpt_neox"]


def tuned(architecture: str = "llama", kernel: str | None = None, init: str = "random", **sizes: Any) -> Any:
    """A model with a prefix that is far from small, its untouched twin, and their collator."""
    model, collator = made(architecture, **sizes)
    if kernel is not None:
        model.backbone.model.set_attn_implementation(kernel)
    plain = deepcopy(model)
    apply(model, init=init)
    if init == "random":
        with torch.no_grad():
            for p in model.backbone.prefix.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model, plain, collator


def apply(model: MultimodalModel, seed: int = 5, **options: Any) -> Tuning:
    strategy = build(Tuning, {"name": "prefix", "length": P, **options}, "tuning.backbone")
    torch.manual_seed(seed)
    strategy.apply(model.backbone, model)
    return strategy


@torch.no_grad()
def own(model: Any, plain: MultimodalModel, embeds: Tensor, mask: Tensor, **more: Any) -> Any:
    """The untouched decoder with a cache of transformers that was filled with the prefix by hand."""
    from transformers import DynamicCache

    filled, prefix = DynamicCache(), model.backbone.prefix
    for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        filled.update(k.expand(len(embeds), -1, -1, -1), v.expand(len(embeds), -1, -1, -1), layer)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    wide = nn.functional.pad(mask.long(), (P, 0), value=1)
    decoder: Any = plain.backbone.model.get_decoder()
    return decoder(inputs_embeds=embeds, attention_mask=wide, position_ids=positions, past_key_values=filled, **more)


def behind(batch: Batch, ids: Tensor) -> Batch:
    """The same rows with these tokens in front of each row's first, as a system's words."""
    fills = {"labels": IGNORE_INDEX, "attention_mask": True, "modality": TEXT, "role": SYSTEM, "input_ids": ids[0]}
    pads = batch.attention_mask.int().argmax(1).tolist()

    def wider(name: str) -> Tensor:
        rows = getattr(batch, name)
        new = torch.empty(P, dtype=rows.dtype).copy_(torch.as_tensor(fills[name]))
        return torch.stack([torch.cat([row[:n], new, row[n:]]) for row, n in zip(rows, pads, strict=True)])

    return replace(batch, **{name: wider(name) for name in fills}, left_padded=None)


def same_words(plain: MultimodalModel) -> Tensor:
    """What ``apply`` drew."""
    torch.manual_seed(5)
    return words(plain.backbone.tokenizer, P)


# ---------------------------------------------------------------- what is computed


def test_attention_of_a_layer_is_the_formula() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, _, _ = tuned()
    decoder = model.backbone.model.model
    layer, x = decoder.layers[1].self_attn, torch.randn(2, 5, 16)
    cos, sin = decoder.rotary_emb(x, torch.arange(5)[None])
    q, k, v = (linear(x).view(2, 5, -1, 4).transpose(1, 2) for linear in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    rows = []
    for b in range(2):
        for i in range(5):
            heads = []
            for h in range(4):
                K = torch.cat([model.backbone.prefix.keys[1, h // 2], k[b, h // 2, : i + 1]])
                V = torch.cat([model.backbone.prefix.values[1, h // 2], v[b, h // 2, : i + 1]])
                heads.append(torch.softmax(q[b, h, i] @ K.T / 2, 0) @ V)
            rows.append(torch.cat(heads))
    expected = layer.o_proj(torch.stack(rows).view(2, 5, 16))
    seen: list[Tensor] = []

    def swap(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "hidden_states": x}

    layer.register_forward_pre_hook(swap, with_kwargs=True)
    layer.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    model.backbone(torch.randn(2, 5, 16))
    torch.testing.assert_close(seen[0], expected, **NEAR)


@pytest.mark.parametrize("architecture", FULL)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_hidden_states_are_those_of_transformers_own_cache(architecture: str, kernel: str) -> None:
    model, plain, collator = tuned(architecture, kernel)
    batch = collator(samples(0, 1, 2))
    assert not batch.attention_mask.all()
    for padded in (batch, left(batch)):
        embeds, mask = plain.embed(padded), padded.attention_mask
        expected = own(model, plain, embeds, mask, use_cache=False).last_hidden_state
        found = model.backbone(embeds, mask if padded.left_padded else None)
        torch.testing.assert_close(found[mask], expected[mask], **NEAR)
        assert (plain.backbone(embeds, mask)[mask] - expected[mask]).abs().max() > 0.1, "the prefix does something"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_greedy_tokens_with_and_without_a_cache(architecture: str, kernel: str) -> None:
    model, plain, collator = tuned(architecture, kernel)
    batch = collator.prompts(samples(0, 1, 2))
    assert batch.left_padded
    embeds, mask, ids = plain.embed(batch), batch.attention_mask, []
    for _ in range(6):
        hidden = own(model, plain, embeds, mask, use_cache=False).last_hidden_state
        ids.append(plain.backbone.logits(hidden[:, -1]).argmax(-1))
        embeds = torch.cat([embeds, plain.backbone.embed(ids[-1][:, None])], 1)
        mask = nn.functional.pad(mask, (0, 1), value=True)
    for use_cache in (True, False):
        given = {"max_new_tokens": 6, "stop_ids": [], "use_cache": use_cache}
        found = model.backbone.generate(plain.embed(batch), batch.attention_mask, **given)
        assert found.tolist() == torch.stack(ids, 1).tolist()
    nothing = plain.backbone.generate(plain.embed(batch), batch.attention_mask, max_new_tokens=6, stop_ids=[])
    assert nothing.tolist() != torch.stack(ids, 1).tolist()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_batch_of_several_rows_is_each_row_alone(architecture: str) -> None:
    model, _, collator = tuned(architecture)
    loss = model(collator(samples(0, 1, 2, text_every=2))).loss_sum
    alone = [model(collator([sample])).loss_sum for sample in samples(0, 1, 2, text_every=2)]
    torch.testing.assert_close(loss, sum(alone), rtol=1e-5, atol=0)


def test_peft_gives_the_same_loss_where_its_tokens_start_at_p() -> None:
    """Rotary positions are relative, so keys turned back by P see our tokens as peft's keys see its own."""
    from peft import PrefixTuningConfig, get_peft_model

    model, plain, _ = tuned()
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    twin: Any = get_peft_model(plain.backbone.model, config)
    prefix, weight = model.backbone.prefix, twin.prompt_encoder.default.embedding.weight
    both = torch.stack([prefix.keys, prefix.values], 1)  # [L, 2, Hkv, P, d]
    cos, sin = model.backbone.model.model.rotary_emb(prefix.keys, torch.tensor([[-P]]))
    half = torch.cat([-prefix.keys[..., 2:], prefix.keys[..., :2]], -1)
    with torch.no_grad():
        weight.copy_(both.permute(3, 0, 1, 2, 4).flatten(1))
        prefix.keys.copy_(prefix.keys * cos[0] + half * sin[0])
    ids = torch.randint(0, 200, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    expected = twin.eval()(input_ids=ids, attention_mask=mask, labels=labels).loss
    scores = model.backbone.logits(model.backbone(model.backbone.embed(ids)))
    found = nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize("architecture", ROTARY)
def test_words_start_as_the_model_behind_these_words(architecture: str) -> None:
    model, plain, collator = tuned(architecture, init="words")
    ids = same_words(plain)
    for padded in ((batch := collator(samples(0, 1, 2))), left(batch)):
        with torch.no_grad():
            expected, found = plain(behind(padded, ids), logits=True), model(padded, logits=True)
        torch.testing.assert_close(found.logits, expected.logits, **NEAR)
    prompts = collator.prompts(samples(0, 1, 2))
    for use_cache in (True, False):
        assert model.generate(prompts, 5, use_cache) == plain.generate(behind(prompts, ids), 5)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_words_at_learned_positions_are_the_first_of_a_row(architecture: str) -> None:
    model, plain, _ = tuned(architecture, init="words")
    decoder: Any = plain.backbone.model.get_decoder()
    with torch.no_grad():
        made_of = decoder(inputs_embeds=plain.backbone.embed(same_words(plain)), use_cache=True).past_key_values
    for layer, keys, values in zip(made_of.layers, *model.backbone.prefix.parameters(), strict=True):
        assert torch.equal(keys, layer.keys[0]) and torch.equal(values, layer.values[0])


def test_words_are_no_marks_and_random_values_are_small() -> None:
    tokenizer = made()[0].backbone.tokenizer
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    assert marks and not marks & set(words(tokenizer, 5000).flatten().tolist())
    other, _ = made(seed=1)
    apply(other, init="random")
    for p in other.backbone.prefix.parameters():
        assert p.abs().max() < 0.1 and 0.01 < p.std() < 0.03


# ---------------------------------------------------------------- learning


def gradients(model: MultimodalModel, batch: Batch) -> dict[str, Tensor]:
    model.train().zero_grad()
    torch.manual_seed(0)  # of dropout, where an architecture has it
    model(batch).loss_sum.backward()
    return {name: p.grad.clone() for name, p in model.backbone.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_reach_every_layer_and_recomputed_layers_give_the_same(architecture: str) -> None:
    model, _, collator = tuned(architecture)
    batch = collator(samples(0, 1, 2))
    for padded in (batch, left(batch), collator(samples(0, 2, text_every=1))):
        found = gradients(model, padded)
        assert set(found) == {"prefix.keys", "prefix.values"}
        assert all(bool((g.flatten(2).abs().sum(-1) > 0).all()) for g in found.values()), "each layer and key head"
        again = deepcopy(model)
        again.checkpoint_activations()
        for name, g in gradients(again, padded).items():
            assert torch.equal(g, found[name]), name


def test_the_gradient_is_that_of_finite_differences() -> None:
    model, _, collator = tuned()
    batch = collator(samples(0, 1))
    slopes = gradients(model, batch)
    size = torch.stack([g.square().sum() for g in slopes.values()]).sum().sqrt()
    losses = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            for name, g in slopes.items():
                model.backbone.get_parameter(name).add_(step / size * g)
            losses.append(model(batch).loss_sum)
    assert float((losses[0] - losses[1]) / 2e-3) == pytest.approx(float(size), rel=1e-2)


def test_beside_lora_both_learn_in_either_order() -> None:
    lora = {"name": "lora", "rank": 2}
    for nodes in ([lora, {"name": "prefix", "length": P}], [{"name": "prefix", "length": P}, lora]):
        model = build_model(tree(tuning__backbone=nodes))
        _, collator = made()
        found = gradients(model, collator(samples(0, 1)))
        kinds = {"lora" if "lora" in name else name for name in found}
        assert kinds == {"lora", "prefix.keys", "prefix.values"}
        assert model.strategies["backbone"][nodes[0] is lora].resolved == [
            "model.model.layers.0",
            "model.model.layers.1",
        ]


def test_a_base_of_half_precision_keeps_a_prefix_of_single() -> None:
    model, _, collator = tuned(init="words")
    half = made()[0]
    half.backbone.to(torch.bfloat16)
    apply(half, init="words")
    assert {p.dtype for p in half.backbone.prefix.parameters()} == {torch.float32}
    for batch in (b := collator(samples(0, 1, 2)), left(b)):
        assert half(batch).loss_sum.item() == pytest.approx(model(batch).loss_sum.item(), rel=0.03)
        assert {g.dtype for g in gradients(half, batch).values()} == {torch.float32}
    prompts = collator.prompts(samples(0, 1))
    assert half.eval().generate(prompts, 3) == half.generate(prompts, 3, use_cache=False)
    exact = model(b).loss_sum.item()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(b).loss_sum.item() == pytest.approx(exact, rel=0.03)


def test_counts_without_memory_are_2_l_p_h_d() -> None:
    for architecture, heads, d in (("llama", 2, 4), ("qwen3", 2, 8), ("gpt2", 4, 4)):
        with weightless():
            model, _ = made(architecture)
            apply(model, init="words")
        learning = [p for p in model.backbone.parameters() if p.requires_grad]
        assert {p.device.type for p in learning} == {"meta"}
        assert sum(p.numel() for p in learning) == 2 * 2 * P * heads * d


# ---------------------------------------------------------------- what else looks at attention


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_packed_samples_share_the_prefix_and_nothing_else(kernel: str) -> None:
    model, _, collator = tuned(kernel=kernel)
    require_packable(model.backbone)
    for numbers in ((0, 1, 2, 3), (0, 12)):  # side by side; or full rows of their own
        batch = collator(samples(*numbers))
        lengths, T = batch.attention_mask.sum(1).tolist(), batch.input_ids.shape[1]
        expected = gradients(model, batch)
        packed = replace(batch, packing=lay_out(lengths, T, 256 if len(numbers) == 4 else T))
        assert (packed.packing.source.numel() == sum(lengths) == 2 * T) is (len(numbers) == 2)
        torch.testing.assert_close(model(packed).loss_sum, model(batch).loss_sum, rtol=1e-5, atol=0)
        for name, g in gradients(model, packed).items():
            torch.testing.assert_close(g, expected[name], rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(packed).loss_sum.item() == pytest.approx(model(batch).loss_sum.item(), rel=0.02)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_attention_is_that_of_the_model_behind_the_words(kernel: str, side: str) -> None:
    """Every mass is that of the untouched model; what the words get there, as system, here nobody gets."""
    model, plain, collator = tuned(kernel=kernel, init="words")
    batch = collator(samples(0, 1, 2))
    batch = left(batch) if side == "left" else batch
    with torch.no_grad(), observe(model, rows="answer", keys=True) as ours:
        model(batch)
    with torch.no_grad(), observe(plain, rows="answer", keys=True) as theirs:
        plain(behind(batch, same_words(plain)))
    found, expected = ours.stats(), theirs.stats()
    others = [g for g, name in enumerate(GROUPS) if name != "system"]
    torch.testing.assert_close(found.rows[..., others], expected.rows[..., others], **NEAR)
    torch.testing.assert_close(found.mass[..., others], expected.mass[..., others], **NEAR)
    system = GROUPS.index("system")
    first = batch.attention_mask.int().argmax(1).tolist()
    taken = torch.stack([expected.keys[:, b, n : n + P].sum(-1) for b, n in enumerate(first)], 1)
    assert taken.min() > 0.01
    mean = (found.null.sum(-1) / found.valid.sum(-1)).float()
    torch.testing.assert_close(mean, taken, **NEAR)
    gap = (expected.rows - found.rows)[..., system] * found.valid
    torch.testing.assert_close(gap, found.null, **NEAR)
    width = expected.keys.shape[-1] - P  # up to the last key that a row sees
    for b, n in enumerate(first):
        rest = torch.cat([expected.keys[:, b, :n], expected.keys[:, b, n + P :]], -1)
        torch.testing.assert_close(found.keys[:, b, :width], rest, **NEAR)
    assert not found.keys[..., width:].any()
    assert torch.equal(found.visible[..., others], expected.visible[..., others])
    assert ((expected.visible - found.visible)[..., system] * found.valid).unique().tolist() in ([0, P], [P])
    assert torch.equal(found.position + P, expected.position) and torch.equal(found.valid, expected.valid)


@torch.no_grad()
def test_masses_are_sums_of_the_eager_maps() -> None:
    model, plain, collator = tuned(kernel="eager")
    batch = left(collator(samples(0, 1)))
    with observe(model, rows="all") as recorder:
        model(batch)
    stats = recorder.stats()
    found = own(model, plain, plain.embed(batch), batch.attention_mask, use_cache=False, output_attentions=True)
    maps = torch.stack(found.attentions)[..., P:]  # [L, B, H, T, T]
    for b in range(2):
        rows = batch.attention_mask[b].nonzero()[:, 0].tolist()
        expected = brute_mass(batch, maps, b, rows).mean(1)
        torch.testing.assert_close(stats.rows[:, b][:, stats.valid[b]], expected, **NEAR)
        torch.testing.assert_close(stats.null[:, b][:, stats.valid[b]], 1 - expected.sum(-1), **NEAR)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generated_rows_are_observed_as_behind_the_words(use_cache: bool) -> None:
    model, plain, collator = tuned(init="words")
    prompts = collator.prompts(samples(0, 1, 2))
    with observe(model) as ours:
        model.generate(prompts, 4, use_cache=use_cache)
    with observe(plain) as theirs:
        plain.generate(behind(prompts, same_words(plain)), 4, use_cache=use_cache)
    found, expected = ours.stats(), theirs.stats()
    others = [g for g, name in enumerate(GROUPS) if name != "system"]
    assert found.rows.shape[2] > 1
    torch.testing.assert_close(found.rows[..., others], expected.rows[..., others], **NEAR)
    assert torch.equal(found.position + P, expected.position)


def test_routes_are_those_of_the_model_behind_the_words() -> None:
    model, plain, collator = tuned(init="words")
    batch = left(collator(samples(0, 1)))
    found = Routes(model, batch, ["vision"])
    expected = Routes(plain, behind(batch, same_words(plain)), ["vision"])
    assert found.effects.abs().min() > 0
    torch.testing.assert_close(found.effects, expected.effects, rtol=1e-3, atol=1e-6)
    for m in range(2):
        torch.testing.assert_close(found.exact(1, 2, m), expected.exact(1, 2, m), rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------- copies and refusals


def test_a_copy_has_a_prefix_of_its_own() -> None:
    model, _, collator = tuned()
    batch, other = collator(samples(0, 1)), deepcopy(model)
    before = model(batch).loss_sum
    with torch.no_grad():
        other.backbone.prefix.values.add_(1.0)
    assert torch.equal(model(batch).loss_sum, before) and not torch.equal(other(batch).loss_sum, before)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_windows_are_refused(architecture: str) -> None:
    assert "sliding_window" in ARCHITECTURES[architecture] or architecture in EAGER
    with pytest.raises(ConfigError, match="do not keep all keys.*choose lora or reft"):
        apply(made(architecture)[0])


def test_state_space_models_and_biased_scores_are_refused() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 2}
    kinds = {
        "mamba": ({**small, "state_size": 4}, "takes no past_key_values"),
        "bloom": ({"hidden_size": 16, "n_layer": 2, "n_head": 4}, "takes no position_ids"),
    }
    for architecture, (sizes, why) in kinds.items():
        backbone = {"name": "hf", "architecture": architecture, "sizes": sizes, "tokenizer": "bytes"}
        with pytest.raises(ConfigError, match=f"tuning.backbone: prefix: .*{why}.*choose lora"):
            build_model(tree(backbone=backbone, tuning__backbone={"name": "prefix"}))


def test_values_and_places_that_do_not_fit_are_refused() -> None:
    for options, why in (
        ({"length": 0}, "length: 0 keys are no prefix"),
        ({"init": "zeros"}, "init: there is no 'zeros'.*words"),
        ({"length": 257}, "length: 257 is more than the backbone's 256 positions"),
    ):
        with pytest.raises(ConfigError, match=why):
            build_model(tree(tuning__backbone={"name": "prefix", **options}))
    with pytest.raises(ConfigError, match="has a prefix already"):
        build_model(tree(tuning__backbone=[{"name": "prefix"}, {"name": "prefix"}]))
    with pytest.raises(ConfigError, match="tuning.projector: prefix: Mlp is no backbone"):
        build_model(tree(tuning__projector={"name": "prefix"}))


def test_a_decoder_that_treats_keys_in_front_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made()
    attention: Any = type(model.backbone.model.model.layers[0].self_attn)
    forward = attention.forward

    def forgets(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"]
        mask = kwargs["attention_mask"]
        if kwargs.get("use_cache") is False and mask is not None:
            kwargs["attention_mask"] = mask.clone().logical_and_(torch.arange(mask.shape[-1]) > 0)
        return forward(self, *args, **{**kwargs, "hidden_states": hidden})

    monkeypatch.setattr(attention, "forward", forgets)
    with pytest.raises(ConfigError, match="LlamaModel does not attend to keys in front as to tokens.*choose lora"):
        apply(model)
    assert not model.backbone.model.model._forward_pre_hooks


def test_a_foreign_cache_or_mask_is_refused() -> None:
    from transformers import DynamicCache

    model, _, _ = tuned()
    decoder, embeds = model.backbone.model.model, torch.randn(2, 5, 16)
    with pytest.raises(ConfigError, match="does not start with the prefix"):
        decoder(inputs_embeds=embeds, past_key_values=DynamicCache())
    with pytest.raises(ConfigError, match=r"mask of shape \[2, 4\] was given; give one of \[2, 5\]"):
        decoder(inputs_embeds=embeds, attention_mask=torch.ones(2, 4))
