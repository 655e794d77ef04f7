"""The adapters of interleaved mixture of features (arXiv 2401.06209, section 5.2): each encoder's tokens have an MLP of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllm_factory import Projector, register
from mllm_factory.components.projectors.mlp import perceptron


@register("mof_mlp")
class MofMlp(Projector):
    """For a ``fusion`` encoder that interleaves: token t goes through the MLP of encoder t mod ``encoders``.

    Args:
        in_dim: given; width of a feature.
        out_dim: given; the backbone's width.
        in_tokens: given; features of one item, and tokens of one item.
        encoders: how many encoders take turns.
        depth: number of linear layers of each MLP, with GELU between them.
        hidden_dim: width between the layers; None for the backbone's width.

    Raises:
        ValueError: ``encoders`` is below 2 or does not divide the tokens; ``depth`` or ``hidden_dim`` is below 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_tokens: int,
        encoders: int = 2,
        depth: int = 2,
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        if encoders < 2 or in_tokens % encoders:
            raise ValueError(
                f"encoders: {encoders} cannot take turns in {in_tokens} tokens; give the number of encoders that vision "
                "interleaves (name: fusion, mode: interleave), or use the projector mlp"
            )
        self.num_tokens = in_tokens
        self.adapters = nn.ModuleList(perceptron(in_dim, out_dim, depth, hidden_dim) for _ in range(encoders))

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, in_tokens, out_dim]"""
        turns = features.unflatten(1, (-1, len(self.adapters)))  # [n, t, e, in_dim]
        return torch.stack([adapter(turns[:, :, e]) for e, adapter in enumerate(self.adapters)], dim=2).flatten(1, 2)
