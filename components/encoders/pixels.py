"""Pictures to normalised pixels, shared by the vision encoders: three ways to fit a picture of any shape into squares.

``square`` squashes; ``pad`` is LLaVA-1.5's (Liu et al. 2024, arXiv 2310.03744: ``expand2square``); ``anyres`` is that of
LLaVA-NeXT (Liu et al. 2024): an overview and a grid of tiles, each of which is an item of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mllm_factory import hint

if TYPE_CHECKING:
    from PIL.Image import Image


def pixels_of(layout: str, tiles: int, size: int, mean: Sequence[float], std: Sequence[float]) -> SquarePixels:
    """The transform of a layout.

    Args:
        layout: ``square``, ``pad`` or ``anyres``.
        tiles: most tiles of ``anyres`` beside the overview; the other layouts give one item whatever it is.
        size: pixels of a side of an item.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.

    Raises:
        ValueError: unknown layout, or a number of tiles that makes no grid.
    """
    makers: dict[str, Callable[[], SquarePixels]] = {
        "square": lambda: SquarePixels(size, mean, std),
        "pad": lambda: PaddedPixels(size, mean, std),
        "anyres": lambda: TiledPixels(size, mean, std, tiles),
    }
    if layout not in makers:
        raise ValueError(f"layout: '{layout}'{hint(layout, makers)}")
    if tiles < 2:
        raise ValueError(f"tiles: {tiles} make no grid; use 2 or more, or layout: square")
    return makers[layout]()


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
        return self._normalised(resized(picture, self.size, self.size))[None]

    def _normalised(self, picture: Image) -> Tensor:
        """(x / 255 - mean) / std: a picture of any size -> [3, h, w]"""
        pixels = np.asarray(picture, np.float32) * self.scale - self.shift
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class PaddedPixels(SquarePixels):
    """A picture centred on a square of the mean colour, then scaled to ``size`` x ``size``: nothing is distorted or lost."""

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(size, mean, std)
        self.colour = tuple(int(255 * m) for m in mean)

    def __call__(self, picture: Image) -> Tensor:
        """An RGB picture -> [1, 3, size, size] float32."""
        return self._normalised(self._padded(picture))[None]

    def _padded(self, picture: Image) -> Image:
        """Scaling works on each axis by itself, so the long one shrinks first and no square of the long side is held."""
        from PIL import Image

        s, (w, h) = self.size, picture.size
        long = max(w, h)
        size, corner, canvas = (
            ((s, h), (0, (long - h) // 2), (s, long)) if w >= h else ((w, s), ((long - w) // 2, 0), (long, s))
        )
        square = Image.new("RGB", canvas, self.colour)
        square.paste(resized(picture, *size), corner)
        return resized(square, s, s)


class TiledPixels(SquarePixels):
    """The squashed overview, then the tiles of the best grid row by row. A 1 x 1 grid is the overview alone.

    Every tile has the side of an item. The picture keeps its proportions within the grid; what is left of it is black.

    Args:
        size: pixels of a side of an item.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        tiles: most tiles of a grid.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float], tiles: int) -> None:
        super().__init__(size, mean, std)
        self.grids = [(rows, cols) for rows in range(1, tiles + 1) for cols in range(1, tiles // rows + 1)]

    def __call__(self, picture: Image) -> Tensor:
        """An RGB picture -> [m, 3, size, size] float32, m = 1 or 1 + rows * columns."""
        overview = super().__call__(picture)
        rows, cols = best_grid(*picture.size, self.size, self.grids)
        if rows * cols == 1:
            return overview
        s = self.size
        whole = self._normalised(self._fitted(picture, cols * s, rows * s))  # [3, rows * s, cols * s]
        tiles = whole.reshape(3, rows, s, cols, s).permute(1, 3, 0, 2, 4).reshape(rows * cols, 3, s, s)
        return torch.cat([overview, tiles])

    def _fitted(self, picture: Image, width: int, height: int) -> Image:
        from PIL import Image

        w, h = picture.size
        a, b = width / w, height / h
        w, h = (width, min(math.ceil(h * a), height)) if a < b else (min(math.ceil(w * b), width), height)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(resized(picture, w, h), ((width - w) // 2, (height - h) // 2))
        return canvas


def best_grid(w: int, h: int, size: int, grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (rows, columns) on which a w x h picture keeps most pixels, and among those the one that wastes fewest.

    LLaVA-NeXT's rule: with a = min(W/w, H/h) a grid of W x H pixels keeps e = min(int(wa) int(ha), wh) of the picture and
    wastes WH - e. The first of equals wins. A side is at least one pixel, so that a hair's breadth finds its grid too.
    """

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        height, width = grid[0] * size, grid[1] * size
        a = min(width / w, height / h)
        e = min(max(int(w * a), 1) * max(int(h * a), 1), w * h)
        return e, e - width * height

    return max(grids, key=merit)


def resized(picture: Image, width: int, height: int) -> Image:
    """The picture at another size, bicubic; the same object where it has that size."""
    from PIL.Image import Resampling

    return picture if picture.size == (width, height) else picture.resize((width, height), Resampling.BICUBIC)
