"""What the entry point of this pack names: importing it registers the components."""

from __future__ import annotations

from torch import Tensor, nn

from mllm_factory import Projector, register


@register("gated")
class Gated(Projector):
    """A linear layer whose output is gated by another one (GLU, arXiv 1612.08083), then brought to the backbone's width.

    Args:
        in_dim: given; width of a feature.
        out_dim: given; the backbone's width.
        in_tokens: given; features of one item, and tokens of one item.
        width: between the layers.

    Raises:
        ValueError: a ``width`` below 1.
    """

    def __init__(self, in_dim: int, out_dim: int, in_tokens: int, width: int = 64) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width: {width} is no width; use 1 or more")
        self.num_tokens = in_tokens
        self.up = nn.Linear(in_dim, 2 * width)
        self.down = nn.Linear(width, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, in_tokens, out_dim]"""
        value, gate = self.up(features).chunk(2, dim=-1)  # [n, in_tokens, width] each
        return self.down(value * gate.sigmoid())
