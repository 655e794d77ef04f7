"""Pixel shuffle as of InternVL 1.5 (arXiv 2404.16821) and Idefics3 (arXiv 2408.12637): neighbours become channels."""

from __future__ import annotations

from torch import Tensor, nn

from mllm_factory import Projector, register
from mllm_factory.components.projectors.grid import sides
from mllm_factory.components.projectors.mlp import perceptron


@register("pixel_shuffle")
class PixelShuffle(Projector):
    """Each square of s x s neighbouring tokens becomes one token of s^2 times the width, then an MLP.

    y[i, j] = MLP(LN(concat(x[s i + a, s j + b] for a in 0..s-1 for b in 0..s-1))). InternVL: ``factor`` 2, ``norm``, ``depth`` 2.
    Idefics3 and SmolVLM: no norm, ``depth`` 1 (there without bias).

    Args:
        in_dim: given; width of a feature.
        out_dim: given; the backbone's width.
        in_tokens: given; features of one item.
        factor: s, neighbours merged along each side.
        norm: layer norm before the MLP.
        depth: number of linear layers, with GELU between them.
        grid: rows and columns of an item's tokens; None for a square.

    Raises:
        ValueError: the tokens are no such grid, ``factor`` does not divide its sides, or ``depth`` is below 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_tokens: int,
        factor: int = 2,
        norm: bool = True,
        depth: int = 2,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.columns = sides(in_tokens, grid)
        self.factor = _dividing(factor, self.rows, self.columns)
        self.num_tokens = in_tokens // factor**2
        merged = in_dim * factor**2
        self.norm = nn.LayerNorm(merged) if norm else nn.Identity()
        self.layers = perceptron(merged, out_dim, depth)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, in_tokens / s^2, out_dim]"""
        s = self.factor
        squares = features.unflatten(1, (self.rows // s, s, self.columns // s, s))  # [n, i, a, j, b, d]
        merged = squares.transpose(2, 3).flatten(3).flatten(1, 2)  # [n, i * j, a * b * d]
        return self.layers(self.norm(merged))


def _dividing(factor: int, rows: int, columns: int) -> int:
    possible = [s for s in range(1, min(rows, columns) + 1) if rows % s == 0 == columns % s]
    if factor not in possible:
        counts = ", ".join(f"{s} ({rows * columns // s**2} tokens)" for s in possible)
        raise ValueError(f"factor: {factor} does not divide a grid of {rows} x {columns}; possible: {counts}")
    return factor
