"""Captured attention against eager maps, for many architectures, both paddings, caches; and what cannot be captured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_toys import (
    ARCHITECTURES,
    EAGER,
    brute_group,
    brute_mass,
    brute_rows,
    left,
    made,
    maps,
    samples,
    talk,
    wider,
)
from torch import Tensor, nn

from mllm_factory import IGNORE_INDEX, Batch, ConfigError, Message, MultimodalModel, Sample
from mllm_factory.components.metrics import attention_mass
from mllm_factory.components.metrics.attention_capture import AttentionStats, observe
from mllm_factory.components.metrics.attention_groups import GROUPS, answer_rows, key_groups

NEAR: dict[str, Any] = {"rtol": 0, "atol": 1e-5}


def captured(model: MultimodalModel, batch: Batch, rows: str = "answer", **options: Any) -> AttentionStats:
    with torch.no_grad(), observe(model, rows, **options) as recorder:
        model(batch)
    return recorder.stats()


def real(stats: AttentionStats, row: int) -> Tensor:
    """[L, R', G] the wanted rows of one sample."""
    return stats.rows[:, row, stats.valid[row]]


# ---------------------------------------------------------------- groups and rows


def test_groups_and_rows_are_those_of_the_conversation() -> None:
    model, collator = made()
    sample = Sample(
        "s",
        (Message("system", "S"), *talk("a<image>b", "cd", "e", "f", pictures=1).messages),
        talk("<image>", pictures=1).media,
    )
    batch = collator([sample])
    groups, tokenizer = key_groups(batch, None)[0].tolist(), model.backbone.tokenizer
    text = {
        name: tokenizer.decode([int(i) for i, g in zip(batch.input_ids[0], groups, strict=True) if GROUPS[g] == name])
        for name in ("user", "answer")
    }
    assert text == {"user": "abe", "answer": "cd<|end|>f<|end|>"}
    assert [g for g, m in zip(groups, batch.modality[0].tolist(), strict=True) if m == 1] == [
        GROUPS.index("vision")
    ] * 4
    assert "S" in tokenizer.decode(
        [int(i) for i, g in zip(batch.input_ids[0], groups, strict=True) if GROUPS[g] == "system"]
    )
    rows = answer_rows(batch)[0].nonzero()[:, 0]
    assert tokenizer.decode(batch.input_ids[0, rows + 1].tolist()) == "cd<|end|>f<|end|>"
    assert rows.tolist() == brute_rows(batch, 0)


def test_the_first_token_is_bos_where_the_tokenizer_says_so() -> None:
    _, collator = made()
    batch = left(collator(samples(0, 1)))
    first = batch.attention_mask.int().argmax(1)
    bos = int(batch.input_ids[0, first[0]])
    groups = key_groups(batch, bos)
    assert groups[[0, 1], first].tolist() == [GROUPS.index("bos")] * 2
    assert (groups == GROUPS.index("bos")).sum() == 2  # later ones of the same token are words of the template
    assert (key_groups(batch, bos + 1) != GROUPS.index("bos")).all()


def test_a_batch_of_prompts_predicts_from_its_last_tokens() -> None:
    _, collator = made()
    whole = collator(samples(0, 1))
    for batch in (collator.prompts(samples(0, 1)), replace(whole, labels=torch.full_like(whole.labels, IGNORE_INDEX))):
        last = [max(t for t, there in enumerate(row) if there) for row in batch.attention_mask.tolist()]
        assert answer_rows(batch).nonzero().tolist() == [[i, t] for i, t in enumerate(last)]


# ---------------------------------------------------------------- equal to eager


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_masses_are_those_of_the_eager_maps(architecture: str, side: str) -> None:
    model, collator = made(architecture)
    batch = collator(samples(0, 1, 2, 5))
    batch = left(batch) if side == "left" else batch
    stats, A = captured(model, batch), maps(model, batch)
    assert A.std() > 0.01  # far from uniform
    for b in range(4):
        rows = brute_rows(batch, b)
        expected = brute_mass(batch, A, b, rows)
        assert stats.position[b, stats.valid[b]].tolist() == rows
        torch.testing.assert_close(real(stats, b), expected.mean(1), **NEAR)
        torch.testing.assert_close(stats.mass[:, :, b, GROUPS.index("answer")], expected.sum(2), **NEAR)
        assert stats.count[b].tolist() == [0, 0, 0, 0, len(rows), 0]
    sums = stats.rows.sum(-1)[:, stats.valid]
    assert (sums <= 1 + 1e-5).all()
    if architecture == "gpt_oss":
        assert (sums < 0.999).any()  # a learned sink took its part
        torch.testing.assert_close(stats.null[:, stats.valid], 1 - sums)
    else:
        torch.testing.assert_close(sums, torch.ones_like(sums), **NEAR)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2"])
def test_all_rows_have_their_own_groups(architecture: str) -> None:
    model, collator = made(architecture)
    batch = left(collator(samples(0, 2)))
    stats, A = captured(model, batch, "all", keys=True), maps(model, batch)
    for b in range(2):
        rows = [t for t in range(batch.input_ids.shape[1]) if batch.attention_mask[b, t]]
        expected = brute_mass(batch, A, b, rows)
        torch.testing.assert_close(real(stats, b), expected.mean(1), **NEAR)
        predicting = brute_rows(batch, b)
        for g, name in enumerate(GROUPS):
            mine = [
                i for i, q in enumerate(rows) if ("answer" if q in predicting else brute_group(batch, b, q)) == name
            ]
            torch.testing.assert_close(stats.mass[:, :, b, g], expected[:, :, mine].sum(2), **NEAR)
            assert stats.count[b, g] == len(mine)
        assert stats.keys is not None
        torch.testing.assert_close(stats.keys[:, b], A[:, b][:, :, rows].mean((1, 2)), **NEAR)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_oss"])
def test_visible_keys_are_counted_one_by_one(architecture: str) -> None:
    model, collator = made(architecture)
    for batch in (collator(samples(0, 1)), left(collator(samples(0, 1)))):
        stats, A = captured(model, batch), maps(model, batch)
        for b in range(2):
            for i, q in enumerate(brute_rows(batch, b)):
                for layer in range(2):
                    seen = [brute_group(batch, b, k) for k in range(A.shape[-1]) if A[layer, b, 0, q, k] > 0]
                    assert stats.visible[layer, b, i].tolist() == [seen.count(name) for name in GROUPS]


def test_more_rows_than_a_block_and_any_size_of_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, collator = made()
    batch = collator([talk("<image>" + "why " * 20, "because " * 14, pictures=1), *samples(1)])
    whole = captured(model, batch, "all")
    assert whole.valid.shape[1] >= 2 * attention_mass.BLOCK
    for size in (1, 7, 10**6):
        monkeypatch.setattr(attention_mass, "BLOCK", size)
        torch.testing.assert_close(captured(model, batch, "all").rows, whole.rows, **NEAR)
    A = maps(model, batch)
    torch.testing.assert_close(
        real(whole, 0), brute_mass(batch, A, 0, list(range(whole.valid.shape[1]))).mean(1), **NEAR
    )


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generated_rows_are_those_of_the_whole_sequence_at_once(architecture: str, use_cache: bool) -> None:
    model, collator = made(architecture)
    batch = collator.prompts(samples(0, 2))
    P, Y = batch.input_ids.shape[1], 4
    fed: list[Tensor] = []
    embed = model.backbone.embed

    def noted(ids: Tensor) -> Tensor:
        fed.append(ids)
        return embed(ids)

    vars(model.backbone)["embed"] = noted
    model.template.stop_ids = ()  # so that all go on to the end
    with observe(model) as recorder:
        model.generate(batch, Y, use_cache=use_cache)
    del vars(model.backbone)["embed"]
    stats = recorder.stats()
    assert stats.position.tolist() == [list(range(P - 1, P + Y - 1))] * 2
    more = torch.cat(fed[1:], 1)[:, : Y - 1]
    whole = Batch(
        torch.cat([batch.input_ids, more], 1),
        torch.full((2, P + Y - 1), IGNORE_INDEX),
        torch.cat([batch.attention_mask, torch.ones_like(more).bool()], 1),
        torch.cat([batch.modality, torch.zeros_like(more)], 1),
        torch.cat([batch.role, torch.full_like(more, 3)], 1),
        batch.media,
        batch.media_row,
    )
    A = maps(model, whole)
    for b in range(2):
        expected = brute_mass(whole, A, b, list(range(P - 1, P + Y - 1)))
        torch.testing.assert_close(stats.rows[:, b], expected.mean(1), **NEAR)
        torch.testing.assert_close(stats.mass[:, :, b, GROUPS.index("answer")], expected.sum(2), **NEAR)


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_behind_a_stop_token_do_not_count(use_cache: bool) -> None:
    model, collator = made()
    batch, chosen = collator.prompts(samples(0, 2)), iter([[5, 5], [7, 5], [5, 5], [5, 5]])
    model.template.stop_ids = (7,)
    language: Any = model.backbone
    vocabulary = len(language.tokenizer)
    language.logits = lambda hidden: nn.functional.one_hot(torch.tensor(next(chosen)), vocabulary).float()
    with observe(model) as recorder:
        model.generate(batch, 4, use_cache=use_cache)
    P = batch.input_ids.shape[1]
    stats = recorder.stats()
    found = [stats.position[b, stats.valid[b]].tolist() for b in range(2)]
    assert found == [[P - 1, P], [P - 1, P, P + 1, P + 2]]  # the first sample stopped with its second token


# ---------------------------------------------------------------- it changes nothing


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_and_kernels_are_as_without(architecture: str) -> None:
    model, collator = made(architecture)
    batch, prompts = collator(samples(0, 1)), collator.prompts(samples(0, 1))
    language: Any = model.backbone.model
    with torch.no_grad():
        before, texts = model(batch, logits=True), model.generate(prompts, 5)
        with observe(model, "all"):
            during = model(batch, logits=True)
        with observe(model):
            assert model.generate(prompts, 5) == texts
        after = model(batch, logits=True)
    assert torch.equal(before.logits, during.logits)
    assert torch.equal(before.logits, after.logits)
    assert language.config._attn_implementation == ("eager" if architecture in EAGER else "sdpa")
    assert "embed" not in vars(model.backbone)


def test_it_ends_with_an_error_as_well() -> None:
    model, collator = made()
    with pytest.raises(RuntimeError, match="mine"), observe(model):
        raise RuntimeError("mine")
    assert model.backbone.model.config._attn_implementation == "sdpa"
    assert captured(model, collator(samples(0))).valid.any()


def test_gradients_are_those_without() -> None:
    model, collator = made()
    batch = collator(samples(0, 1))
    grads = []
    for recompute in (False, True):
        if recompute:
            model.checkpoint_activations()
        model.zero_grad()
        with observe(model) as recorder:
            model(batch).loss_sum.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert not recorder.stats().rows.requires_grad
        assert recorder.stats().count.sum() == answer_rows(batch).sum()  # recomputing adds nothing
    model.zero_grad()
    model(batch).loss_sum.backward()
    plain = [p.grad for p in model.parameters() if p.grad is not None]
    for other in grads:
        for a, b in zip(plain, other, strict=True):
            torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- invariance


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "opt"])
def test_padding_and_company_change_nothing(architecture: str) -> None:
    model, collator = made(architecture)
    batch = collator(samples(0, 1, 2))
    reference = captured(model, batch)
    for other in (left(batch), wider(batch, 9), left(wider(batch, 9))):
        stats = captured(model, other)
        torch.testing.assert_close(
            stats.rows * stats.valid[None, :, :, None], reference.rows * reference.valid[None, :, :, None], **NEAR
        )
        torch.testing.assert_close(stats.mass, reference.mass, **NEAR)
    for b, number in enumerate((0, 1, 2)):
        torch.testing.assert_close(captured(model, collator(samples(number))).rows[:, 0], real(reference, b), **NEAR)


def test_half_precision_is_read_in_full() -> None:
    model, collator = made()
    batch = collator(samples(0, 1))
    exact = captured(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        near = captured(model, batch)
    assert near.rows.dtype == torch.float32
    torch.testing.assert_close(near.rows, exact.rows, rtol=0, atol=0.05)
    sums = near.rows.sum(-1)[:, near.valid]
    torch.testing.assert_close(sums, torch.ones_like(sums), **NEAR)


def test_two_runs_are_equal() -> None:
    model, collator = made()
    batch = collator(samples(0, 1))
    one, other = captured(model, batch), captured(model, batch)
    assert torch.equal(one.mass, other.mass)
    assert torch.equal(one.rows, other.rows)


def test_a_second_pass_of_the_same_batch_adds_nothing() -> None:
    model, collator = made()
    batch = collator(samples(0, 1))
    with torch.no_grad(), observe(model) as recorder:
        model(batch)
        model(batch)
    assert torch.equal(recorder.stats().mass, captured(model, batch).mass)


def test_a_batch_without_wanted_rows_is_empty_and_no_error() -> None:
    model, collator = made()
    batch = collator([])
    stats = captured(model, batch)
    assert stats.rows.shape == (2, 1, 0, 6)
    assert stats.count.sum() == 0
    assert stats.size.sum() == 0


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("architecture", ["bloom", "falcon", "gptj"])
def test_attention_outside_of_the_interface_is_an_error(architecture: str) -> None:
    sizes: dict[str, dict[str, Any]] = {
        "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
        "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
    }
    ARCHITECTURES[architecture] = sizes[architecture]
    try:
        EAGER.add(architecture)
        model, collator = made(architecture)
    finally:
        del ARCHITECTURES[architecture]
        EAGER.discard(architecture)
    with pytest.raises(ConfigError, match=r"attention of \w+ cannot be observed"), observe(model):
        model(collator(samples(0)))


def test_a_backbone_of_another_kind_is_an_error() -> None:
    model, collator = made()
    hidden = model.backbone

    class Own(nn.Module):
        dim, tokenizer, max_positions = 16, hidden.tokenizer, None
        layers = nn.ModuleList([nn.Linear(16, 16)])
        embed, logits = hidden.embed, hidden.logits

        def forward(self, embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.layers[0](embeds)

    model.backbone = Own()
    with (
        pytest.raises(ConfigError, match="attention of Own cannot be observed: it is no model of transformers"),
        observe(model),
    ):
        model(collator(samples(0)))


def test_layers_that_do_not_pass_are_an_error_and_so_is_an_unused_observation() -> None:
    model, _ = made()
    with observe(model) as recorder:
        pass
    with pytest.raises(ConfigError, match="none of its layers passed"):
        recorder.stats()


def test_a_kernel_that_does_more_than_softmax_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    model, collator = made()
    plain: Any = FUNCTIONS["sdpa"]

    def biased(module: nn.Module, query: Tensor, *rest: Any, **options: Any) -> Any:
        return plain(module, 3 * query, *rest, **options)

    monkeypatch.setitem(type(FUNCTIONS)._global_mapping, "sdpa", biased)
    with pytest.raises(ConfigError, match="in layer 0 is more than softmax"):
        captured(model, collator(samples(0)))


def test_one_batch_and_one_observer_at_a_time() -> None:
    model, collator = made()
    one, other = collator(samples(0)), collator(samples(1))
    with torch.no_grad(), observe(model):
        model(one)
        with pytest.raises(ConfigError, match="one batch at a time"):
            model(other)
        with pytest.raises(ConfigError, match="observed already"), observe(model):
            pass
        model(one)
    with pytest.raises(ValueError, match="rows: 'some' is neither answer nor all"), observe(model, "some"):
        pass
