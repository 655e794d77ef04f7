"""The composite model against loops written by hand and against the language model's own full logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toys import Colours, tree

from mllm_factory.assemble import build_collator, build_model
from mllm_factory.data import Collator
from mllm_factory.errors import DataError
from mllm_factory.model import MultimodalModel, state_tensors, trained_tensors
from mllm_factory.types import IGNORE_INDEX, VISION, Batch

FULL = {"name": "full"}


def made(**changes: Any) -> tuple[MultimodalModel, Collator]:
    node = tree(**changes)
    model = build_model(node)
    return model.train(), build_collator(node, model)


def mixed(collator: Collator) -> Batch:
    """Rows with two pictures and rows without."""
    source = Colours(8, text_every=3, pictures=2)
    batch = collator([source[i] for i in range(6)])
    assert len(batch.media["vision"]) == 8
    assert len({int(n) for n in batch.attention_mask.sum(1)}) > 2, "rows of different length"
    return batch


def gradients(model: MultimodalModel) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_fusion_places_features_like_a_loop_over_rows() -> None:
    model, collator = made()
    batch = mixed(collator)
    features = model.projectors["vision"](model.encoders["vision"](batch.media["vision"]))
    expected = model.backbone.embed(batch.input_ids).clone()
    for row in range(len(batch.input_ids)):
        queue = [
            vector for item, at in zip(features, batch.media_row["vision"], strict=True) if at == row for vector in item
        ]
        for position in range(batch.input_ids.shape[1]):
            if batch.modality[row, position] == VISION:
                expected[row, position] = queue.pop(0)
        assert not queue
    assert torch.equal(model.embed(batch), expected)


def test_the_loss_is_the_shifted_cross_entropy_of_all_logits() -> None:
    model, collator = made()
    batch = mixed(collator)
    llama = model.backbone.model
    full = llama(inputs_embeds=model.embed(batch), attention_mask=batch.attention_mask.long()).logits  # [B, T, V]
    flat, labels = full[:, :-1].reshape(-1, full.shape[-1]), batch.labels[:, 1:].reshape(-1)
    expected = F.cross_entropy(flat, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    output = model(batch, logits=True)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-6, atol=0)
    assert output.num_labels == (labels != IGNORE_INDEX).sum() == batch.num_labels
    torch.testing.assert_close(output.logits, flat[labels != IGNORE_INDEX], rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(output.loss_sum, llama.lm_head.weight)[0]
    theirs = torch.autograd.grad(expected, llama.lm_head.weight)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_head_sees_label_positions_only() -> None:
    model, collator = made()
    batch = mixed(collator)
    seen = []
    model.backbone.model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(batch)
    assert seen == [(1, int(batch.num_labels), model.backbone.dim)]
    assert batch.num_labels < batch.labels.numel() / 4


def test_a_batch_without_any_label_gives_zero_and_gradients() -> None:
    model, collator = made()
    batch = mixed(collator)
    batch = replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX))
    output = model(batch)
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0 and int(output.num_labels) == 0
    assert all(grad is not None for grad in gradients(model).values())


def test_a_frozen_encoder_has_no_graph_and_stays_in_eval_mode() -> None:
    model, collator = made(vision={"name": "toys:NormedPatches"})
    encoder, statistics = model.encoders["vision"], []
    encoder.register_forward_hook(lambda module, args, out: statistics.append(out.requires_grad))
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    model(mixed(collator)).loss_sum.backward()
    assert statistics == [False]
    assert not any(module.training for module in encoder.modules())
    assert model.backbone.training and model.projectors["vision"].training
    assert all(torch.equal(before[name], t) for name, t in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())
    assert not any(name.startswith("encoders.") for name in trained_tensors(model))


def test_lora_on_an_encoder_leaves_its_running_statistics_alone() -> None:
    lora = {"name": "lora", "rank": 2, "targets": "all-linear", "dropout": 0.5}
    model, collator = made(vision={"name": "toys:NormedPatches"}, tuning__vision=lora)
    encoder = model.encoders["vision"]
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    model(mixed(collator)).loss_sum.backward()
    assert not encoder.norm.training, "statistics of a layer whose weights are frozen"
    assert encoder.out.lora_dropout["default"].training, "what learns is in training mode"
    assert all(torch.equal(before[name], t) for name, t in encoder.state_dict().items())
    assert {name.rpartition(".")[0] for name in trained_tensors(model) if name.startswith("encoders")} == {
        "encoders.vision.out.lora_A.default",
        "encoders.vision.out.lora_B.default",
    }


def test_a_trained_encoder_keeps_its_running_statistics_with_its_weights() -> None:
    model, collator = made(vision={"name": "toys:NormedPatches"}, tuning__vision=FULL)
    norm = model.encoders["vision"].norm
    before = norm.running_mean.clone()
    model(mixed(collator)).loss_sum.backward()
    assert not torch.equal(before, norm.running_mean)
    saved = trained_tensors(model)
    assert saved["encoders.vision.norm.running_mean"] is norm.running_mean
    assert saved.keys() == state_tensors(model).keys(), "everything learns here"


@pytest.mark.parametrize("encoder", ["frozen", "full"])
def test_a_text_only_batch_trains_and_gives_zero_gradients_to_the_picture_path(encoder: str) -> None:
    model, collator = made(vision={"name": "toys:NormedPatches"}, tuning__vision={"name": encoder})
    source = Colours(8, text_every=1)
    batch = collator([source[i] for i in range(3)])
    assert len(batch.media["vision"]) == 0
    before = {name: t.clone() for name, t in model.encoders.state_dict().items()}
    output = model(batch)
    output.loss_sum.backward()
    for name, grad in gradients(model).items():
        assert grad is not None, name
        if name.startswith(("projectors", "encoders")):
            assert not grad.any(), name
    assert all(torch.equal(before[name], t) for name, t in model.encoders.state_dict().items()), "no trace of nothing"
    assert model.encoders["vision"].norm.training == (encoder == "full"), "modes are as before"
    plain = model.backbone.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), labels=batch.labels
    ).loss
    torch.testing.assert_close(output.loss_sum / output.num_labels, plain, rtol=1e-6, atol=0)


def test_features_that_do_not_fill_their_places_are_refused() -> None:
    model, collator = made()
    batch = mixed(collator)
    with pytest.raises(DataError, match=r"reserves 32 positions but 7 items give 7 x 4"):
        model(replace(batch, media={"vision": batch.media["vision"][:7]}))
    with pytest.raises(DataError, match=r"reserves 32 positions but 9 items"):
        model(replace(batch, media={"vision": batch.media["vision"][[*range(8), 0]]}))
    model.tokens_per_item["vision"] = 5
    with pytest.raises(DataError, match="gives 4 tokens an item but its num_tokens says 5"):
        model(batch)


def test_hooks_see_the_batch_during_a_pass_and_only_then() -> None:
    model, collator = made()
    batch = mixed(collator)
    seen: list[Any] = []
    model.backbone.layers[0].register_forward_hook(lambda module, args, out: seen.append(model.batch))
    model(batch)
    assert seen == [batch] and model.batch is None
    prompts = collator.prompts([Colours(2)[0]])
    model.generate(prompts, 2)
    assert len(seen) > 1 and all(b is prompts for b in seen[1:]) and model.batch is None
    model.backbone.layers[1].register_forward_hook(lambda module, args, out: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(batch)
    assert model.batch is None, "also after an error"


def steered(checkpointing: bool) -> tuple[float, dict[str, torch.Tensor | None], torch.Tensor, list[bool]]:
    """Loss and gradients of a model with dropout whose first layer is steered at its pictures by a hook."""
    node = tree()
    node["backbone"]["sizes"]["attention_dropout"] = 0.3
    model = build_model(node).train()
    batch = mixed(build_collator(node, model))
    steer, inside = torch.ones(model.backbone.dim, requires_grad=True), []

    def edit(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out + steer * (model.batch.modality == VISION)[..., None]

    model.backbone.layers[0].register_forward_hook(edit)
    model.backbone.layers[1].self_attn.register_forward_hook(lambda m, a, o: inside.append(model.batch is batch))
    if checkpointing:
        model.checkpoint_activations()
    torch.manual_seed(1)
    loss = model(batch).loss_sum
    loss.backward()
    assert model.batch is None
    return loss.item(), gradients(model), steer.grad, inside


def test_gradient_checkpointing_changes_nothing_but_the_memory() -> None:
    loss, expected, steer, inside = steered(False)
    loss_again, found, steer_again, inside_again = steered(True)
    assert loss == loss_again
    assert steer.abs().sum() > 0 and torch.equal(steer, steer_again)
    assert all(torch.equal(grad, found[name]) for name, grad in expected.items())
    assert inside == [True] and inside_again == [True, True], "run once more, with the batch in sight"


def test_generation_with_a_cache_single_or_batched_is_the_same() -> None:
    model, collator = made(data__max_length=200)
    model.eval()
    source = Colours(12, text_every=4, pictures=2)
    samples = [source[i] for i in range(6)]
    batch = collator.prompts(samples)
    assert batch.left_padded

    def ids(prompts: Batch, **how: Any) -> torch.Tensor:
        with torch.no_grad():
            embeds = model.embed(prompts)
            return model.backbone.generate(embeds, prompts.attention_mask, max_new_tokens=12, stop_ids=(), **how)

    cached, single = ids(batch), torch.cat([ids(collator.prompts([s])) for s in samples])
    assert len(cached.unique()) > 3, "the answers say something"
    assert torch.equal(cached, ids(batch, use_cache=False))
    assert torch.equal(cached, single)
    assert model.generate(batch, 12) == [text for s in samples for text in model.generate(collator.prompts([s]), 12)]


def test_generation_continues_what_the_full_model_would_say() -> None:
    model, collator = made()
    prompts = collator.prompts([Colours(2)[1]])
    model.eval()
    with torch.no_grad():
        embeds, said = model.embed(prompts), []
        for _ in range(6):
            token = model.backbone.model(inputs_embeds=embeds).logits[:, -1].argmax(-1)
            said.append(int(token))
            embeds = torch.cat([embeds, model.backbone.embed(token[:, None])], 1)
        ours = model.backbone.generate(model.embed(prompts), prompts.attention_mask, max_new_tokens=6, stop_ids=())
    assert ours.tolist() == [said]


def test_no_rows_give_no_answers() -> None:
    model, collator = made(data__max_length=6)
    assert model.generate(collator.prompts([Colours(1)[0]]), 4) == []
