"""The projector of LLaVA-1.5 (arXiv 2310.03744): a multi-layer perceptron on each feature."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from mllm_factory import Projector, register


@register("mlp")
class Mlp(Projector):
    """Linear layers with GELU between them; every token by itself. Depth 1 is the linear projector of LLaVA.

    Args:
        in_dim: given; width of a feature.
        out_dim: given; the backbone's width.
        in_tokens: given; features of one item, and tokens of one item.
        depth: number of linear layers.
        hidden_dim: width between the layers; None for the backbone's width.

    Raises:
        ValueError: ``depth`` or ``hidden_dim`` is below 1.
    """

    def __init__(
        self, in_dim: int, out_dim: int, in_tokens: int, depth: int = 2, hidden_dim: int | None = None
    ) -> None:
        super().__init__()
        self.num_tokens = in_tokens
        self.layers = perceptron(in_dim, out_dim, depth, hidden_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, in_tokens, out_dim]"""
        return self.layers(features)


def perceptron(in_dim: int, out_dim: int, depth: int, hidden_dim: int | None = None) -> nn.Sequential:
    """``depth`` linear layers with GELU between them, [..., in_dim] -> [..., out_dim]; shared by the projectors.

    Raises:
        ValueError: ``depth`` or ``hidden_dim`` is below 1.
    """
    if depth < 1:
        raise ValueError(f"depth: {depth} linear layers cannot project; use 1 (linear) or more")
    if hidden_dim is not None and hidden_dim < 1:
        raise ValueError(f"hidden_dim: {hidden_dim} is no width; use 1 or more, or null for the backbone's width")
    widths = [in_dim, *[out_dim if hidden_dim is None else hidden_dim] * (depth - 1), out_dim]
    layers = [module for left, right in pairwise(widths) for module in (nn.GELU(), nn.Linear(left, right))]
    return nn.Sequential(*layers[1:])
