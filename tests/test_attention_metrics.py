"""Shares, LMAR, MDI and AEI: identities, numbers by hand, and models whose attention is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_toys import brute_mass, brute_rows, left, made, maps, samples, talk, wider
from torch import Tensor
from toys import tree

from mllm_factory import Batch, ConfigError, DataError, Metric, MultimodalModel, Output, Tuning, build
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.components.metrics import lmar
from mllm_factory.components.metrics.attention_capture import AttentionStats, observe
from mllm_factory.components.metrics.attention_groups import GROUPS
from mllm_factory.evaluator import evaluate

TEXT = ("system", "user")


def metric(**options: Any) -> Any:
    return build(Metric, {"name": "attention", **options}, "metrics.m")


def measured(model: MultimodalModel, *batches: Batch, **options: Any) -> dict[str, float]:
    found = metric(**options)
    with torch.no_grad():
        for batch in batches:
            found.update(model, batch, Output())
    return found.compute()


def uniform(model: MultimodalModel) -> None:
    """Every query is zero, so a row looks at all that it sees alike."""
    for name, parameter in model.backbone.named_parameters():
        if "q_proj" in name or "q_norm" in name:
            parameter.data.zero_()


def stats_of(**groups: tuple[float, int]) -> AttentionStats:
    """One sample, layer, head and row, with (mass, keys) by group."""
    mass = torch.tensor([groups.get(name, (0.0, 0))[0] for name in GROUPS])
    size = torch.tensor([groups.get(name, (0.0, 0))[1] for name in GROUPS])
    rows, seen = mass.view(1, 1, 1, -1), size.float().view(1, 1, 1, -1)
    table = torch.zeros(1, 1, 1, 6, 6)
    table[0, 0, 0, 4] = mass
    count = torch.tensor([[0, 0, 0, 0, 1, 0]])
    return AttentionStats((0,), table, count, rows, seen, torch.ones(1, 1).bool(), torch.zeros(1, 1).long(), size[None])


# ---------------------------------------------------------------- numbers by hand


def test_mdi_and_aei_of_a_known_row() -> None:
    parts = lmar.per_token(stats_of(user=(0.6, 10), vision=(0.3, 40), bos=(0.1, 1)), "vision", TEXT)
    assert float(lmar.log_mdi(parts).exp()) == pytest.approx(8.0)
    text, media = (float(value.exp()) for value in lmar.log_aei(parts))
    assert text == pytest.approx(0.6 / 0.9 / (10 / 50)) == pytest.approx(3.333333, rel=1e-5)
    assert media == pytest.approx(0.3 / 0.9 / (40 / 50)) == pytest.approx(0.416667, rel=1e-5)
    assert float(lmar.lmar(parts)) == pytest.approx(1 / 8)


def test_a_first_token_that_takes_all_stays_outside_of_the_text_unless_asked_for() -> None:
    stats = stats_of(user=(0.1, 9), vision=(0.1, 10), bos=(0.8, 1))
    assert float(lmar.log_mdi(lmar.per_token(stats, "vision", TEXT)).exp()) == pytest.approx(10 / 9)
    assert float(lmar.log_mdi(lmar.per_token(stats, "vision", (*TEXT, "bos"))).exp()) == pytest.approx(9.0)


def test_copies_of_the_media_keys_leave_mdi_and_raise_the_share() -> None:
    logits = {"user": torch.randn(6), "vision": torch.randn(5)}
    for k in (1, 5, 10):
        weight = {"user": logits["user"].exp().sum(), "vision": k * logits["vision"].exp().sum()}
        total = sum(weight.values())
        stats = stats_of(
            **{g: (float(weight[g] / total), len(logits[g]) * (k if g == "vision" else 1)) for g in weight}
        )
        mdi = float(lmar.log_mdi(lmar.per_token(stats, "vision", TEXT)).exp())
        assert mdi == pytest.approx(float(logits["user"].exp().mean() / logits["vision"].exp().mean()), rel=1e-5)
        share = lmar.shares(stats)[0, 0]
        odds = float(share[GROUPS.index("vision")] / share[GROUPS.index("user")])
        assert odds == pytest.approx(k * float(logits["vision"].exp().sum() / logits["user"].exp().sum()), rel=1e-5)


def test_lmar_is_the_identity_of_the_share_where_text_is_all_the_rest() -> None:
    model, collator = made()
    batch = collator(samples(0, 1, 2))
    with torch.no_grad(), observe(model) as recorder:
        model(batch)
    stats = recorder.stats()
    first = replace(stats, rows=stats.rows[:, :, :1], visible=stats.visible[:, :, :1], valid=stats.valid[:, :1])
    parts = lmar.per_token(first, "vision", TEXT)  # the row before the answer sees no answer
    share = lmar.shares(first)[..., GROUPS.index("vision")]
    expected = share / parts.n_media / ((1 - share) / parts.n_text)
    torch.testing.assert_close(lmar.lmar(parts), expected)
    mdi, (text, media) = lmar.log_mdi(parts), lmar.log_aei(parts)
    torch.testing.assert_close(text - media, mdi)
    quota = parts.n_text / (parts.n_text + parts.n_media)
    torch.testing.assert_close(mdi, torch.logit(1 - share) - torch.logit(quota), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- models whose attention is known


@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt"])
def test_uniform_attention_is_balanced_for_any_sizes(architecture: str) -> None:
    model, collator = made(architecture, **({"sliding_window": 60} if architecture == "mistral" else {}))
    uniform(model)
    if architecture == "opt":
        for name, parameter in model.backbone.named_parameters():
            if "q_proj" in name:
                parameter.data.zero_()
    talks = [*samples(0, 1, 2), *samples(3, pictures=3), talk("<image>a", "red", "and now?", "blue", pictures=1)]
    found = measured(model, collator(talks), text=["system", "user", "answer"])
    for key in ("lmar/vision", "aei/vision/text", "aei/vision/media"):
        assert all(found[f"{key}/layer_{n:02d}"] == pytest.approx(1, abs=1e-5) for n in range(2))
    assert found["log_mdi/vision"] == pytest.approx(0, abs=1e-5)
    assert found["lmar/vision/undefined"] == 0
    alone = measured(model, collator(samples(0)))
    rows = brute_rows(collator(samples(0)), 0)
    assert alone["attention_share/vision"] == pytest.approx(sum(4 / (q + 1) for q in rows) / len(rows), abs=1e-6)


def test_all_mass_on_vision_is_flagged() -> None:
    parts = lmar.per_token(stats_of(user=(0.0, 5), vision=(1.0, 4)), "vision", TEXT)
    assert math.isnan(float(lmar.lmar(parts)))
    assert lmar.REASONS[int(parts.reason) - 1] == "zero_text"
    found = metric()
    found.modalities = ("vision",)
    found.add(stats_of(user=(0.0, 5), vision=(1.0, 4)), ["a"])
    found.add(stats_of(user=(0.5, 5), vision=(0.5, 5)), ["b"])
    result = found.compute()
    assert result["attention_share/vision"] == 0.75
    assert result["lmar/vision"] == result["lmar/vision/layer_00"] == 1  # of the sample that has one
    assert (
        result["lmar/vision/samples"]
        == result["lmar/vision/undefined"]
        == result["lmar/vision/undefined/zero_text"]
        == 1
    )
    assert result["attention_share/vision/undefined"] == 0


def test_no_mass_on_vision_is_an_lmar_of_zero_without_a_logarithm() -> None:
    found = metric()
    found.modalities = ("vision",)
    found.add(stats_of(user=(1.0, 5), vision=(0.0, 4)), ["a"])
    result = found.compute()
    assert result["lmar/vision"] == 0
    assert result["lmar/vision/undefined"] == 0
    assert math.isnan(result["log_mdi/vision"])
    assert result["log_mdi/vision/undefined/zero_media"] == result["aei/vision/undefined/zero_media"] == 1


def test_a_steering_map_that_adds_the_key_direction_raises_the_share() -> None:
    model, collator = made("gpt2", seed=3)
    batch = collator(samples(*range(8)))
    before = _visual(model, batch)
    node = {"name": "mores", "rank": 1, "layers": [1], "placement": "block_input", "positions": "all"}
    build(Tuning, node, "tuning.backbone").apply(model.backbone, model)
    maps_ = [m for m in model.modules() if hasattr(m, "base") and hasattr(m, "bias")]
    assert len(maps_) == 1
    assert torch.allclose(_visual(model, batch), before)  # it starts as the identity
    direction = _key_direction(model, batch)
    steer: Any = maps_[0]
    shares = []
    for length in (-6.0, 6.0):
        with torch.no_grad():
            steer.base.copy_(direction[:, None])
            steer.weight.copy_(direction[None])  # W = R^T: the state is kept, and R b added
            steer.bias.fill_(length)
        shares.append(_visual(model, batch))
    assert (shares[1][0] == before[0]).all()  # layer 0 comes before the map
    assert (shares[1][1] > before[1]).all()
    assert (shares[0][1] < before[1]).all()


def _visual(model: MultimodalModel, batch: Batch) -> Tensor:
    """[L, B] share of vision."""
    with torch.no_grad(), observe(model) as recorder:
        model(batch)
    return lmar.shares(recorder.stats())[..., GROUPS.index("vision")]


def _key_direction(model: MultimodalModel, batch: Batch) -> Tensor:
    """[D] what to add to a state so that the mean answer query of layer 1 finds it: W_k^T q, all heads."""
    attention: Any = model.backbone.layers[1].attn
    taken: list[Tensor] = []
    handle = attention.c_attn.register_forward_hook(lambda module, args, output: taken.append(output))
    with torch.no_grad():
        model(batch)
    handle.remove()
    D = model.backbone.dim
    rows = [taken[0][b, t, :D] for b in range(len(batch.ids)) for t in brute_rows(batch, b)]
    direction = attention.c_attn.weight[:, D : 2 * D].detach() @ torch.stack(rows).mean(0)
    direction = direction * model.backbone.layers[1].ln_1.weight.detach()
    direction = direction - direction.mean()  # what the norm takes away
    return direction / direction.norm()


def test_attention_is_not_use() -> None:
    """A model whose picture features are all zero cannot see, and attends to them all the same."""
    model, collator = made()
    for parameter in model.projectors["vision"].parameters():
        parameter.data.zero_()
    found = measured(model, collator(samples(0, 1)))
    assert found["attention_share/vision"] > 0.02
    exchanged = collator(samples(0, 1))
    exchanged = replace(exchanged, media={"vision": exchanged.media["vision"].flip(0)})
    with torch.no_grad():
        assert torch.equal(model(exchanged).loss_sum, model(collator(samples(0, 1))).loss_sum)


# ---------------------------------------------------------------- the metric


def test_its_numbers_are_those_of_the_eager_maps() -> None:
    model, collator = made()
    batches = [collator(samples(0, 1, 2)), collator(samples(3, 4))]
    found = measured(model, *batches, heads=True)
    share, ratio, logs, by_head = [], [], [], []
    for batch in batches:
        A = maps(model, batch)
        for b in range(len(batch.ids)):
            mass = brute_mass(batch, A, b, brute_rows(batch, b)).mean(2)  # [L, H, G], rows averaged
            n = [
                int((batch.modality[b] == 1).sum()),
                int(((batch.modality[b] == 0) & ((batch.role[b] == 1) | (batch.role[b] == 2))).sum()),
            ]
            vision, text = mass.mean(1)[:, 2] / n[0], mass.mean(1)[:, :2].sum(-1) / n[1]
            share.append(mass.mean(1))
            by_head.append(mass[..., 2])
            ratio.append(vision / text)
            logs.append(text.log() - vision.log())
    for layer in range(2):
        for g, name in enumerate(GROUPS):
            if name != "audio":
                expected = float(torch.stack(share)[:, layer, g].mean())
                assert found[f"attention_share/{name}/layer_{layer:02d}"] == pytest.approx(expected, abs=1e-5)
        assert found[f"lmar/vision/layer_{layer:02d}"] == pytest.approx(
            float(torch.stack(ratio)[:, layer].mean()), rel=1e-4
        )
        assert found[f"log_mdi/vision/layer_{layer:02d}"] == pytest.approx(
            float(torch.stack(logs)[:, layer].mean()), abs=1e-4
        )
        for head in range(4):
            expected = float(torch.stack(by_head)[:, layer, head].mean())
            assert found[f"attention_share/vision/layer_{layer:02d}/head_{head:02d}"] == pytest.approx(
                expected, abs=1e-5
            )
    total = sum(found[f"attention_share/{name}"] for name in (*(g for g in GROUPS if g != "audio"), "null"))
    assert total == pytest.approx(1, abs=1e-6)
    assert found["attention_share/null"] == pytest.approx(0, abs=1e-6)
    assert next(iter(found)) == "attention_share/vision"
    assert found["lmar/vision/tokens"] == 4
    assert found["lmar/vision/samples"] == 5


def test_batches_and_padding_do_not_change_it() -> None:
    model, collator = made()
    reference = measured(model, collator(samples(0, 1, 2, 3)))
    whole = collator(samples(2, 3))
    other = measured(model, collator(samples(0)), left(collator(samples(1))), wider(whole, 5))
    assert other == pytest.approx(reference, abs=1e-5)
    assert measured(model, collator(samples(0, 1, 2, 3))) == reference


def test_a_text_only_sample_is_counted_and_left_out() -> None:
    model, collator = made()
    with_text = measured(model, collator([*samples(0, 1), talk("why?", "so")]))
    without = measured(model, collator(samples(0, 1)))
    for key in ("attention_share/vision", "attention_share/user", "lmar/vision", "log_mdi/vision/median"):
        assert with_text[key] == pytest.approx(without[key], abs=1e-5)
    assert with_text["lmar/vision/undefined/no_media"] == with_text["lmar/vision/undefined"] == 2  # one for each layer
    assert with_text["attention_share/vision/undefined/no_media"] == 2
    assert with_text["attention_share/vision/samples"] == 2


def test_a_picture_out_of_the_window_is_told_as_such() -> None:
    model, collator = made("mistral", sliding_window=6)
    found = measured(model, collator([talk("<image>" + "far away " * 4, "red", pictures=1)]))
    assert found["attention_share/vision"] == 0
    assert math.isnan(found["lmar/vision"])
    assert found["lmar/vision/undefined/out_of_sight"] == 2


def test_records_hold_every_sample() -> None:
    model, collator = made()
    found = metric(readings=["lmar"])
    with torch.no_grad():
        found.update(model, collator([*samples(0, 1), talk("why?", "so")]), Output())
    assert [record["id"] for record in found.records] == ["colour 0", "colour 1", "talk"]
    assert found.records[0]["tokens"]["vision"] == 4
    values = [record["lmar/vision"][0] for record in found.records]
    assert math.isnan(values[2])
    assert found.compute()["lmar/vision/layer_00"] == pytest.approx(sum(values[:2]) / 2)
    assert not any(key.startswith("attention_share") for key in found.compute())


def test_it_is_fed_by_an_evaluation() -> None:
    node = tree()
    model = build_model(node)
    collator = build_collator(node, model)
    found = evaluate(
        model,
        _source(),
        collator,
        {"attention": metric(), "loss": build(Metric, {"name": "answer_loss"}, "m")},
        batch_size=2,
        device=torch.device("cpu"),
        autocast=torch.autocast("cpu", enabled=False),
    )
    assert found["samples"] == found["lmar/vision/samples"] == 5
    assert 0 < found["attention_share/vision"] < 1
    assert math.isfinite(found["answer_loss"])


def _source() -> Any:
    from toys import Colours

    return Colours(5)


def test_vision_and_audio_are_told_apart() -> None:
    model, collator = made()
    batch = collator(samples(0, pictures=2))
    second = batch.modality.cumsum(1) > 4
    both = replace(batch, modality=batch.modality + (second & (batch.modality == 1)).long())
    found = metric(readings=["attention_share", "lmar"])
    found.modalities = ("vision", "audio")
    with torch.no_grad(), observe(model) as recorder, model._sees(both):
        model.backbone(model.embed(batch))
    found.add(recorder.stats(), both.ids)
    A = maps(model, batch)
    mass = brute_mass(both, A, 0, brute_rows(both, 0)).mean((1, 2))  # [L, G]
    result = found.compute()
    for g, name in ((2, "vision"), (3, "audio")):
        assert result[f"attention_share/{name}/layer_01"] == pytest.approx(float(mass[1, g]), abs=1e-5)
    ratio = result["lmar/audio/layer_00"] / result["lmar/vision/layer_00"]
    assert ratio == pytest.approx(float(mass[0, 3] / mass[0, 2]), rel=1e-4)
    assert result["lmar/audio/tokens"] == result["lmar/vision/tokens"] == 4


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readings": ["lmra"]}, "readings: there is no 'lmra'; did you mean 'lmar'?"),
        ({"readings": []}, "readings: the list is empty"),
        ({"modalities": ["text"]}, "modalities: there is no 'text'"),
        ({"text": ["vision"]}, "text: there is no 'vision'"),
        ({"readings": ["lmar"], "heads": True}, "heads: only attention_share is told by head"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        metric(**options)


def test_a_modality_that_is_not_there() -> None:
    model, collator = made()
    found = metric(modalities=["audio"])
    with pytest.raises(ConfigError, match="modalities: the model has no audio encoder"):
        found.update(model, collator(samples(0)), Output())
    found = metric(modalities=["vision"])
    with torch.no_grad():
        found.update(model, collator([talk("why?", "so")]), Output())
    with pytest.raises(DataError, match="modalities: no sample carries vision"):
        found.compute()


def test_nothing_seen_is_nan() -> None:
    model, collator = made()
    found = metric()
    found.update(model, collator([]), Output())
    assert all(math.isnan(value) for value in found.compute().values())
