"""Interventions: what they change, what they leave, and that they depend on nothing but the sample and the seed."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from counterfactual_toys import Both, made
from PIL import Image
from toys import Colours

from mllm_factory import ASSISTANT, PAD, SYSTEM, TEXT, USER, Batch, Message, Sample, build
from mllm_factory.components.metrics.interventions import (
    STEPS,
    _kept,
    blank_item,
    digests,
    drop,
    exchange,
    neutral_question,
    noise,
    question,
    select,
)
from mllm_factory.interfaces import Encoder

SNR = {0: 46.5, 100: 24.7, 250: 16.6, 400: 9.2, 500: 4.7, 700: -2.7, 999: -10.5}


def batch_of(*numbers: int, audio: bool = False, **options: int) -> Batch:
    _, collator = made(audio)
    source = Both(40) if audio else Colours(40, **options)
    return collator([source[i] for i in numbers])


@pytest.mark.parametrize(("step", "decibel"), SNR.items())
def test_the_diffusion_has_its_published_strength(step: int, decibel: float) -> None:
    kept = float(_kept()[step])
    assert 10 * math.log10(kept / (1 - kept)) == pytest.approx(decibel, abs=0.06)
    assert len(_kept()) == STEPS


def test_noise_is_what_the_formula_says() -> None:
    batch = batch_of(*range(4))
    big = torch.randn(4, 3, 200, 200, generator=torch.Generator().manual_seed(0))
    noised = noise(replace(batch, media={"vision": big}), "vision", 500, 0)
    kept = float(_kept()[500])
    e = (noised - kept**0.5 * big) / (1 - kept) ** 0.5
    assert float(e.mean()) == pytest.approx(0, abs=0.01) and float(e.std()) == pytest.approx(1, abs=0.01)
    assert abs(float((e * big).mean())) < 0.01 and abs(float((e[0] * e[1]).mean())) < 0.02


def test_noise_on_sound_is_as_loud_as_the_sound() -> None:
    batch = batch_of(*range(4), audio=True)
    quiet = 0.01 * torch.randn(4, 50000, generator=torch.Generator().manual_seed(0))
    quiet[3] = 0.0
    noised = noise(replace(batch, media={**batch.media, "audio": quiet}), "audio", 999, 0)
    kept = float(_kept()[999])
    rest = noised - kept**0.5 * quiet
    ratio = 10 * math.log10(kept * float(quiet[0].square().mean()) / float(rest[0].square().mean()))
    assert ratio == pytest.approx(-10.5, abs=0.2)
    assert bool((noised[3] == 0).all()), "silence stays silent"


def test_noise_belongs_to_the_sample() -> None:
    whole, part = batch_of(0, 1, 2, 3), batch_of(2, 3)
    assert torch.equal(noise(whole, "vision", 300, 0)[2:], noise(part, "vision", 300, 0))
    assert not torch.equal(noise(part, "vision", 300, 0), noise(part, "vision", 300, 1))
    two = batch_of(1, pictures=2)
    same = replace(two, media={"vision": two.media["vision"][:1].expand_as(two.media["vision"])})
    a, b = noise(same, "vision", 300, 0)
    assert not torch.equal(a, b), "each item has noise of its own"


def test_blank_pictures_are_the_mean_pixel() -> None:
    """A picture of the encoder's mean colour is 0 behind the transform, up to 8 bits."""
    node = {"name": "timm", "architecture": "test_vit", "image_size": 32}
    vision = build(Encoder, node, "vision")  # type: ignore[type-abstract]
    mean = vision.transform.shift / (255 * vision.transform.scale)  # type: ignore[attr-defined]
    grey = Image.new("RGB", (40, 40), tuple(round(255 * float(m)) for m in mean))
    items = vision.transform(grey)
    assert float((items - blank_item(vision, items)).abs().max()) < 0.02
    assert float(vision.transform(Image.new("RGB", (40, 40))).abs().max()) > 0.5


def test_blank_sound_is_silence() -> None:
    model, collator = made(audio=True)
    encoder = model.encoders["audio"]
    items = collator([Both(2)[0]]).media["audio"]
    silence = blank_item(encoder, items)  # type: ignore[arg-type]
    assert silence.shape == items[:1].shape
    assert torch.equal(silence, encoder.transform((torch.zeros(1, 40000), 16000))[:1])  # type: ignore[operator]
    assert not torch.equal(silence, items)


def test_a_neutral_question_changes_the_users_words_alone() -> None:
    batch = batch_of(*range(5), text_every=2)
    ids = [7, 8, 9]
    changed = neutral_question(batch, ids)
    words = question(batch)
    assert torch.equal(changed.input_ids[~words], batch.input_ids[~words])
    for name in ("labels", "attention_mask", "modality", "role"):
        assert getattr(changed, name) is getattr(batch, name)
    for row, places in enumerate(words):
        n = int(places.sum())
        assert changed.input_ids[row][places].tolist() == [ids[i % 3] for i in range(n)] and n > 5
    assert bool((batch.role[words] == USER).all()) and bool((batch.modality[words] == TEXT).all())
    text = [int(((row == USER) & (m == TEXT)).sum()) for row, m in zip(batch.role, batch.modality, strict=True)]
    assert words.sum(1).tolist() == text


@pytest.mark.parametrize("left", [False, True])
def test_dropping_is_collating_without(left: bool) -> None:
    _, collator = made()
    samples = [Colours(9, text_every=3)[i] for i in range(6)]
    batch = collator(samples)
    bare = collator([replace(s, media={}, messages=(_bare(s), s.messages[1])) for s in samples])
    if left:  # turn each row so that its padding comes first
        shift = (~batch.attention_mask).sum(1)
        at = (torch.arange(batch.input_ids.shape[1])[None] - shift[:, None]) % batch.input_ids.shape[1]
        names = ("input_ids", "labels", "attention_mask", "modality", "role")
        batch = replace(batch, **{name: getattr(batch, name).gather(1, at) for name in names}, left_padded=True)
    found = drop(batch, "vision", collator.pad_id)
    for name in ("input_ids", "labels", "attention_mask", "modality", "role"):
        assert torch.equal(getattr(found, name), getattr(bare, name)), name
    assert len(found.media["vision"]) == 0 == len(found.media_row["vision"]) and not found.left_padded
    assert {PAD, SYSTEM, USER, ASSISTANT} >= set(found.role.unique().tolist())


def _bare(sample: Sample) -> Message:
    return Message("user", sample.messages[0].text.replace("<image>", ""))


def test_an_exchange_is_as_large_as_it_can_be() -> None:
    draw = random.Random(0)
    for trial in range(300):
        n = draw.randrange(0, 12)
        identity = torch.tensor([draw.randrange(draw.randrange(1, 5)) for _ in range(n)], dtype=torch.long)
        place, moves = exchange(identity, torch.Generator().manual_seed(trial))
        assert sorted(place.tolist()) == list(range(n))
        assert torch.equal(place[~moves], torch.arange(n)[~moves])
        assert not (identity[place] == identity)[moves].any()
        m = int(identity.bincount().max()) if n else 0
        assert int(moves.sum()) == min(n, 2 * (n - m))


def test_digests_tell_pictures_apart() -> None:
    found = digests(batch_of(0, 1, 4, 8, pictures=1), "vision")
    assert found[0] == found[2] == found[3] != found[1]
    assert digests(batch_of(0, 3, text_every=3), "vision") == [[], []]
    assert [len(shown) for shown in digests(batch_of(0, 1, pictures=3), "vision")] == [3, 3]


def test_selected_rows_of_two_modalities() -> None:
    whole, own = batch_of(*range(5), audio=True), batch_of(1, 4, audio=True)
    chosen = select(whole, [1, 4])
    for name in ("vision", "audio"):
        assert torch.equal(chosen.media[name], own.media[name])
        assert torch.equal(chosen.media_row[name], own.media_row[name])
