"""MoReS by its acceptance checks: which positions of which layers change, which options there are, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steered import FROZEN, RANDOM, built, by_hand, gradients, hidden, logits, map_of, samples
from torch import Tensor

from mllm_factory import VISION, ConfigError, DataError, Tuning, build
from mllm_factory.components.tuning.steering_apply import choose

EVERYWHERE = {"name": "mores", "init": "random", "positions": "all"}


@pytest.mark.parametrize("placement", ["block_input", "block_output"])
@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"parametrization": "none"}, {"parametrization": "untied"}])
def test_a1_identity_is_the_untouched_model(placement: str, options: dict[str, Any]) -> None:
    node = {"name": "mores", "positions": "all", "modalities": ["vision", "text"], "placement": placement, **options}
    base, collator = built()
    model, _ = built(node)
    batch = collator(samples())
    assert torch.equal(logits(model, batch), logits(base, batch))
    assert all(g.abs().max() > 0 for name, g in gradients(model, batch).items() if ".weight" in name)


@pytest.mark.parametrize("positions", ["all", "f1+l1", "last:2"])
def test_a2_locality(positions: str) -> None:
    base, collator = built()
    model, _ = built({**RANDOM, "positions": positions, "placement": "block_output", "layers": [0]})
    batch = collator(samples(text_every=2))
    states = []
    for either in (base, model):
        either.backbone.layers[0].register_forward_hook(lambda *given: states.append(given[2]))
        hidden(either, batch)
    changed = (states[0] != states[1]).any(-1)
    chosen = torch.zeros_like(batch.modality, dtype=torch.bool)
    for row in range(len(chosen)):
        spots = (batch.modality[row] == VISION).nonzero()[:, 0].tolist()
        wanted = {"all": spots, "f1+l1": [*spots[:1], *spots[-1:]], "last:2": spots[-2:]}[positions]
        chosen[row, wanted] = True
    assert chosen.any()
    assert torch.equal(changed, chosen)
    change = map_of(model, 0)
    torch.testing.assert_close(states[1][chosen], by_hand(change, states[0][chosen]), atol=1e-5, rtol=0)


def test_block_input_sees_the_projected_tokens() -> None:
    model, collator = built({**EVERYWHERE, "layers": [0]})
    batch = collator(samples())
    seen: list[Tensor] = []
    model.backbone.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        embeds = model.embed(batch)
    hidden(model, batch)
    expected = embeds.clone()
    places = batch.modality == VISION
    expected[places] = by_hand(map_of(model, 0), embeds[places])
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("placement", ["block_input", "block_output"])
def test_a4_text_only_rows_are_untouched(placement: str) -> None:
    base, collator = built()
    model, _ = built({**EVERYWHERE, "placement": placement})
    mixed, texts = collator(samples(text_every=2)), collator(samples(text_every=1))
    text_rows = ~(mixed.modality == VISION).any(1)
    assert text_rows.tolist() == [True, False, True, False]
    assert torch.equal(hidden(model, mixed)[text_rows], hidden(base, mixed)[text_rows])
    assert not torch.equal(hidden(model, mixed)[~text_rows], hidden(base, mixed)[~text_rows])
    assert torch.equal(logits(model, texts), logits(base, texts))
    with torch.no_grad():
        embeds = model.embed(mixed)
        assert torch.equal(model.backbone(embeds), base.backbone(embeds))  # no batch in flight


def test_a4_a_batch_without_media_gives_gradients_of_zero_and_the_same_loss() -> None:
    base, collator = built()
    model, _ = built(RANDOM)
    texts = collator(samples(text_every=1))
    found = gradients(model, texts)
    assert all(g.count_nonzero() == 0 for name, g in found.items() if "steering" in name)
    assert torch.equal(logits(model, texts), logits(base, texts))


def test_a8_only_the_last_output_is_dead() -> None:
    batch = built()[1](samples())
    for placement in ("block_output", "block_input"):
        model, _ = built({**RANDOM, "placement": placement})
        found = gradients(model, batch)
        for layer in range(2):
            norms = [g.abs().max() for name, g in found.items() if f"steering.{layer}." in name]
            assert len(norms) == 3
            dead = placement == "block_output" and layer == 1
            assert all((norm == 0) == dead for norm in norms)


# ---------------------------------------------------------------- options


def test_layers_are_chosen() -> None:
    assert choose("all", 4) == [0, 1, 2, 3]
    assert choose("every:3", 8) == [0, 3, 6]
    assert (choose("shallow", 32), choose("middle", 32), choose("deep", 32)) == (
        [*range(16)],
        [*range(8, 24)],
        [*range(16, 32)],
    )
    assert [choose(word, 1) for word in ("shallow", "middle", "deep")] == [[0]] * 3
    assert choose([3, 0], 4) == [0, 3]
    model, _ = built({**RANDOM, "layers": [1]})
    assert list(model.backbone.steering) == ["1"]
    assert [len(layer._forward_pre_hooks) for layer in model.backbone.layers] == [0, 1]


def test_shared_maps_sum_their_gradients() -> None:
    apart, collator = built(RANDOM)
    together, _ = built({**RANDOM, "share": True})
    one = map_of(together, 0)
    assert one is map_of(together, 1)
    for layer in range(2):
        map_of(apart, layer).load_state_dict(one.state_dict())
    batch = collator(samples())
    assert torch.equal(logits(apart, batch), logits(together, batch))
    found, summed = gradients(apart, batch), gradients(together, batch)
    for name in ("base", "weight", "bias"):
        both = found[f"backbone.steering.0.{name}"] + found[f"backbone.steering.1.{name}"]
        torch.testing.assert_close(summed[f"backbone.steering.shared.{name}"], both)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank: 0 is no width"),
        ({"rank": 17}, "rank: 17 is above the backbone's width 16"),
        ({"layers": [2]}, "layers: 2 is out of range; the layers are 0 to 1"),
        ({"layers": [-1]}, "layers: -1 is out of range"),
        ({"layers": []}, "layers: the list is empty"),
        ({"layers": [0, 0]}, "names a layer twice"),
        ({"layers": "every:0"}, "layers: 'every:0' is no choice"),
        ({"layers": "deeep"}, "layers: 'deeep' is no choice"),
        ({"placement": "block"}, "placement: there is no 'block'; did you mean"),
        ({"positions": "ratio:1.5"}, "positions: 'ratio:1.5' is outside"),
        ({"modalities": ["audio"]}, "modalities: the model has no audio encoder"),
        ({"parametrization": "tied"}, "parametrization: there is no 'tied'"),
        ({"init": "zero"}, "init: there is no 'zero'"),
        ({"dropout": 1.0}, "dropout: 1.0 is no probability"),
        ({"dropout_on": "all"}, "dropout_on: there is no 'all'"),
    ],
)
def test_bad_options_say_what_to_do(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built({"name": "mores", **options})
    (problem,) = caught.value.problems
    assert words in problem.message
    assert "\n" not in problem.message
    assert problem.key == "tuning.backbone"


def test_only_a_backbone_is_steered() -> None:
    with pytest.raises(ConfigError, match="mores: Mlp is no backbone"):
        built(FROZEN, tuning__projector={"name": "mores"})
    with pytest.raises(ConfigError, match="mores: Patches is no backbone"):
        built(FROZEN, tuning__vision={"name": "mores"})


def test_the_same_tokens_are_not_steered_twice_at_a_place() -> None:
    reft = {"name": "reft", "modalities": ["vision", "text"], "placement": "block_input"}
    with pytest.raises(ConfigError, match="loreft: mores steers vision at the block_input of layer 0 already"):
        built(RANDOM, reft)
    for other in ({**reft, "modalities": "text"}, {**reft, "placement": "block_output"}):
        model, _ = built(RANDOM, other)
        assert {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad and "backbone" in n} == {
            "steering",
            "steering_2",
        }
    model, collator = built({**RANDOM, "layers": [0]}, {**RANDOM, "layers": [1]})
    both, _ = built(RANDOM)
    map_of(both, 0).load_state_dict(map_of(model, 0).state_dict())
    map_of(both, 1).load_state_dict(map_of(model, 1, "steering_2").state_dict())
    batch = collator(samples())
    assert torch.equal(logits(both, batch), logits(model, batch))


def test_a_run_without_anything_to_steer_is_refused_with_the_map() -> None:
    model, collator = built(RANDOM)
    model.train()
    for _ in range(15):
        model(collator(samples(text_every=1)))
    with pytest.raises(DataError, match=r"'f1\+l1' of vision selected nothing .*vision 0, audio 0, text \d+\); steer"):
        model(collator(samples(text_every=1)))
    model, _ = built(RANDOM)
    model.train()
    for i in range(40):
        model(collator(samples(2, text_every=1 if i != 3 else 0)))


def test_what_it_says_it_steers() -> None:
    model, _ = built()
    strategy: Any = build(Tuning, {"name": "mores", "layers": "deep"})
    strategy.apply(model.backbone, model)
    assert strategy.resolved == ["model.model.layers.1"]
