"""The C-Abstractor of Honeybee (arXiv 2312.06742, section 4.2): convolutions around an adaptive average pooling."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn

from mllm_factory import Projector, register
from mllm_factory.components.projectors.grid import sides, to_map, to_tokens


@register("c_abstractor")
class CAbstractor(Projector):
    """Positions are added, then ``depth`` RegNet blocks, pooling to a smaller square, ``depth`` blocks, and an MLP with SiLU.

    A block is timm's RegNet bottleneck with squeeze and excitation, 3 x 3 convolutions of single channels, SiLU, and layer
    norm over the channels of each cell: the blocks of the authors' code. Defaults are the paper's.

    Args:
        in_dim: given; width of a feature.
        out_dim: given; the backbone's width.
        in_tokens: given; features of one item.
        num_tokens: tokens of one item, a square number; None for half of each side (144 of 24 x 24).
        depth: blocks before the pooling, and behind it.
        hidden_dim: channels of the blocks.
        mlp_depth: linear layers at the end.
        grid: rows and columns of an item's tokens; None for a square.

    Raises:
        ValueError: the tokens are no such grid, ``num_tokens`` is no square that fits into it, or a size is below 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_tokens: int,
        num_tokens: int | None = None,
        depth: int = 3,
        hidden_dim: int = 1024,
        mlp_depth: int = 2,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        for name, size in {"depth": depth, "hidden_dim": hidden_dim, "mlp_depth": mlp_depth}.items():
            if size < 1:
                raise ValueError(f"{name}: {size} is no size; use 1 or more")
        self.rows, self.columns = sides(in_tokens, grid)
        side = _side(num_tokens, self.rows, self.columns)
        self.num_tokens = side * side
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(in_tokens, in_dim), std=0.02))
        self.net = nn.Sequential(
            _blocks(depth, in_dim, hidden_dim),
            nn.AdaptiveAvgPool2d((side, side)),
            _blocks(depth, hidden_dim, hidden_dim),
        )
        layers: list[nn.Module] = [nn.Linear(hidden_dim, out_dim)]
        layers += [m for _ in range(1, mlp_depth) for m in (nn.SiLU(), nn.Linear(out_dim, out_dim))]
        self.readout = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, num_tokens, out_dim]"""
        maps = to_map(features + self.positions, self.rows, self.columns)
        return self.readout(to_tokens(self.net(maps)))


def _side(num_tokens: int | None, rows: int, columns: int) -> int:
    """Rows, and columns, of the tokens that come out."""
    longest = min(rows, columns)
    if num_tokens is None:
        return -(-longest // 2)
    possible = [side * side for side in range(1, longest + 1)]
    if num_tokens not in possible:
        raise ValueError(
            f"num_tokens: {num_tokens} cannot be reached from {rows} x {columns}; possible: {', '.join(map(str, possible))}"
        )
    return isqrt(num_tokens)


def _blocks(depth: int, in_dim: int, hidden_dim: int) -> nn.Module:
    """[n, in_dim, h, w] -> [n, hidden_dim, h, w]"""
    from timm.layers import LayerNorm2d
    from timm.models.regnet import RegStage

    return RegStage(depth, in_dim, hidden_dim, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
