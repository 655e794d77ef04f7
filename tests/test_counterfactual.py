"""Counterfactual measures: planted models, formulas by hand, the model's own answers to inputs changed by hand, bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from counterfactual_toys import Both, bits, made, metric, on, picture, planted, run, run_with, silence
from PIL import Image
from toys import Colours, tree

from mllm_factory import (
    IGNORE_INDEX,
    Batch,
    ConfigError,
    DataError,
    Message,
    Metric,
    MultimodalModel,
    Output,
    Sample,
    build,
)
from mllm_factory.assemble import build_collator
from mllm_factory.components.metrics.counterfactual_scores import interactions, js, score, shapley
from mllm_factory.components.metrics.counterfactual_summary import ceiling
from mllm_factory.components.metrics.interventions import derangement, identities, neutral_question, seeded

CHANGES = ("", "/blank", "/noise_100", "/noise_700")
READINGS = ("image_gain{}", "image_gain{}/first", "js_image{}", "js_image{}/first", "flip_rate/vision{}")


def logp(model: MultimodalModel, batch: Batch) -> list[float]:
    """Mean log-probability of each row's answer tokens, from the whole table of logits."""
    with torch.no_grad():
        table = model.backbone.logits(model.backbone(model.embed(batch), batch.attention_mask)).double().log_softmax(-1)
    found = []
    for row, labels in enumerate(batch.labels):
        at = [t for t in range(1, len(labels)) if labels[t] != IGNORE_INDEX]
        found.append(sum(float(table[row, t - 1, labels[t]]) for t in at) / len(at))
    return found


# ---------------------------------------------------------------- numbers by hand


def test_divergence_of_known_distributions() -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1]]).double(), torch.tensor([[0.2, 0.5, 0.3]]).double()
    assert float(js(p, q)) == pytest.approx(0.132918, abs=1e-6) == float(js(q, p))
    assert float(js(p, p)) == 0.0
    apart = js(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]]))
    assert float(apart) == pytest.approx(math.log(2))


def test_gain_of_known_probabilities() -> None:
    """p = .9 with the picture and .3 without are 1.58496 bits."""
    full, other = (torch.tensor([[p, 1 - p]]).log() for p in (0.9, 0.3))
    at = (torch.tensor([0]), torch.tensor([0]), 1)
    with_it, without = score(full, full, *at), score(full, other, *at)
    assert float(with_it.logp - without.logp) / math.log(2) == pytest.approx(1.58496, abs=1e-5)
    assert float(with_it.right) == 1.0 and float(without.right) == 0.0 and float(without.flip) == 1.0


def test_scores_of_a_sample_are_over_its_own_tokens() -> None:
    full, other = torch.randn(6, 9), torch.randn(6, 9)
    targets, row = full.argmax(-1), torch.tensor([0, 0, 0, 2, 2, 2])
    targets[4] = (targets[4] + 1) % 9
    found = score(full, other, targets, row, 3)
    each = other.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert found.logp[[0, 2]].tolist() == pytest.approx([float(each[:3].mean()), float(each[3:].mean())], rel=1e-5)
    assert found.first[[0, 2]].tolist() == pytest.approx([float(each[0]), float(each[3])], rel=1e-5)
    assert all(math.isnan(float(getattr(found, name)[1])) for name in vars(found)), "a sample without answer tokens"
    assert score(full, full, targets, row, 3).right[[0, 2]].tolist() == [1.0, 0.0]
    flips = (full.argmax(-1) != other.argmax(-1)).float()
    assert found.flip[[0, 2]].tolist() == [float(flips[:3].max()), float(flips[3:].max())]


def test_scores_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = (torch.randn(7, 5), torch.randn(7, 5), torch.randint(5, (7,)), torch.tensor([0, 0, 1, 1, 1, 2, 3]), 4)
    whole = score(*given)
    monkeypatch.setattr("mllm_factory.components.metrics.counterfactual_scores.ROWS", 10)
    assert all(torch.equal(getattr(whole, name), getattr(score(*given), name)) for name in vars(whole))


def test_shapley_of_known_games() -> None:
    three = shapley(["0", "1", "2"], lambda s: float("0" in s) + 2.0 * ({"1", "2"} <= s))
    assert three == {"0": pytest.approx(1.0), "1": pytest.approx(1.0), "2": pytest.approx(1.0)}
    table = {frozenset(): 0.5, frozenset("V"): 0.5, frozenset("T"): 0.5, frozenset("VT"): 1.0}
    assert shapley(["V", "T"], table.__getitem__) == {"V": 0.25, "T": 0.25}
    assert interactions(["V", "T"], table.__getitem__) == {("V", "T"): 0.5}
    redundant = {s: 0.5 + 0.5 * bool(s) for s in table}
    assert shapley(["V", "T"], redundant.__getitem__) == {"V": 0.25, "T": 0.25}, "equal values in opposite regimes"
    assert interactions(["V", "T"], redundant.__getitem__) == {("V", "T"): -0.5}
    only = {s: 0.5 + 0.5 * ("V" in s) for s in table}
    assert shapley(["V", "T"], only.__getitem__) == {"V": 0.5, "T": 0.0}
    assert interactions(["V", "T"], only.__getitem__) == {("V", "T"): 0.0}


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_shapley_values_sum_to_the_total_and_know_no_order(n: int) -> None:
    players, generator = [str(i) for i in range(n)], torch.Generator().manual_seed(n)
    table: dict[frozenset[str], float] = {}

    def v(s: frozenset[str]) -> float:
        return table.setdefault(s, float(torch.randn((), generator=generator)))

    found = shapley(players, v)
    assert sum(found.values()) == pytest.approx(v(frozenset(players)) - v(frozenset()))
    assert shapley(players[::-1], v) == pytest.approx(found)
    same = shapley(players, lambda s: float(len(s) ** 2))
    assert list(same.values()) == pytest.approx([float(n)] * n), "alike players get alike"


def test_the_ceiling_of_the_perceptual_score() -> None:
    """A perfect model on labels 3 : 1 scores .625 when pictures are permuted at random."""
    labels = ["a", "a", "a", "b"]
    assert ceiling(labels) == 1 - 0.625 == sum(a != b for a in labels for b in labels) / 16
    assert math.isnan(ceiling([]))


# ---------------------------------------------------------------- planted models


def test_a_text_only_model_gains_exactly_nothing_but_attends() -> None:
    model, collator = made()
    options = {"noise": [100, 700], "drop": True, "shuffles": 2}
    blind = run(silence(model, "vision"), collator, Colours(16), **options)
    for change in CHANGES:
        for reading in READINGS:
            key = reading.format(change)
            assert blind[key] == 0.0, key
    assert blind["modality_shapley/vision"] == 0.0 == blind["interaction/vision+text"]
    assert blind["modality_shapley/share/text"] == 1.0 and blind["image_gain/p"] == 1.0
    assert blind["image_gain/low"] == 0.0 == blind["image_gain/high"]
    assert blind["js_image/drop"] > 1e-3 and blind["image_gain/drop"] != 0.0, "a layout artefact"
    attention = run_with(build(Metric, {"name": "attention"}, "m"), model, collator, Colours(16), 8)  # type: ignore[type-abstract]
    assert attention["attention_share/vision"] > 0.05, "attention is not use"


def test_the_same_model_with_its_projector_depends_on_the_picture() -> None:
    model, collator = made()
    seeing = run(model, collator, Colours(16), noise=[100, 700])
    for change in CHANGES:
        assert seeing[f"js_image{change}"] > 1e-7, change
        assert seeing[f"image_gain{change}"] != 0.0
    assert seeing["js_image/noise_100"] < seeing["js_image/noise_700"]
    assert seeing["noise_floor/js"] < 1e-9 < 1e-3 < seeing["js_image"], "rounding does not explain it"
    assert 0 <= seeing["noise_floor/gain"] < 1e-4


def test_the_noise_floor_tells_what_the_batch_layout_does() -> None:
    """A model whose logits shift with the number of rows: log-odds 10 + rows, eight rows against four."""
    model, collator = planted(lambda v, q: "ab"[v or 0])
    forward = model.forward

    def shifted(batch: Batch, **options: Any) -> Output:
        output = forward(batch, **options)
        table = output.logits
        return Output(
            output.loss_sum, output.num_labels, table + table.sign() * len(batch.ids) if table is not None else None
        )

    model.forward = shifted  # type: ignore[method-assign,assignment]
    values = on(model, collator, [bits(lambda v, q: "ab"[v], 8)]).compute()
    others = len(model.backbone.tokenizer) - 1
    expected = math.log1p(others * math.exp(-14)) - math.log1p(others * math.exp(-18))
    assert values["noise_floor/gain"] == pytest.approx(expected, rel=1e-3) and values["noise_floor/js"] > 0


def test_a_model_that_only_looks() -> None:
    """Its answer flips where the other picture's answer differs; the question is worth nothing."""
    model, collator = planted(lambda v, q: "x" if v is None else "ab"[v])
    samples = bits(lambda v, q: "ab"[v], ones=1)
    found = on(model, collator, [samples], shuffles=4)
    values = found.compute()
    batch = collator(samples)
    collisions = []
    for k in range(4):
        moved = derangement(torch.arange(16), seeded(0, "shuffle", batch.ids, "vision", k)).tolist()
        collisions.append(sum(batch.references[i] == batch.references[j] for i, j in enumerate(moved)) / 16)
    other = 1 - sum(collisions) / 4
    assert len(set(collisions)) > 1 and 0 < other < 1
    assert values["flip_rate/vision"] == pytest.approx(other) == values["perceptual_score/vision"]
    assert values["perceptual_score/vision/normalised"] == pytest.approx(other)
    assert values["perceptual_score/vision/ceiling"] == pytest.approx(1 - 0.75**2 - 0.25**2)
    assert values["accuracy"] == 1.0 and values["blind_accuracy/majority"] == 0.75
    assert values["accuracy/low"] == pytest.approx(0.806, abs=1e-3), "Wilson's interval of 16 of 16"
    assert values["modality_shapley/text"] == 0.0 == values["interaction/vision+text"]
    assert values["modality_shapley/vision/accuracy"] == 1.0 == values["multimodal_gain/vision"]
    assert values["blind_accuracy/question"] == 1.0 and values["blind_accuracy/everything"] == 0.0
    assert values["multimodal_gain/vision/p"] == pytest.approx(2 / 2**16)
    assert values["image_gain/draws_sd"] > 0


def test_a_model_that_needs_both() -> None:
    """XOR, 0 for what is not given: accuracies .5, .5, .5, 1."""
    model, collator = planted(lambda v, q: "ab"[(v or 0) ^ (q or 0)])
    values = on(model, collator, [bits(lambda v, q: "ab"[v ^ q])]).compute()
    assert values["accuracy"] == 1.0
    assert values["blind_accuracy/vision/blank"] == 0.5 == values["blind_accuracy/question"]
    assert values["blind_accuracy/everything"] == 0.5
    assert values["modality_shapley/vision/accuracy"] == 0.25 == values["modality_shapley/text/accuracy"]
    assert values["interaction/vision+text/accuracy"] == 0.5 and values["interaction/vision+text"] > 0
    assert values["modality_shapley/share/vision"] == pytest.approx(0.5)


def test_a_model_to_which_either_would_do() -> None:
    model, collator = planted(lambda v, q: "x" if v is None and q is None else "ab"[v if v is not None else q or 0])
    samples = [
        s for s in bits(lambda v, q: "ab"[v], n=32) if s.messages[0].text[7] == {"a": "0", "b": "1"}[s.reference]
    ]
    values = on(model, collator, [samples]).compute()
    assert values["modality_shapley/vision/accuracy"] == values["modality_shapley/text/accuracy"] == 0.5
    assert values["interaction/vision+text/accuracy"] == -1.0


def test_a_picture_that_hurts_has_a_negative_gain() -> None:
    model, collator = planted(lambda v, q: "a" if v is None else "b")
    values = on(model, collator, [bits(lambda v, q: "a")]).compute()
    assert values["image_gain/blank"] < -1 and values["image_gain/blank/high"] < 0
    assert values["image_gain/blank/first"] == pytest.approx(2 * values["image_gain/blank"]), "two tokens an answer"
    assert values["multimodal_gain/vision"] == -1.0 and math.isnan(values["perceptual_score/vision/normalised"])


# ---------------------------------------------------------------- against inputs changed by hand


def test_a_shuffle_is_the_model_on_exchanged_pictures() -> None:
    model, collator = made()
    samples = [Colours(20)[i] for i in range(6)]
    batch = collator(samples)
    found = on(model, collator, [samples], seed=3)
    identity = identities(batch.media["vision"], batch.media_row["vision"])
    moved = derangement(identity, seeded(3, "shuffle", batch.ids, "vision", 0))
    assert moved is not None
    mixed = collator([replace(s, media=samples[int(moved[i])].media) for i, s in enumerate(samples)])
    expected = [a - b for a, b in zip(logp(model, batch), logp(model, mixed), strict=True)]
    assert [row.values["image_gain"] for row in found.rows] == pytest.approx(expected, abs=1e-5)
    assert found.compute()["image_gain"] == pytest.approx(sum(expected) / 6, abs=1e-5)
    assert max(map(abs, expected)) > 1e-2


def test_blank_and_drop_are_the_model_on_black_pictures_and_on_none() -> None:
    """The toy encoder does not normalise: 0 is black."""
    model, collator = made()
    samples = [Colours(20)[i] for i in range(6)]
    batch = collator(samples)
    black = collator([replace(s, media={"vision": (Image.new("RGB", (12, 12)),)}) for s in samples])
    bare = [replace(s, media={}, messages=(_bare(s), s.messages[1])) for s in samples]
    rows = on(model, collator, [samples], drop=True).rows
    whole = logp(model, batch)
    for key, changed in (("image_gain/blank", black), ("image_gain/drop", collator(bare))):
        expected = [a - b for a, b in zip(whole, logp(model, changed), strict=True)]
        assert [row.values[key] for row in rows] == pytest.approx(expected, abs=1e-5), key


def _bare(sample: Sample) -> Message:
    return Message("user", sample.messages[0].text.replace("<image>", ""))


def test_shapley_is_the_four_answers_by_hand() -> None:
    model, collator = made()
    samples = [Colours(20)[i] for i in range(6)]
    batch = collator(samples)
    black = collator([replace(s, media={"vision": (Image.new("RGB", (12, 12)),)}) for s in samples])
    ids = model.backbone.tokenizer("Answer. ")["input_ids"]
    tv, t = (torch.tensor(logp(model, b)) for b in (batch, black))
    v, nothing = (torch.tensor(logp(model, neutral_question(b, ids))) for b in (batch, black))
    values = on(model, collator, [samples]).compute()
    assert values["modality_shapley/vision"] == pytest.approx(float(((v - nothing) + (tv - t)).mean() / 2), abs=1e-5)
    assert values["modality_shapley/text"] == pytest.approx(float(((t - nothing) + (tv - v)).mean() / 2), abs=1e-5)
    assert values["interaction/vision+text"] == pytest.approx(float((tv - t - v + nothing).mean()), abs=1e-5)
    total = values["modality_shapley/vision"] + values["modality_shapley/text"]
    assert (
        total
        == pytest.approx(values["modality_shapley/total"])
        == pytest.approx(float((tv - nothing).mean()), abs=1e-5)
    )


def test_blank_does_not_depend_on_the_batches() -> None:
    model, collator = made()
    kept = [run(model, collator, Colours(12), size) for size in (2, 5, 12)]
    for key in ("image_gain/blank", "js_image/blank", "modality_shapley/text", "image_gain/blank/low"):
        assert kept[0][key] == pytest.approx(kept[1][key], abs=1e-5) == pytest.approx(kept[2][key], abs=1e-5)


# ---------------------------------------------------------------- audio, and both


def test_three_players() -> None:
    model, collator = made(audio=True)
    values = run(model, collator, Both(12))
    players = ("vision", "audio", "text")
    for end in ("", "/accuracy"):
        total = sum(values[f"modality_shapley/{name}{end}"] for name in players)
        assert total == pytest.approx(values[f"modality_shapley/total{end}"], abs=1e-9)
    assert sum(values[f"modality_shapley/share/{name}"] for name in players) == pytest.approx(1.0)
    assert {"interaction/vision+audio", "interaction/vision+text", "interaction/audio+text"} <= set(values)
    assert values["js_audio"] > 1e-4 and values["js_image"] > 1e-4 and values["audio_gain/samples"] == 12.0


def test_a_deaf_model_gains_nothing_from_sound() -> None:
    model, collator = made(audio=True)
    values = run(silence(model, "audio"), collator, Both(8), noise=[300])
    for key in ("audio_gain", "js_audio", "audio_gain/blank", "js_audio/noise_300", "flip_rate/audio"):
        assert values[key] == 0.0, key
    assert abs(values["modality_shapley/audio"]) < 1e-12 and values["js_image"] > 1e-4


def test_a_sample_without_sound_has_no_value_for_it() -> None:
    model, collator = made(audio=True)
    samples = [Both(8)[i] for i in range(4)] + [Colours(9)[i] for i in range(4, 8)]
    found = on(model, collator, [samples])
    values = found.compute()
    assert values["audio_gain/samples"] == 4.0 and values["image_gain/samples"] == 8.0
    assert values["audio_gain/undefined"] == 4.0 == values["audio_gain/undefined/no_media"]
    alone = found.rows[5].values
    assert math.isnan(alone["modality_shapley/audio"]) and math.isnan(alone["interaction/vision+audio"])
    assert alone["modality_shapley/vision"] + alone["modality_shapley/text"] == pytest.approx(
        alone["modality_shapley/total"]
    )


# ---------------------------------------------------------------- repeats, counts and bad input


def test_two_runs_give_equal_numbers_and_the_seed_matters() -> None:
    model, collator = made()
    options: dict[str, Any] = {"noise": [500], "shuffles": 2}
    first, again = (run(model, collator, Colours(12), **options) for _ in range(2))
    assert str(first) == str(again)
    other = run(model, collator, Colours(12), seed=1, **options)
    assert other["image_gain"] != first["image_gain"] and other["image_gain/noise_500"] != first["image_gain/noise_500"]
    assert other["image_gain/blank"] == first["image_gain/blank"] and other["accuracy"] == first["accuracy"]


def test_batches_without_a_stranger_are_counted() -> None:
    model, collator = made()
    red, mixed = [Colours(40)[i] for i in (0, 4, 8)], [Colours(40)[i] for i in range(4)]
    values = on(model, collator, [red, mixed]).compute()
    assert values["image_gain/samples"] == 4.0 and values["image_gain/undefined"] == 3.0
    assert values["image_gain/undefined/no_partner"] == 3.0
    crowded = [Colours(40)[i] for i in (0, 4, 8, 1)]  # three of four are red: one red and the green change places
    found = on(model, collator, [crowded])
    assert sum(math.isnan(row.values["image_gain"]) for row in found.rows) == 2
    assert not math.isnan(found.rows[3].values["image_gain"])
    assert found.compute()["image_gain/undefined/no_partner"] == 2.0
    averaged = on(model, collator, [crowded], shuffles=20).compute()
    assert averaged["image_gain/samples"] == 4.0, "each red is chosen once"
    values = on(model, collator, [red]).compute()
    assert math.isnan(values["image_gain"]) and math.isfinite(values["image_gain/blank"])
    assert math.isnan(values["image_gain/blank/low"]), "one picture has no interval"


def test_questions_about_one_picture_are_one_cluster() -> None:
    model, collator = made()
    samples = [
        Sample(f"{i}", s.messages, {"vision": (picture(0, i // 3),)}) for i, s in enumerate(bits(lambda v, q: "a", 12))
    ]
    assert on(model, collator, [samples[:6], samples[6:]]).compute()["clusters"] == 4.0


def test_no_number_is_infinite() -> None:
    model, collator = made()
    values = run(model, collator, Colours(13, text_every=3), 5, drop=True, noise=[0, 999])
    assert not any(math.isinf(value) for value in values.values())
    assert values["image_gain/samples"] + values["image_gain/undefined"] == 13.0


def test_tables_hold_every_sample() -> None:
    model, collator = made()
    found = metric()
    values = run_with(found, model, collator, Colours(10, text_every=4), 5)
    lines = found.tables()["samples"]
    assert {line["id"] for line in lines} == {Colours(10, text_every=4)[i].id for i in range(10)}
    kept = [line["image_gain"] for line in lines if not math.isnan(line["image_gain"])]
    assert sum(kept) / len(kept) == pytest.approx(values["image_gain"])
    assert all(line["answer_tokens"] == len(line["reference"]) + 1 for line in lines), "bytes and the end of the turn"
    assert not any(key.startswith("_") for line in lines for key in line)


def test_data_and_models_without_the_modality() -> None:
    model, collator = made()
    with pytest.raises(ConfigError, match="modalities: the model has no audio encoder; remove audio or choose audio="):
        run(model, collator, Colours(4), modalities=["audio"])
    with pytest.raises(DataError, match="modalities: no sample carries vision; evaluate on data that has it"):
        run(model, collator, Colours(4, text_every=1), modalities=["vision"])
    values = run(model, collator, Colours(4, text_every=1))
    assert math.isnan(values["image_gain"]) and values["image_gain/undefined/no_media"] == 4.0
    assert math.isnan(metric().compute()["image_gain"])


def test_refused_samples_are_no_samples() -> None:
    model, _ = made()
    short = build_collator(tree(data__max_length=8), model)
    assert math.isnan(run(model, short, Colours(4))["image_gain"])


def test_a_model_in_training_mode_is_refused() -> None:
    model, collator = made()
    batch = collator([Colours(4)[i] for i in range(4)])
    output = Output(logits=model(batch, logits=True).logits)
    with pytest.raises(ConfigError, match="counterfactual: the model is in training mode"):
        metric().update(model.train(), batch, output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": [1000]}, "noise: there is no step 1000; use 0 to 999"),
        ({"noise": [-1]}, "noise: there is no step -1"),
        ({"shuffles": 0}, "shuffles: 0 exchanges measure nothing; use 1 or more"),
        ({"resamples": 0}, "resamples: 0 give no interval; use 1 or more"),
        ({"neutral": " "}, "neutral: no words; give some"),
        ({"modalities": ["video"]}, "modalities: there is no 'video'"),
        ({"modalities": []}, "modalities: the list is empty"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        metric(**options)
