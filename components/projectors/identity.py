"""No projector: for encoders whose features already are as wide as the backbone's embeddings."""

from __future__ import annotations

from torch import Tensor

from mllm_factory import Projector, register


@register("identity")
class Identity(Projector):
    """Features as they are; has no weight.

    Args:
        in_dim: given; width of a feature.
        out_dim: given; the backbone's width.
        in_tokens: given; features of one item, and tokens of one item.

    Raises:
        ValueError: the two widths differ.
    """

    def __init__(self, in_dim: int, out_dim: int, in_tokens: int) -> None:
        super().__init__()
        if in_dim != out_dim:
            raise ValueError(
                f"features are {in_dim} wide but the backbone's embeddings {out_dim}; use the projector linear or mlp"
            )
        self.num_tokens = in_tokens

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, in_tokens, in_dim]"""
        return features
