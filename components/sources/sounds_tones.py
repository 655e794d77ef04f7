"""Sounds made from formulas: additive synthesis of notes, and coloured noise.

    phi(t) = 2 pi integral of f,     f(t) = f_mid 2^((u - 1/2) g / 12),     u = 0 ... 1 over the note
    s(t)   = e(t) sum_k a_k sin(r_k phi(t))          partials that reach rate / 2 are left out
    e(t)   = min(1, t / attack) min(1, (L - t) / release) exp(-t / decay)

A note is brought to its level by its root mean square, so instruments are equally loud. The bell's ratios are those of a
free bar (Rayleigh, The Theory of Sound, section 171); noise of slope c has the power density f^-c.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Wave = NDArray[np.float32]
RELEASE = 0.01
"""Seconds in which a note ends."""

AUDIBLE = 20.0
"""Hz at which noise begins."""

BANK = 16
"""Recordings that the noise lasts of which pieces are taken."""


class Recording(NamedTuple):
    """A decoded recording as samples carry it: float32 [time] and Hz. Two are equal where their values are."""

    waveform: Wave
    rate: int

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Recording):
            return False
        return self.rate == other.rate and np.array_equal(self.waveform, other.waveform)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((self.waveform.tobytes(), self.rate))


@dataclass(frozen=True)
class Instrument:
    """A timbre.

    Attributes:
        ratios: r_k, frequencies of the partials over the fundamental.
        amplitudes: a_k.
        attack: seconds until full level.
        decay: time constant as a share of the note's length; infinite where the note is held.
    """

    ratios: tuple[float, ...]
    amplitudes: tuple[float, ...]
    attack: float
    decay: float = float("inf")


INSTRUMENTS: dict[str, Instrument] = {
    "flute": Instrument((1, 2, 3), (1, 0.2, 0.05), attack=0.05),
    "organ": Instrument((1, 2, 4, 8), (1, 0.9, 0.8, 0.6), attack=0.01),
    "bell": Instrument((1, 2.756, 5.404, 8.933), (1, 0.8, 0.6, 0.4), attack=0.002, decay=0.3),
    "buzzer": Instrument(tuple(range(1, 13)), tuple(1 / k for k in range(1, 13)), attack=0.005),
}
"""Every timbre by its name."""


@dataclass(frozen=True)
class Note:
    """One tone.

    Attributes:
        instrument: a key of ``INSTRUMENTS``.
        start: seconds from the recording's beginning.
        length: seconds.
        pitch: f_mid in Hz, in the middle of the note.
        glide: g, semitones from its beginning to its end; 0 is steady.
        level: root mean square.
    """

    instrument: str
    start: float
    length: float
    pitch: float
    glide: float = 0.0
    level: float = 0.1


def tone(note: Note, rate: int) -> Wave:
    """A note alone, float32 [length * rate]."""
    kind, n = INSTRUMENTS[note.instrument], round(note.length * rate)
    t = np.arange(n, dtype=np.float32) / np.float32(rate)
    f = note.pitch * np.exp2((t / note.length - 0.5) * (note.glide / 12))  # Hz
    turns = np.cumsum(f, dtype=np.float64) / rate  # phi / 2 pi
    s = np.zeros(n, np.float32)
    for r, a in zip(kind.ratios, kind.amplitudes, strict=True):
        if r * f.max() < rate / 2:
            s += a * _sine(r * turns)
    s *= np.minimum(1, t / kind.attack) * np.minimum(1, (note.length - t) / RELEASE)
    s *= np.exp(-t / (kind.decay * note.length))
    return s * np.float32(note.level / np.sqrt(np.mean(s * s) + 1e-20))


def _sine(turns: NDArray[np.float64]) -> Wave:
    """sin(2 pi turns), in single precision within one turn: several times quicker."""
    return np.sin((turns - np.floor(turns)).astype(np.float32) * np.float32(2 * np.pi))


@lru_cache(maxsize=16)
def noise(slope: float, seed: int, samples: int, rate: int) -> Wave:
    """Noise of power density f^-slope above 20 Hz and none below, float32 [samples]; its root mean square is 1."""
    f = np.fft.rfftfreq(samples, 1 / rate)
    gain = np.where(f >= AUDIBLE, np.maximum(f, AUDIBLE) ** (-slope / 2), 0)
    x = np.fft.irfft(np.fft.rfft(np.random.default_rng(seed).standard_normal(samples)) * gain, samples)
    x = (x / np.sqrt(np.mean(x * x))).astype(np.float32)
    x.flags.writeable = False  # it is shared
    return x


def excerpt(random: np.random.Generator, slope: float, seed: int, samples: int, rate: int) -> Wave:
    """A random piece of one long noise, float32 [samples]: a transform for each recording would take most of its time."""
    whole = noise(slope, seed, BANK * samples, rate)
    begin = int(random.integers(len(whole) - samples + 1))
    return whole[begin : begin + samples]


def mixed(notes: Iterable[Note], background: Wave, rate: int) -> Recording:
    """Notes over a background. Notes lie within it."""
    x = background.copy()
    for note in notes:
        s, begin = tone(note, rate), round(note.start * rate)
        x[begin : begin + len(s)] += s[: len(x) - begin]
    return Recording(x, rate)
