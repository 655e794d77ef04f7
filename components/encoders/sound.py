"""Recordings to windows of one rate and length, shared by the audio encoders.

Mono is the mean of the channels. Another rate is reached by band-limited interpolation with a windowed sinc
(torchaudio.functional.resample; Smith, Digital Audio Resampling).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_factory import DataError

MAX_KERNEL = 2**24
"""Values of the largest resampling kernel: it has new / gcd rows of old / gcd columns and a few more."""

BLOCK = 2**20
"""Samples that are resampled at once."""

MARGIN = 8
"""Periods of ``old / gcd`` samples around a block. The filter reaches over 6 / (0.99 min(old, new) / gcd) of them."""


class Windows:
    """A recording of any rate and number of channels as consecutive windows, without overlap.

    Args:
        rate: samples a second of the windows.
        seconds: length of a window.
        max_windows: most windows of one recording; None for any number.

    Raises:
        ValueError: a rate, length or number that is not positive.
    """

    def __init__(self, rate: int, seconds: float, max_windows: int | None = None) -> None:
        if rate < 1:
            raise ValueError(f"rate: {rate} samples a second are none; use 8000 or more")
        if not 0 < seconds < math.inf or round(rate * seconds) < 1:
            raise ValueError(f"seconds: {seconds:g} s hold no sound; use a length such as 10")
        if max_windows is not None and max_windows < 1:
            raise ValueError(f"max_windows: {max_windows} windows hold no sound; use 1 or more, or null for any number")
        self.rate, self.seconds, self.max_windows = rate, seconds, max_windows
        self.samples = round(rate * seconds)

    def __call__(self, recording: tuple[Tensor, int]) -> Tensor:
        """([channels, time], Hz) -> [m, samples] float32; the last window is filled up with silence.

        Raises:
            DataError: see ``chunks``.
        """
        return torch.stack([F.pad(chunk, (0, self.samples - len(chunk))) for chunk in self.chunks(recording)])

    def chunks(self, recording: tuple[Tensor, int]) -> list[Tensor]:
        """([channels, time], Hz) -> the windows, [samples] each, the last one as short as it is.

        Raises:
            DataError: NaN or infinite samples, more than ``max_windows``, or a rate without a small ratio to ours.
        """
        waveform, rate = recording
        self._check_ratio(rate)
        self._check_number(waveform.shape[-1], rate)
        if not torch.stack(torch.aminmax(waveform)).isfinite().all():
            raise DataError("the recording holds NaN or infinite samples; replace or remove it")
        mono = waveform.mean(0) if len(waveform) > 1 else waveform[0]
        return list(_resampled(mono, rate, self.rate).split(self.samples))

    def _check_number(self, time: int, rate: int) -> None:
        """Refuse a long recording before any work is spent on it; what does not fit is never cut away."""
        windows = math.ceil(math.ceil(time * self.rate / rate) / self.samples)
        if self.max_windows is not None and windows > self.max_windows:
            raise DataError(
                f"the recording lasts {time / rate:.1f} s, {windows} windows of {self.seconds:g} s, but max_windows is "
                f"{self.max_windows}; split the recording, or raise max_windows"
            )

    def _check_ratio(self, rate: int) -> None:
        common = math.gcd(rate, self.rate)
        if rate != self.rate and (rate // common) * (self.rate // common) > MAX_KERNEL:
            raise DataError(
                f"the recording's {rate} Hz and the encoder's {self.rate} Hz have no small ratio; convert the recording "
                "to a usual rate such as 16000 Hz"
            )


def _resampled(waveform: Tensor, rate: int, to: int) -> Tensor:
    """[time] at ``rate`` Hz -> [ceil(time * to / rate)] at ``to`` Hz

    Block by block, each with a margin wider than the filter: the values are those of one pass, in a third of the memory.
    """
    import torchaudio.functional

    if rate == to:
        return waveform
    old, new = rate // math.gcd(rate, to), to // math.gcd(rate, to)  # ``old`` samples become ``new``, again and again
    step, margin = old * max(1, BLOCK // old), old * MARGIN
    blocks = []
    for start in range(0, len(waveform), step):
        left = max(0, start - margin)
        block = torchaudio.functional.resample(waveform[left : start + step + margin], old, new)
        skip = (start - left) // old * new
        blocks.append(block[skip : skip + step // old * new])
    return torch.cat(blocks)
