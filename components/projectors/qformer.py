"""The Q-Former of BLIP-2 (arXiv 2301.12597) as transformers has it: learned queries read an item's features.

With ``window`` it is SALMONN's (arXiv 2310.13289, section 3.1): the features are a sequence in time, the same queries read each
window of it, and the windows' tokens follow each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm_factory import Projector, register


@register("qformer")
class QFormer(Projector):
    """A BERT of learned queries with cross-attention to the features in every ``cross_every``-th layer; then a linear layer.

    It is ``Blip2QFormerModel`` of transformers; the paper's sizes are the defaults. The text side of BLIP-2's first stage is left out.

    Args:
        in_dim: given; width of a feature.
        out_dim: given; the backbone's width.
        in_tokens: given; features of one item.
        num_tokens: queries, and tokens of one item; with ``window``, of each window.
        depth: layers.
        hidden_dim: width of a query; the feed-forward is four times as wide.
        heads: attention heads; they share ``hidden_dim``.
        cross_every: layers 0, n, 2n, ... read the features.
        dropout: on attention weights and on each layer's output while it learns.
        window: features of a window; None: one window over all. Windows do not overlap, and features behind the last whole
            one are not read, as in SALMONN's code: 1,500 features in windows of 17 (0.33 s) are 88.

    Raises:
        ValueError: a size below 1, heads that do not divide the width, a dropout outside of [0, 1), or a window longer
            than an item.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_tokens: int,
        num_tokens: int = 32,
        depth: int = 12,
        hidden_dim: int = 768,
        heads: int = 12,
        cross_every: int = 2,
        dropout: float = 0.0,
        window: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_tokens": num_tokens, "depth": depth, "hidden_dim": hidden_dim, "heads": heads}
        for name, size in {**sizes, "cross_every": cross_every}.items():
            if size < 1:
                raise ValueError(f"{name}: {size} is no size; use 1 or more")
        if hidden_dim % heads:
            raise ValueError(f"heads: {heads} do not divide hidden_dim: {hidden_dim}; choose a divisor")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout} is no probability; use 0 or more and less than 1")
        if window is not None and not 1 <= window <= in_tokens:
            raise ValueError(
                f"window: {window} features of the {in_tokens} of an item; use 1 to {in_tokens}, or null for all"
            )
        self.window = in_tokens if window is None else window
        self.windows = in_tokens // self.window
        self.num_tokens = self.windows * num_tokens
        self.model = _model(in_dim, depth, hidden_dim, heads, cross_every, dropout)
        self.queries = nn.Parameter(torch.randn(num_tokens, hidden_dim) * self.model.config.initializer_range)
        self.outer = nn.Linear(hidden_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, num_tokens, out_dim]"""
        cut = features[:, : self.windows * self.window].reshape(-1, self.window, features.shape[-1])  # a window a row
        queries = self.queries.expand(len(cut), -1, -1)
        read = self.model(query_embeds=queries, encoder_hidden_states=cut).last_hidden_state
        return self.outer(read).reshape(len(features), self.num_tokens, -1)


def _model(in_dim: int, depth: int, hidden_dim: int, heads: int, cross_every: int, dropout: float) -> Any:
    """transformers' model with random weights."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    config = Blip2QFormerConfig(
        encoder_hidden_size=in_dim,
        num_hidden_layers=depth,
        hidden_size=hidden_dim,
        intermediate_size=4 * hidden_dim,
        num_attention_heads=heads,
        cross_attention_frequency=cross_every,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return Blip2QFormerModel(config)
