"""Questions about a picture and a sound: answers against pixels and waveforms, and what either one alone would score."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import easy_vqa
import numpy as np
import pytest
from PIL import Image
from sounds_heard import SHORT, guessed, heard_motion, heard_timbre, question, wave

from mllm_factory import ConfigError, Sample, Source, build
from mllm_factory.components.sources.sounds_and_shapes import SoundsAndShapes, pictures

COLOURS = {
    **{"black": (0, 0, 0), "gray": (128, 128, 128), "teal": (0, 128, 128), "brown": (165, 42, 42)},
    **{"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)},
}


def colour_of(file: str) -> str:
    """The most frequent colour that is not like the ground's."""
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3).astype(int)
    inside = Counter(map(tuple, pixels[np.abs(pixels - pixels[0]).sum(1) > 60].tolist())).most_common(1)[0][0]
    return next(name for name, value in COLOURS.items() if value == inside)


def shapes_of(split: str) -> dict[str, str]:
    """File name -> shape, from what easy-VQA asks about ("what color is the circle?") or affirms."""
    questions, answers, numbers = getattr(easy_vqa, f"get_{split}_questions")()
    found = {}
    for text, answer, number in zip(questions, answers, numbers, strict=True):
        denied = (answer == "no") != bool({"no", "not"} & set(text.split()))
        for shape in ("circle", "rectangle", "triangle"):
            if not denied and shape in (*text.rstrip("?").split(), answer):
                found[f"{number}.png"] = shape
    return found


def half_seen(sample: Sample, shapes: dict[str, str]) -> str:
    """Colour and shape of the sample's picture."""
    file = sample.media["vision"][0]
    return f"{colour_of(file)} {shapes[file.rpartition('/')[2]]}"


def mixed_samples(form: str, split: str, n: int, **options: Any) -> list[Sample]:
    source = SoundsAndShapes(split, samples=n, form=form, **{**SHORT, **options})
    assert source.modalities == {"vision", "audio"}
    return [source[i] for i in range(n)]


def seen_half(sample: Sample, shapes: dict[str, str]) -> bool:
    """Whether the picture has what a match question says of it."""
    said = re.search(r"shape (?:is )?(?:an? )?(\w+)", question(sample))
    assert said is not None
    return said[1] in half_seen(sample, shapes).split()


def test_match_answers_are_true_and_one_modality_gives_half() -> None:
    shapes = shapes_of("test")
    some = mixed_samples("match", "test", 80, seconds=2.0, rate=8000)
    for sample in some:
        said = re.search(r"sound (?:is )?(an? )?(\w+)", question(sample))
        assert said is not None
        heard = (heard_timbre if said[1] else heard_motion)(*wave(sample)) == said[2]
        assert sample.reference == ("yes" if heard == seen_half(sample, shapes) else "no"), question(sample)
    many = mixed_samples("match", "test", 1200)
    seen = [seen_half(sample, shapes) for sample in many]
    answers = [sample.reference for sample in many]
    heard_halves = [half == (answer == "yes") for half, answer in zip(seen, answers, strict=True)]
    halves = len(many) // 2
    for clue in (seen, heard_halves, [question(sample) for sample in many]):
        known = list(zip(clue, answers, strict=True))
        assert guessed(known[:halves], known[halves:]) <= 0.55
    both = list(zip(zip(seen, heard_halves, strict=True), answers, strict=True))
    assert guessed(both[:halves], both[halves:]) == 1


def test_choice_answers_are_true_and_one_modality_gives_half() -> None:
    shapes = shapes_of("test")
    for sample in mixed_samples("choice", "test", 80, seconds=2.0, rate=8000):
        named = re.findall(r"\b(color|shape)\b", question(sample))
        conditions = re.findall(r"(?:sound is|it is|is it) (?:an? )?(\w+)", question(sample))
        hear = heard_motion if {"rising", "falling", "steady"} & set(conditions) else heard_timbre
        wanted = named[conditions.index(hear(*wave(sample)))]
        colour, shape = half_seen(sample, shapes).split()
        assert sample.reference == {"color": colour, "shape": shape}[wanted], question(sample)
    train, test = mixed_samples("choice", "train", 1000), mixed_samples("choice", "test", 600)

    def told(clue: Callable[[Sample], Any]) -> float:
        return guessed(*([(clue(s), s.reference) for s in these] for these in (train, test)))

    every = {**{f"train{k}": v for k, v in shapes_of("train").items()}, **{f"test{k}": v for k, v in shapes.items()}}

    def seen(sample: Sample) -> str:
        file = sample.media["vision"][0]
        return f"{colour_of(file)} {every[('train' if '/train/' in file else 'test') + file.rpartition('/')[2]]}"

    assert told(seen) == pytest.approx(0.5, abs=0.05)
    assert told(lambda s: s.reference in COLOURS) == pytest.approx(
        (1 / 8 + 1 / 3) / 2, abs=0.06
    )  # all that a sound tells
    assert told(question) <= 0.3


def test_the_forms_are_mixed_and_pictures_are_of_the_split() -> None:
    some = mixed_samples("both", "train", 300)
    match = sum(sample.reference in ("yes", "no") for sample in some)
    assert 110 < match < 190
    assert all("/train/" in sample.media["vision"][0] for sample in some)
    assert all(sample.messages[0].text.startswith("<image>\n<audio>\n") for sample in some)
    for split, published in (("train", 4000), ("test", 1000)):
        by_look = pictures(split)
        files = [{file for of in by_look[look].values() for file in of} for look in ("color", "shape")]
        assert files[0] == files[1]
        assert 0.7 * published < len(files[0]) <= published
        assert sum(map(len, by_look["color"].values())) == len(files[0])


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="form"):
        build(Source, {"name": "sounds_and_shapes", "split": "train", "form": "and"})
