"""The hooks of MoReS: recomputation, hooks of others, copies, dtypes, dropout and random numbers."""

from __future__ import annotations

import copy
import pickle
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from steered import RANDOM, built, by_hand, gradients, hidden, logits, map_of, samples
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import tree

from mllm_factory import VISION
from mllm_factory.components.tuning.steering_hooks import Site

EVERYWHERE = {"name": "mores", "init": "random", "positions": "all"}


@pytest.mark.parametrize("dropout_on", ["update", "state"])
def test_a12_dropout_is_off_in_evaluation(dropout_on: str) -> None:
    node = {**EVERYWHERE, "dropout": 0.5, "dropout_on": dropout_on}
    model, collator = built(node)
    batch = collator(samples())
    assert torch.equal(logits(model, batch), logits(model, batch))
    plain, _ = built({**EVERYWHERE})
    assert torch.equal(logits(model, batch), logits(plain, batch))
    model.train()
    assert not torch.equal(logits(model, batch), logits(model, batch))


class Rerun(nn.Module):
    """A layer whose hooks run again in the backward pass."""

    def __init__(self, layer: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(self.layer, **kwargs), *args, use_reentrant=self.reentrant)


def checkpointed(model: Any, how: str) -> None:
    if how == "engine":
        model.checkpoint_activations()
    elif how.startswith("transformers"):
        model.backbone.model.gradient_checkpointing_enable({"use_reentrant": how.endswith("reentrant")})
    else:
        layers = model.backbone.layers
        for i, layer in enumerate(layers):
            layers[i] = Rerun(layer, how == "wrapper, reentrant")


@pytest.mark.parametrize("how", ["engine", "transformers", "transformers, reentrant", "wrapper", "wrapper, reentrant"])
@pytest.mark.parametrize("node", [RANDOM, {**RANDOM, "placement": "block_output", "positions": "ratio:0.1-1"}])
def test_a7_gradients_survive_checkpointing(how: str, node: dict[str, Any]) -> None:
    found = []
    for case in (None, how):
        model, collator = built(node)
        if case:
            checkpointed(model, case)
        batches = [collator(samples(first=i)) for i in range(2)]
        torch.manual_seed(5)
        found.append([gradients(model, batch) for batch in batches])
    for plain, again in zip(*found, strict=True):
        renamed = {name.replace(".layer.", "."): g for name, g in again.items()}
        assert plain.keys() == renamed.keys()
        assert all(torch.equal(plain[name], renamed[name]) for name in plain)
        assert all(g.abs().max() > 0 for name, g in plain.items() if "steering.0" in name)


def test_a13_evaluation_draws_no_random_number() -> None:
    for node in (
        RANDOM,
        {**RANDOM, "positions": "random:0.5"},
        {**RANDOM, "positions": "ratio:0.2-0.9", "dropout": 0.1},
    ):
        model, collator = built(node)
        batch = collator(samples())
        before = torch.get_rng_state()
        logits(model, batch)
        assert torch.equal(torch.get_rng_state(), before)


def test_a23_hooks_of_others_fire_and_stay() -> None:
    model, collator = built({**RANDOM, "placement": "block_output"})
    calls: list[str] = []
    layer: Any = model.backbone.layers[0]
    handles = [
        layer.register_forward_pre_hook(lambda *_: calls.append("before")),
        layer.register_forward_hook(lambda *_: calls.append("after")),
    ]
    batch = collator(samples())
    for _ in range(2):
        gradients(model, batch)
    assert calls == ["before", "after"] * 2
    steered = logits(model, batch)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model, batch), steered)
    assert len(layer._forward_hooks) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a24_any_base_dtype_with_the_update_in_float32(dtype: str) -> None:
    model, collator = built(
        {**RANDOM, "placement": "block_output", "layers": [0]},
        backbone={**tree()["backbone"], "dtype": dtype},
    )
    assert {p.dtype for n, p in model.named_parameters() if "steering" in n} == {torch.float32}
    batch = collator(samples())
    seen: list[Tensor] = []
    hooks = model.backbone.layers[0]._forward_hooks  # ours stands alone; look before and behind it
    (ours,) = hooks.values()
    hooks.clear()
    model.backbone.layers[0].register_forward_hook(lambda *given: seen.append(given[2]))
    model.backbone.layers[0].register_forward_hook(ours)
    model.backbone.layers[0].register_forward_hook(lambda *given: seen.append(given[2]))
    hidden(model, batch)
    before, after = (state[batch.modality == VISION].view(4, 4, -1)[:, [0, 3]].flatten(0, 1) for state in seen)
    assert after.dtype == getattr(torch, dtype)
    expected = by_hand(map_of(model, 0), before.float()).to(after.dtype)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=2**-8 if dtype == "bfloat16" else 2**-10)
    assert all(torch.isfinite(g).all() for g in gradients(model, batch).values())
    with torch.autocast("cpu", torch.bfloat16):
        hidden(model, batch)


def test_copies_steer_by_their_own_batch() -> None:
    model, collator = built(RANDOM)
    batch = collator(samples())
    steered = logits(model, batch)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, batch), steered)
    with torch.no_grad(), other._sees(batch):
        embeds = model.embed(batch)
        unsteered = model.backbone(embeds)  # the copy's batch is none of the original's business
    base, _ = built()
    assert torch.equal(unsteered, base.backbone(embeds))
    with torch.no_grad():
        map_of(other, 0).bias.add_(1.0)
    assert torch.equal(logits(model, batch), steered)
    assert not torch.equal(logits(other, batch), steered)
    alone = copy.deepcopy(model.backbone)
    with torch.no_grad(), model._sees(batch):
        assert torch.equal(alone(embeds), unsteered)


def test_a_model_and_its_batches_are_released() -> None:
    model, collator = built(RANDOM)
    batch = collator(samples())
    logits(model, batch)
    gone = weakref.ref(batch)
    del batch
    assert gone() is None
    flight = flight_of(model)
    assert pickle.loads(pickle.dumps(flight.positions)).text == "f1+l1"  # noqa: S301


def flight_of(model: Any) -> Any:
    return model.backbone.steering.flight


def test_the_positions_of_a_batch_are_found_once() -> None:
    model, collator = built(RANDOM)
    flight, calls = flight_of(model), []
    find = flight.positions.places

    def counted(*given: Any) -> Any:
        calls.append(given)
        return find(*given)

    flight.positions.places = counted
    first, second = collator(samples()), collator(samples())
    for batch in (first, first, second):
        logits(model, batch)
    assert len(calls) == 2


def test_layers_may_give_tuples_and_take_names() -> None:
    model, collator = built(RANDOM)
    batch = collator(samples())
    site = Site(flight_of(model), map_of(model, 0))
    h = torch.randn(*batch.modality.shape, 16)
    with torch.no_grad(), model._sees(batch):
        steered, cache = site.after(nn.Identity(), (), (h, "cache"))
        (positional,), _ = site.before(nn.Identity(), (h,), {})
        args, named = site.before(nn.Identity(), (), {"hidden_states": h, "mask": None})
        assert site.after(nn.Identity(), (), h[:, :-1]) is not steered  # decoding: shorter than the batch
        assert torch.equal(site.after(nn.Identity(), (), h[:, :-1]), h[:, :-1])
    assert (cache, args, named["mask"]) == ("cache", (), None)
    assert torch.equal(steered, positional)
    assert torch.equal(steered, named["hidden_states"])
    assert (steered != h).any(-1).sum() == 2 * 4


def test_a_batch_seen_while_learning_is_looked_at_again_in_evaluation() -> None:
    model, collator = built({**RANDOM, "positions": "ratio:0.1-1"})
    flight, batch = flight_of(model), collator(samples())
    counts = set()
    for _ in range(20):
        with model._sees(batch):
            h = torch.zeros(*batch.modality.shape, 16)
            flight.places(h, True)
            counts.add(len(flight.places(h, False)))
            flight.last = None
    assert counts == {4 * 2}  # the middle, 0.55 of 4 tokens in each of 4 rows
