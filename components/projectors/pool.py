"""Down-sampling by windows: average pooling (of pictures: arXiv 2405.20985) or a strided convolution (of recordings)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mllm_factory import Projector, register
from mllm_factory.components.projectors.grid import sides, to_map, to_tokens
from mllm_factory.components.projectors.mlp import perceptron


@register("pool")
class Pool(Projector):
    """Windows of neighbouring tokens become one token each, then an MLP.

    Windows do not overlap. Where the last one is not full, ``average`` divides by the tokens that are there and ``conv``
    sees zeros in the others' places. ``average``: y = MLP(mean of the window). ``conv``: y = MLP(GELU(sum_a W_a x_a + b)).

    Args:
        in_dim: given; width of a feature.
        out_dim: given; the backbone's width.
        in_tokens: given; features of one item.
        kind: ``average``, or ``conv`` with weights of its own.
        stride: tokens that a window is long, along each axis.
        layout: ``sequence`` (frames of a recording) or ``grid`` (cells of a picture, row by row).
        grid: rows and columns of an item's tokens where ``layout`` is ``grid``; None for a square.
        depth: number of linear layers, with GELU between them.

    Raises:
        ValueError: the tokens are no such grid, a window is longer than it, or ``depth`` is below 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_tokens: int,
        kind: Literal["average", "conv"] = "average",
        stride: int = 2,
        layout: Literal["sequence", "grid"] = "sequence",
        grid: tuple[int, int] | None = None,
        depth: int = 2,
    ) -> None:
        super().__init__()
        if layout == "sequence" and grid is not None:
            raise ValueError("grid: a sequence has no rows and columns; set layout: grid, or grid: null")
        rows, columns = sides(in_tokens, grid) if layout == "grid" else (in_tokens, 1)
        longest = min(rows, columns) if layout == "grid" else rows
        if not 1 <= stride <= longest:
            counts = sorted({_windows(rows, columns, s) for s in range(1, longest + 1)})
            shown = ", ".join(map(str, counts[:12])) + (", ..." if len(counts) > 12 else "")
            raise ValueError(f"stride: {stride} is out of range; 1 to {longest} give these token counts: {shown}")
        self.window = (stride, stride if layout == "grid" else 1)
        self.rows, self.columns = rows, columns
        self.num_tokens = _windows(rows, columns, stride)
        self.conv = nn.Conv2d(in_dim, in_dim, self.window, self.window) if kind == "conv" else None
        self.layers = perceptron(in_dim, out_dim, depth)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, num_tokens, out_dim]"""
        maps = to_map(features, self.rows, self.columns)
        if self.conv is None:
            return self.layers(to_tokens(F.avg_pool2d(maps, self.window, ceil_mode=True)))
        below, right = -self.rows % self.window[0], -self.columns % self.window[1]
        return self.layers(to_tokens(F.gelu(self.conv(F.pad(maps, (0, right, 0, below))))))


def _windows(rows: int, columns: int, stride: int) -> int:
    """ceil(rows / stride) * ceil(columns / stride); a sequence has one column."""
    return -(-rows // stride) * -(-columns // stride)
