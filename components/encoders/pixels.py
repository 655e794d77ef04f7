"""Pictures to normalised pixels, shared by the vision encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


class SquarePixels:
    """A picture of any shape, squashed to ``size`` x ``size`` pixels (bicubic) and normalised per channel.

    Args:
        size: pixels of a side.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.size = size
        self.scale = (1 / (255 * np.asarray(std, np.float64))).astype(np.float32)
        self.shift = (np.asarray(mean, np.float64) / np.asarray(std, np.float64)).astype(np.float32)

    def __call__(self, picture: Image) -> Tensor:
        """An RGB picture -> [1, 3, size, size] float32."""
        from PIL.Image import Resampling

        if picture.size != (self.size, self.size):
            picture = picture.resize((self.size, self.size), Resampling.BICUBIC)
        pixels = np.asarray(picture, np.float32) * self.scale - self.shift
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]))
