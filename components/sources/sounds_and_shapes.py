"""One picture and one recording in a question that needs both: for measures that tell vision, audio and text apart.

Pictures are easy-VQA's (Zhou 2019), recordings those of ``sounds``. A plain "is A and is B?" with balanced answers would
give either modality alone 0.75 at best: the answer is certain wherever its own half is false. So the questions here are of
two other forms, in which a half alone decides nothing:

    match    yes if both halves are true or both false, with independent fair halves: either modality alone gives 1/2
    choice   the recording says which of two properties of the picture to name: the picture alone gives 1/2, the recording
             alone 1/8 of colours and 1/3 of shapes
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from mllm_factory import Message, Sample, Source, register
from mllm_factory.components.sources.easy_vqa import EasyVQA
from mllm_factory.components.sources.sounds import check_options, random_of
from mllm_factory.components.sources.sounds_scenes import (
    ATTRIBUTES,
    VOICES,
    YES_NO,
    other,
    pick,
    record,
    scene,
    with_article,
)

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
LOOKS = {"color": COLOURS, "shape": SHAPES}
"""Properties of a picture and their values, in easy-VQA's words."""

HEARD = ("motion", "timbre")
"""Attributes of a recording that are asked for."""

OWN = 1
"""Tells the generator of these samples from that of ``sounds``."""

MATCH = (
    "Is the shape {} and the sound {}, or neither of the two?",
    "Is the shape {} exactly when the sound is {}?",
    "Both true or both false: the shape is {}, the sound is {}?",
)
CHOICE = (
    "If the sound is {}, what is the {} in the image? If it is {}, what is the {}?",
    "Name one thing in the image. The sound is {}: its {}. The sound is {}: its {}.",
    "The sound is {}? Then say the {}. Or is it {}? Then say the {}.",
)

Pictures = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Property -> value -> files of the pictures that have it."""


def pictures(split: str) -> Pictures:
    """The pictures of a split of which easy-VQA's open questions and their answers tell colour and shape.

    Raises:
        ValueError: the package easy-vqa is not installed.
    """
    images = Path(EasyVQA(split, limit=1)[0].media["vision"][0]).parent
    looks: dict[int, dict[str, str]] = defaultdict(dict)
    for question, answer, picture in json.loads((images.parent / "questions.json").read_text(encoding="utf-8")):
        words = {*question.rstrip("?").split(), answer} if answer not in YES_NO else set()
        for look, values in LOOKS.items():
            for value in words.intersection(values):
                looks[picture][look] = value
    known = {str(images / f"{picture}.png"): seen for picture, seen in looks.items() if len(seen) == len(LOOKS)}
    return {
        look: {value: tuple(file for file, seen in known.items() if seen[look] == value) for value in values}
        for look, values in LOOKS.items()
    }


@register("sounds_and_shapes")
class SoundsAndShapes(Source):
    """One question about a picture of a coloured shape and a generated recording, answered in one word.

    Forms: ``match`` ("Is the shape blue and the sound rising, or neither of the two?", yes or no, equally likely) and
    ``choice`` ("If the sound is rising, what is the color in the image? If it is falling, what is the shape?"). Neither
    the picture nor the recording alone gives more than 1/2. Pictures and recordings of the two splits differ.

    Args:
        split: ``train`` or ``test``.
        samples: questions, each with a recording of its own and one of easy-VQA's pictures.
        limit: use the first so many of them.
        seed: of everything that is drawn.
        seconds: length of a recording.
        rate: samples a second.
        form: ``match``, ``choice``, or ``both`` for equal parts.

    Raises:
        ValueError: an option outside its range, or the package easy-vqa is not installed.
    """

    def __init__(
        self,
        split: str,
        samples: int = 20000,
        limit: int | None = None,
        seed: int = 0,
        seconds: float = 2.0,
        rate: int = 8000,
        form: Literal["match", "choice", "both"] = "both",
    ) -> None:
        self._places = range(check_options(split, samples, limit, seed, seconds, rate))
        self.modalities = frozenset({"vision", "audio"})
        self._split, self._seed, self._seconds, self._rate = split, seed, seconds, rate
        self._forms = [name for name in FORMS if form in (name, "both")]
        self._pictures = pictures(split)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        """Question ``index`` as ``<image>``, ``<audio>`` and the question, then the answer."""
        index = self._places[index]
        random, voice = random_of(self._split, self._seed, index, OWN), VOICES[self._split]
        attribute = pick(random, HEARD)
        question, answer, file, value = FORMS[pick(random, self._forms)](random, self._pictures, attribute)
        _, notes = scene(random, voice, attribute, {attribute: value}, self._seconds)
        recording = record(random, voice, notes, self._seconds, self._rate)
        messages = (Message("user", f"<image>\n<audio>\n{question}"), Message("assistant", answer))
        media = {"vision": (file,), "audio": (recording,)}
        return Sample(f"sounds_and_shapes/{self._split}/{index}", messages, media)


def _match(random: np.random.Generator, among: Pictures, attribute: str) -> tuple[str, str, str, str]:
    """Question, answer, picture, and value of the recording's attribute."""
    look = pick(random, list(LOOKS))
    seen, heard = pick(random, LOOKS[look]), pick(random, ATTRIBUTES[attribute].values)
    question = pick(random, MATCH).format(_said(look, seen), _said(attribute, heard))
    halves = [bool(random.integers(2)) for _ in "AB"]
    seen = seen if halves[0] else other(random, LOOKS[look], seen)
    heard = heard if halves[1] else other(random, ATTRIBUTES[attribute].values, heard)
    return question, YES_NO[halves[0] != halves[1]], pick(random, among[look][seen]), heard


def _choice(random: np.random.Generator, among: Pictures, attribute: str) -> tuple[str, str, str, str]:
    """Question, answer, picture, and value of the recording's attribute."""
    looks, values = list(LOOKS), ATTRIBUTES[attribute].values
    asked = looks if random.integers(2) else looks[::-1]
    first = pick(random, values)
    heard = (first, other(random, values, first))
    question = pick(random, CHOICE).format(_said(attribute, heard[0]), asked[0], _said(attribute, heard[1]), asked[1])
    which = int(random.integers(2))
    answer = pick(random, LOOKS[asked[which]])
    return question, answer, pick(random, among[asked[which]][answer]), heard[which]


def _said(name: str, value: str) -> str:
    """A value as it stands behind "the shape is" or "the sound is"."""
    return with_article(value) if name in ("shape", "timbre") else value


FORMS = {"match": _match, "choice": _choice}
"""How questions of each form are drawn."""
