"""Generated sounds: their formulas by hand, answers against what is measured in the waveform, and what a guess would score."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sounds_heard import SHORT, guessed, measured, pitch, question, runs, slope_of, spectrum, wave

from mllm_factory import ConfigError, Sample, Source, build, cli
from mllm_factory.assemble import build_collator, build_model, build_source
from mllm_factory.components.sources.sounds import Sounds
from mllm_factory.components.sources.sounds_tones import INSTRUMENTS, Note, Recording, excerpt, mixed, noise, tone
from mllm_factory.media import load_audio

# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("name", INSTRUMENTS)
@pytest.mark.parametrize("glide", [0.0, 7.0])
def test_a_tone_is_its_formula(name: str, glide: float) -> None:
    rate, length, pitch = 4000, 0.25, 300.0
    kind, n = INSTRUMENTS[name], 1000
    highest = pitch * 2 ** (glide / 24)
    phi, expected = 0.0, []
    for j in range(n):
        t = j / rate
        phi += 2 * math.pi * pitch * 2 ** ((t / length - 0.5) * glide / 12) / rate
        e = min(1, t / kind.attack) * min(1, (length - t) / 0.01) * math.exp(-t / (kind.decay * length))
        partials = zip(kind.ratios, kind.amplitudes, strict=True)
        expected.append(e * sum(a * math.sin(r * phi) for r, a in partials if r * highest < rate / 2))
    level = math.sqrt(sum(s * s for s in expected) / n)
    s = tone(Note(name, 0, length, pitch, glide, 0.2), rate)
    np.testing.assert_allclose(s, np.array(expected) * 0.2 / level, atol=2e-4)
    assert s.dtype == np.float32


def test_no_partial_folds_back() -> None:
    """An organ at 600 Hz and 4000 samples a second: 1, 2 are below 2000 Hz; 4 and 8 would appear at 1600 and 800."""
    s = tone(Note("organ", 0, 1.0, 600.0), 4000)
    power = np.abs(np.fft.rfft(s * np.hanning(len(s)))) ** 2
    assert power[[600, 1200]].min() > 1e4 * power[[800, 1600]].max()


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_noise_has_its_slope_and_level(slope: float) -> None:
    x = noise(slope, 0, 2**16, 4000)
    assert np.sqrt(np.mean(x**2)) == pytest.approx(1, rel=1e-4)
    assert slope_of(x, 4000) == pytest.approx(slope, abs=0.1)
    power = np.abs(np.fft.rfft(x)) ** 2
    assert power[: 19 * 2**16 // 4000].max() < 1e-6 * power.max()
    assert (noise(slope, 1, 2**16, 4000) != x).mean() > 0.9
    cut = excerpt(np.random.default_rng(0), slope, 0, 2**12, 4000)
    assert len(cut) == 2**12
    assert (np.lib.stride_tricks.sliding_window_view(x, 2**12)[:, :4] == cut[:4]).all(1).any()


def test_notes_are_added_where_they_start() -> None:
    background = np.full(1000, 0.5, np.float32)
    notes = [Note("flute", 0.1, 0.2, 300), Note("bell", 0.2, 0.3, 250)]
    x, rate = mixed(notes, background, 1000)
    expected = background.copy()
    expected[100:300] += tone(notes[0], 1000)
    expected[200:500] += tone(notes[1], 1000)
    np.testing.assert_array_equal(x, expected)
    assert (background == 0.5).all()
    assert rate == 1000


def test_recordings_compare_by_value() -> None:
    a, b = (Recording(np.ones(3, np.float32), 8000) for _ in "ab")
    assert a == b
    assert hash(a) == hash(b)
    assert a != Recording(np.ones(3, np.float32), 4000)
    assert a != Recording(np.zeros(3, np.float32), 8000)
    assert a != 3


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_true_of_the_waveform(split: str) -> None:
    source = Sounds(split, samples=240)
    wrong = [
        (question(s), s.reference)
        for s in map(source.__getitem__, range(240))
        if measured(question(s), s) != s.reference
    ]
    assert wrong == []


def test_every_recording_is_whole_and_within_range() -> None:
    for split in ("train", "test"):
        source = Sounds(split, samples=120, seconds=1.5, rate=10000)
        for i in range(120):
            x, rate = load_audio(source[i].media["audio"][0])
            assert (tuple(x.shape), rate) == ((1, 15000), 10000)
            assert 0.05 < float(x.abs().max()) <= 1


# ---------------------------------------------------------------- what splits do not share


def steady_pitches(split: str) -> list[float]:
    """Quarter tones above 440 Hz of the first beep of recordings with beeps."""
    source, found = Sounds(split, samples=300), []
    for sample in map(source.__getitem__, range(300)):
        if "beeps" in question(sample):
            a, b = runs(*wave(sample))[0]
            found.append(24 * math.log2(pitch(spectrum(*wave(sample), a, b)) / 440))
    return found


def test_train_and_test_are_disjoint_in_pitch() -> None:
    for split, offset in (("train", 0), ("test", 1)):
        found = np.array(steady_pitches(split))
        assert len(found) > 30
        assert np.abs((found - offset + 1) % 2 - 1).max() < 0.45  # even quarter tones, or odd ones


def test_train_and_test_are_disjoint_in_noise() -> None:
    colours: dict[str, set[int]] = {"train": set(), "test": set()}
    for split, found in colours.items():
        source = Sounds(split, samples=200, seconds=4.0)
        for sample in map(source.__getitem__, range(200)):
            if sample.reference != "one":
                continue
            x, rate = wave(sample)
            begin, end = runs(x, rate)[0]
            before, after = x[: max(0, begin - 5) * rate // 100], x[(end + 5) * rate // 100 :]
            found.add(round(slope_of(max(before, after, key=len), rate)))
    assert colours == {"train": {0, 2}, "test": {1}}


def test_samples_are_a_function_of_seed_split_and_index() -> None:
    def of(**options: Any) -> list[Sample]:
        source = build(Source, {"name": "sounds", "split": "train", "samples": 9, **SHORT, **options})
        return [source[i] for i in range(len(source))]

    some = of()
    assert len(some) == 9
    assert of() == some
    assert of(samples=4) == of(limit=4) == of(samples=4, limit=100) == some[:4]
    assert len({s.media["audio"] for s in some}) == 9
    for changed in (of(seed=1), of(split="test")):
        assert not {s.media["audio"] for s in changed} & {s.media["audio"] for s in some}
    assert [s.id for s in some[:2]] == ["sounds/train/0", "sounds/train/1"]
    with pytest.raises(IndexError):
        Sounds("train", samples=9)[9]


# ---------------------------------------------------------------- what a guess would score


def pairs(source: Source) -> list[tuple[str, str]]:
    return [(question(source[i]), source[i].reference) for i in range(len(source))]


def test_the_question_alone_gives_little() -> None:
    train, test = (pairs(Sounds(split, samples=n, **SHORT)) for split, n in (("train", 2000), ("test", 800)))
    assert {text for text, _ in test} <= {text for text, _ in train}
    assert len({text for text, _ in train}) == 12 + 3 * (4 + 3 + 5 + 2)  # open, closed
    closed = [[pair for pair in these if pair[1] in ("yes", "no")] for these in (train, test)]
    assert guessed(*closed) == pytest.approx(0.5, abs=0.08)
    # 3/4 (1/4 + 1/3 + 1/5 + 1/2) / 4 + 1/4 1/2
    assert guessed(train, test) == pytest.approx(0.366, abs=0.04)
    assert guessed(train, test) <= 0.55


# ---------------------------------------------------------------- options, and a model


@pytest.mark.parametrize("name", ["sounds", "sounds_and_shapes"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "tests"}, "split: there is none named 'tests'; did you mean 'test'"),
        ({"samples": 0}, "samples: 0 are no data set; use 1 or more"),
        ({"limit": 0}, "limit: 0 is less than 1 question"),
        ({"seed": -1}, "seed: -1 is negative"),
        ({"seconds": 0.4}, "seconds: 0.4 s are out of range; use 0.5 to 30"),
        ({"seconds": 31}, "seconds: 31 s"),
        ({"rate": 7999}, "rate: 7999 Hz"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        build(Source, {"name": name, "split": "train", **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "items"),
    [
        (("vision=null", "data=sounds"), {"audio": 3}),
        (("data=sounds_and_shapes",), {"vision": 3, "audio": 3}),
    ],
)
def test_a_model_takes_them(
    tree: Callable[..., dict[str, Any]], overrides: tuple[str, ...], items: dict[str, int]
) -> None:
    composed = tree(
        "audio=mel_conv", "audio.rate=8000", "audio.seconds=2.0", "audio.mels=40", "audio.dim=16", *overrides
    )
    model = build_model(composed)
    source = build_source(composed, "train", set(items))
    batch = build_collator(composed, model)([source[i] for i in range(3)])
    assert {name: len(item) for name, item in batch.media.items()} == items
    assert int((batch.modality == 2).sum()) == 3 * 25
    assert model(batch).loss_sum.item() > 0


@pytest.mark.slow
def test_the_experiment_learns_to_listen(tmp_path: Path) -> None:
    """Above 0.85 where the question alone gives at most 0.55, and no better than that with recordings exchanged."""
    assert cli.main(["train", "experiment=sounds", f"output_dir={tmp_path}", "data.eval.samples=800"]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["exact_match"] > 0.85
    assert found["ablation/audio/exact_match"] < 0.55
