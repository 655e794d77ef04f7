"""A log-mel spectrogram and two convolutions: a small audio encoder to train from scratch.

The stem of Whisper (Radford et al. 2022, arXiv:2212.04356, section 2.2) with a free stride and learned positions.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_factory import Encoder, register
from mllm_factory.components.encoders.sound import Windows


class LogMel:
    """A recording to log-mel spectrograms of its windows, one frame for 10 ms.

        S = mel(|STFT(x)|^2)      Hann window of 25 ms, Slaney's mel scale, triangles of equal area
        y = (log10 max(S, 1e-10) + 4) / 4

    so that silence is -1.5 and a loud tone about 1.5. The level does not depend on the rest of the recording.

    Args:
        rate: samples a second.
        seconds: length of a window.
        mels: bands.
        max_windows: most windows of one recording; None for any number.

    Raises:
        ValueError: a length or number that is not positive, or more bands than the spectrum can tell apart.
    """

    def __init__(self, rate: int, seconds: float, mels: int, max_windows: int | None) -> None:
        self.windows = Windows(rate, seconds, max_windows)
        self.hop, self.length = round(rate / 100), round(rate / 40)
        self.bins = 1 << max(1, (self.length - 1).bit_length())  # the next power of two
        self.frames = self.windows.samples // self.hop
        if self.frames < 1:
            raise ValueError(f"seconds: {seconds:g} s hold no frame of 10 ms; use 0.1 or more")
        if mels < 1:
            raise ValueError(f"mels: {mels} bands hold no sound; use 1 or more, such as 80")
        self.filters = _filters(rate, self.bins, mels)

    def __call__(self, recording: tuple[Tensor, int]) -> Tensor:
        """([channels, time], Hz) -> [m, mels, frames] float32

        Raises:
            DataError: see ``Windows.chunks``.
        """
        with torch.device("cpu"):  # sound is data, also while sizes are checked
            x = self.windows(recording)
            window = torch.hann_window(self.length)
            spectrum = torch.stft(x, self.bins, self.hop, self.length, window, pad_mode="constant", return_complex=True)
            power = spectrum.abs().square()[..., : self.frames]  # [m, bins / 2 + 1, frames]
            mel = self.filters.T @ power
        return (mel.clamp(min=1e-10).log10() + 4) / 4


def _filters(rate: int, bins: int, mels: int) -> Tensor:
    """[bins / 2 + 1, mels] triangles."""
    with torch.device("cpu"), warnings.catch_warnings():
        import torchaudio.functional as functional

        warnings.simplefilter("ignore")  # of empty bands; they are an error here
        filters = functional.melscale_fbanks(bins // 2 + 1, 0.0, rate / 2, mels, rate, "slaney", "slaney")
    empty = int((filters.amax(0) == 0).sum())
    if empty:
        raise ValueError(f"mels: {mels} are too many for {rate} samples a second, {empty} bands are empty; use fewer")
    return filters


@register("mel_conv")
class MelConv(Encoder):
    """Log-mel frames through two convolutions, with a learned position on each token; the second one has the stride.

        h = gelu(conv_3(mel)),  z = norm(gelu(conv_stride(h))^T) + P,  z <- z + gelu(conv_5(norm(z))) per block,  out = norm(z)

    Both terms of z are of unit size: a token says what it is and when, from the first step on.

    Args:
        rate: samples a second that recordings are brought to.
        seconds: length of a window; a longer recording becomes several items.
        mels: bands of the spectrogram.
        dim: width of a feature.
        stride: frames of 10 ms in a token.
        blocks: residual convolutions over five tokens each: a token then knows 2 * blocks tokens to either side.
        max_windows: most windows of one recording; None for any number.

    Raises:
        ValueError: a size that is not positive, more bands than the spectrum can tell apart, or a stride longer than the
            window.
    """

    modality = "audio"

    def __init__(
        self,
        rate: int = 16000,
        seconds: float = 5.0,
        mels: int = 80,
        dim: int = 256,
        stride: int = 8,
        blocks: int = 0,
        max_windows: int | None = None,
    ) -> None:
        super().__init__()
        self.transform: Any = LogMel(rate, seconds, mels, max_windows)
        if dim < 1:
            raise ValueError(f"dim: {dim} is no width; use 1 or more")
        if not 1 <= stride <= self.transform.frames:
            raise ValueError(f"stride: {stride} is not within the window's {self.transform.frames} frames of 10 ms")
        if blocks < 0:
            raise ValueError(f"blocks: {blocks} are none; use 0 or more")
        self.dim, self.num_tokens = dim, -(-self.transform.frames // stride)
        self._fill = self.num_tokens * stride - self.transform.frames
        self.conv1 = nn.Conv1d(mels, dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, stride, stride=stride)
        self.inner = nn.LayerNorm(dim)
        self.positions = nn.Parameter(torch.randn(self.num_tokens, dim))  # P
        self.blocks = nn.ModuleList(Block(dim) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)

    def forward(self, items: Tensor) -> Tensor:
        """[n, mels, frames] -> [n, num_tokens, dim]"""
        h = F.gelu(self.conv1(items))
        z = F.gelu(self.conv2(F.pad(h, (0, self._fill)))).transpose(1, 2)
        z = self.inner(z) + self.positions
        for block in self.blocks:
            z = block(z)
        return self.norm(z)


class Block(nn.Module):
    """z + gelu(conv_5(norm(z))), along time.

    Args:
        dim: width of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(dim), nn.Conv1d(dim, dim, 5, padding=2)

    def forward(self, z: Tensor) -> Tensor:
        """[n, tokens, dim] -> the same shape"""
        return z + F.gelu(self.conv(self.norm(z).transpose(1, 2)).transpose(1, 2))
