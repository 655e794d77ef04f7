"""Questions about generated recordings: which instrument, which way the pitch moves, how many beeps, which one is louder.

The audio counterpart of easy-VQA, without files: sample i is a function of the seed, the split and i.
"""

from __future__ import annotations

import numpy as np

from mllm_factory import Message, Sample, Source, hint, register
from mllm_factory.components.sources.sounds_scenes import ATTRIBUTES, VOICES, ask, pick, record, scene

SHORTEST, LONGEST = 0.5, 30.0
"""Seconds of a recording; five beeps still are five in the shortest."""

LOWEST = 8000
"""Hz; at a lower rate the instruments lose the partials that tell them apart."""


def check_options(split: str, samples: int, limit: int | None, seed: int, seconds: float, rate: int) -> int:
    """How many samples there are.

    Raises:
        ValueError: an option outside its range.
    """
    if split not in VOICES:
        raise ValueError(f"split: there is none named '{split}'{hint(split, VOICES)}")
    if samples < 1:
        raise ValueError(f"samples: {samples} are no data set; use 1 or more")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit} is less than 1 question; null takes all")
    if seed < 0:
        raise ValueError(f"seed: {seed} is negative; use 0 or more")
    if not SHORTEST <= seconds <= LONGEST:
        raise ValueError(f"seconds: {seconds:g} s are out of range; use {SHORTEST:g} to {LONGEST:g}")
    if rate < LOWEST:
        raise ValueError(f"rate: {rate} Hz cannot hold the instruments' partials; use {LOWEST} or more")
    return samples if limit is None else min(samples, limit)


def random_of(split: str, seed: int, index: int, *more: int) -> np.random.Generator:
    """The generator of one sample; those of other splits, seeds or indices are independent."""
    return np.random.default_rng([list(VOICES).index(split), seed, index, *more])


@register("sounds")
class Sounds(Source):
    """One question about one generated recording a sample, answered in one word.

    A question is about ``timbre`` (flute, organ, bell, buzzer), ``motion`` (rising, falling, steady), ``count`` (one to five
    beeps) or ``louder`` (first, second), all equally likely; a quarter is to be answered by yes or no. The answers of a
    question are equally likely, too: the question alone gives 0.37. Train and test share neither pitches nor colours of noise.

    Args:
        split: ``train`` or ``test``.
        samples: questions, each with a recording of its own.
        limit: use the first so many of them.
        seed: of everything that is drawn.
        seconds: length of a recording.
        rate: samples a second.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        split: str,
        samples: int = 20000,
        limit: int | None = None,
        seed: int = 0,
        seconds: float = 2.0,
        rate: int = 8000,
    ) -> None:
        self._places = range(check_options(split, samples, limit, seed, seconds, rate))
        self.modalities = frozenset({"audio"})
        self._split, self._seed, self._seconds, self._rate = split, seed, seconds, rate

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        """Question ``index`` as ``<audio>`` and the question, then the answer."""
        index = self._places[index]
        random, voice = random_of(self._split, self._seed, index), VOICES[self._split]
        name = pick(random, list(ATTRIBUTES))
        question, answer, value = ask(random, name)
        _, notes = scene(random, voice, name, {name: value}, self._seconds)
        recording = record(random, voice, notes, self._seconds, self._rate)
        messages = (Message("user", f"<audio>\n{question}"), Message("assistant", answer))
        return Sample(f"sounds/{self._split}/{index}", messages, {"audio": (recording,)})
