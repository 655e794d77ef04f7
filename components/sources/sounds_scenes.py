"""What can be heard in a generated recording, and what can be asked about it.

Four attributes, each with its values, its questions and the scene that shows it: one note (``timbre``, ``motion``), a row
of beeps (``count``), or two notes one behind the other (``louder``). The other properties of a scene are drawn freely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mllm_factory.components.sources.sounds_tones import INSTRUMENTS, Note, Recording, excerpt, mixed

T = TypeVar("T")
Facts = Mapping[str, str]
"""Attribute -> value."""

NUMBERS = ("one", "two", "three", "four", "five")
SIGNS = {"rising": 1, "falling": -1, "steady": 0}
YES_NO = ("yes", "no")
CLOSED = 0.25
"""Share of questions that are answered by yes or no."""


@dataclass(frozen=True)
class Voice:
    """What the splits of a data set do not share.

    Attributes:
        offset: quarter tones by which the middles of notes lie above the semitones over 440 Hz: 0 or 1.
        slopes: colours of the noise, see ``noise``.
    """

    offset: int
    slopes: tuple[float, ...]


VOICES = {"train": Voice(0, (0.0, 2.0)), "test": Voice(1, (1.0,))}
"""Train: notes on semitones, white or brown noise. Test: between them, pink noise."""


@dataclass(frozen=True)
class Attribute:
    """Something to ask for.

    Attributes:
        values: the answers of open questions, equally likely.
        open: questions that are answered by a value.
        closed: questions with ``{}`` for a value (as ``say`` puts it) that are answered by yes or no, equally likely.
        say: a value as it stands in a closed question.
    """

    values: tuple[str, ...]
    open: tuple[str, ...]
    closed: tuple[str, ...]
    say: Callable[[str], str] = str


def with_article(noun: str) -> str:
    """``an organ``"""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _beeps(number: str) -> str:
    return f"{number} beep{'' if number == 'one' else 's'}"


ATTRIBUTES: dict[str, Attribute] = {
    "timbre": Attribute(
        tuple(INSTRUMENTS),
        ("What instrument plays?", "Which instrument do you hear?", "What makes this sound?"),
        ("Is it {}?", "Do you hear {}?", "Is this the sound of {}?"),
        with_article,
    ),
    "motion": Attribute(
        tuple(SIGNS),
        ("How does the pitch move?", "Is the sound rising, falling or steady?", "What does the pitch do?"),
        ("Is the sound {}?", "Is the pitch {}?", "Would you call the sound {}?"),
    ),
    "count": Attribute(
        NUMBERS,
        ("How many beeps are there?", "How many beeps do you hear?", "Count the beeps."),
        ("Do you hear {}?", "Does the recording have {}?", "Is the number of sounds that of {}?"),
        _beeps,
    ),
    "louder": Attribute(
        ("first", "second"),
        ("Which sound is louder?", "Is the first or the second sound louder?", "Which of the two is louder?"),
        ("Is the {} sound louder?", "Is the {} of the two the louder one?", "Is the {} sound the loud one?"),
    ),
}
"""Every attribute by its name."""


def pick(random: np.random.Generator, choices: Sequence[T]) -> T:
    """One of them, equally likely."""
    return choices[int(random.integers(len(choices)))]


def other(random: np.random.Generator, choices: Sequence[T], than: T) -> T:
    """One of the others, equally likely."""
    return pick(random, [choice for choice in choices if choice != than])


def ask(random: np.random.Generator, name: str) -> tuple[str, str, str]:
    """A question about an attribute, its answer, and the value of the attribute that makes it true.

    The answers of a question are equally likely.
    """
    attribute = ATTRIBUTES[name]
    value = pick(random, attribute.values)
    if random.random() >= CLOSED:
        return pick(random, attribute.open), value, value
    question, answer = pick(random, attribute.closed).format(attribute.say(value)), pick(random, YES_NO)
    return question, answer, value if answer == YES_NO[0] else other(random, attribute.values, value)


# ---------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Frame:
    """What the notes of a recording share: its length in seconds, instrument, pitch in Hz, and level (root mean square)."""

    seconds: float
    instrument: str
    pitch: float
    level: float


def _one_note(frame: Frame, facts: Facts, random: np.random.Generator) -> list[Note]:
    length = frame.seconds * random.uniform(0.45, 0.6)
    start = random.uniform(0, frame.seconds - length)
    glide = SIGNS[facts["motion"]] * random.uniform(14, 18)
    return [Note(frame.instrument, start, length, frame.pitch, glide, frame.level)]


def _row_of_beeps(frame: Frame, facts: Facts, random: np.random.Generator) -> list[Note]:
    count = NUMBERS.index(facts["count"]) + 1
    period = frame.seconds * random.uniform(0.17, 0.19)
    start = random.uniform(0, frame.seconds - count * period)
    length = period * random.uniform(0.45, 0.5)
    return [Note(frame.instrument, start + i * period, length, frame.pitch, 0, frame.level) for i in range(count)]


def _two_notes(frame: Frame, facts: Facts, random: np.random.Generator) -> list[Note]:
    """The quieter one is 15 to 20 dB below the other."""
    length = frame.seconds * random.uniform(0.3, 0.38)
    start = random.uniform(0, frame.seconds - 2.4 * length)
    quiet = frame.level * 10 ** (-random.uniform(15, 20) / 20)
    levels = (frame.level, quiet) if facts["louder"] == "first" else (quiet, frame.level)
    return [
        Note(frame.instrument, start + i * 1.4 * length, length, frame.pitch, 0, levels[i]) for i in range(len(levels))
    ]


SCENES: dict[str, Callable[[Frame, Facts, np.random.Generator], list[Note]]] = {
    "timbre": _one_note,
    "motion": _one_note,
    "count": _row_of_beeps,
    "louder": _two_notes,
}
"""The scene that shows an attribute."""


def scene(
    random: np.random.Generator, voice: Voice, name: str, given: Facts, seconds: float
) -> tuple[Facts, list[Note]]:
    """Notes that show attribute ``name``, and what is true of all attributes; what is not given is drawn."""
    facts = {key: given.get(key) or pick(random, attribute.values) for key, attribute in ATTRIBUTES.items()}
    quarter_tones = 2 * int(random.integers(13)) + voice.offset  # 440 to 906 Hz
    frame = Frame(seconds, facts["timbre"], 440 * 2 ** (quarter_tones / 24), random.uniform(0.04, 0.12))
    return facts, SCENES[name](frame, facts, random)


def record(random: np.random.Generator, voice: Voice, notes: Sequence[Note], seconds: float, rate: int) -> Recording:
    """The notes over noise that is 35 to 50 dB below the loudest."""
    level = max(note.level for note in notes) * 10 ** (-random.uniform(35, 50) / 20)
    background = excerpt(random, pick(random, voice.slopes), voice.offset, round(seconds * rate), rate)
    return mixed(notes, np.float32(level) * background, rate)
