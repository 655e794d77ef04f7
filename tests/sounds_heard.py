"""What is in a generated recording, measured in its waveform; and what a guess from some clue would score."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mllm_factory import Sample

SHORT = {"seconds": 0.5}
"""Questions do not depend on the length of recordings; short ones are quick to make."""


def question(sample: Sample) -> str:
    return sample.messages[0].text.rpartition("\n")[2]


def wave(sample: Sample) -> tuple[np.ndarray, int]:
    return sample.media["audio"][0]


def loudness(x: np.ndarray, rate: int) -> np.ndarray:
    """Root mean square every 10 ms of what is above 150 Hz, where all notes are and most of brown noise is not."""
    parts = np.fft.rfft(x)
    parts[: 150 * len(x) // rate] = 0
    hop = rate // 100
    return np.sqrt(np.mean(np.fft.irfft(parts, len(x))[: len(x) // hop * hop].reshape(-1, hop) ** 2, 1))


def runs(x: np.ndarray, rate: int) -> list[tuple[int, int]]:
    """Stretches above 0.08 of the loudest 10 ms, in units of 10 ms; gaps below 4 of them are closed, shorter ones left out."""
    level = loudness(x, rate)
    edges = np.flatnonzero(np.diff(np.r_[0, level > 0.08 * level.max(), 0]))
    found: list[tuple[int, int]] = []
    for a, b in zip(edges[::2], edges[1::2], strict=True):
        if found and a - found[-1][1] < 4:
            found[-1] = (found[-1][0], b)
        else:
            found.append((a, b))
    return [(a, b) for a, b in found if b - a >= 4]


def spectrum(x: np.ndarray, rate: int, begin: float, end: float) -> np.ndarray:
    """Amplitudes of a stretch (in units of 10 ms), one value for 0.5 Hz."""
    piece = x[int(begin * rate / 100) : int(end * rate / 100)]
    return np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 2 * rate))


def pitch(amplitudes: np.ndarray) -> float:
    """Hz of the strongest partial, which is the first one of every instrument."""
    return (200 + int(np.argmax(amplitudes[400:3000])) / 2) if len(amplitudes) else 0.0


def heard_louder(x: np.ndarray, rate: int) -> str:
    (a, b), (c, d) = runs(x, rate)
    level = loudness(x, rate)
    return "first" if level[a:b].max() > level[c:d].max() else "second"


def heard_count(x: np.ndarray, rate: int) -> str:
    return ("one", "two", "three", "four", "five")[len(runs(x, rate)) - 1]


def heard_motion(x: np.ndarray, rate: int) -> str:
    ((a, b),) = runs(x, rate)
    early, late = (pitch(spectrum(x, rate, m - 3, m + 3)) for m in (a + 0.2 * (b - a), a + 0.8 * (b - a)))
    ratio = late / early
    return "rising" if ratio > 1.05 else "falling" if ratio < 0.95 else "steady"


def heard_timbre(x: np.ndarray, rate: int) -> str:
    ((a, b),) = runs(x, rate)
    middle = a + 0.3 * (b - a)
    amplitudes = spectrum(x, rate, middle - 3, middle + 3)
    f = pitch(amplitudes)

    def strength(r: float) -> float:
        width = 30 + 0.04 * r * f
        return float(np.sqrt(np.sum(amplitudes[int(2 * (r * f - width)) : int(2 * (r * f + width))] ** 2)))

    second, bar = strength(2) / strength(1), strength(2.756) / strength(1)
    return "bell" if bar > second else "organ" if second > 0.7 else "buzzer" if second > 0.35 else "flute"


HEARD: dict[str, Callable[[np.ndarray, int], str]] = {
    "instrument|sound of|Is it|makes this|Do you hear an? ": heard_timbre,
    "beeps?|number of": heard_count,
    "louder|loud one": heard_louder,
    "pitch|rising|falling|steady": heard_motion,
}


def measured(text: str, sample: Sample) -> str:
    """The answer to a question of ``sounds`` from the waveform alone."""
    hear = next(hear for pattern, hear in HEARD.items() if re.search(pattern, text))
    value = hear(*wave(sample))
    if sample.reference not in ("yes", "no"):
        return value
    return "yes" if re.search(rf"\b{value}\b", text) else "no"


def slope_of(x: np.ndarray, rate: int) -> float:
    """-d log power / d log frequency, fitted to octaves from 40 Hz."""
    power = np.abs(np.fft.rfft(x * np.hanning(len(x)))) ** 2
    f = np.fft.rfftfreq(len(x), 1 / rate)
    edges = [40.0 * 2**k for k in range(9) if 80 * 2**k <= rate / 2]
    octaves = [np.log2(power[(f >= a) & (f < 2 * a)].mean()) for a in edges]
    return -float(np.polyfit(np.log2(edges), octaves, 1)[0])


def guessed(train: Iterable[tuple[Any, str]], test: Iterable[tuple[Any, str]]) -> float:
    """Share of test answers that equal the most frequent train answer to the same clue."""
    seen: dict[Any, Counter[str]] = defaultdict(Counter)
    for clue, answer in train:
        seen[clue][answer] += 1
        seen[None][answer] += 1
    pairs = list(test)
    return sum(answer == (seen[clue] or seen[None]).most_common(1)[0][0] for clue, answer in pairs) / len(pairs)
