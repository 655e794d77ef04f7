"""The Perceiver resampler of Flamingo (arXiv 2204.14198, appendix A.1.1): learned latents read an item's features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_factory import Projector, register


@register("resampler")
class Resampler(Projector):
    """Any number of features to ``num_tokens`` tokens by cross-attention; then one linear layer to the backbone's width.

    Each layer, for latents z and features x: z = z + Attention(query LN(z), key and value [LN(x); LN(z)]), then z = z + FFN(z);
    a last layer norm, then the linear layer. No linear layer inside has a bias; the activation is GELU.

    Args:
        in_dim: given; width of a feature.
        out_dim: given; the backbone's width.
        in_tokens: given; features of one item.
        num_tokens: latents, and tokens of one item.
        depth: layers.
        heads: attention heads.
        head_dim: width of a head.
        hidden_dim: width of the latents; features of another width pass a linear layer first. None for the features' width.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        in_tokens: int,
        num_tokens: int = 64,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        width = in_dim if hidden_dim is None else hidden_dim
        sizes = {"num_tokens": num_tokens, "depth": depth, "heads": heads, "head_dim": head_dim, "hidden_dim": width}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: {size} is no size; use 1 or more")
        self.num_tokens = num_tokens
        self.inner = nn.Linear(in_dim, width) if width != in_dim else nn.Identity()
        self.latents = nn.Parameter(torch.randn(num_tokens, width))
        self.layers = nn.ModuleList(Layer(width, heads, head_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.outer = nn.Linear(width, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, num_tokens, out_dim]"""
        x = self.inner(features)
        z = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            z = layer(z, x)
        return self.outer(self.norm(z))


class Layer(nn.Module):
    """Cross-attention of latents to features and to themselves, and a feed-forward of four times the width.

    Args:
        width: of a latent and of a feature.
        heads: attention heads.
        head_dim: width of a head.
    """

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_x, self.norm_z = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Latents [n, k, width], features [n, t, width] -> latents [n, k, width]"""
        normed = self.norm_z(z)
        k, v = self.kv(torch.cat([self.norm_x(x), normed], dim=1)).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q(normed), k, v))
        read = F.scaled_dot_product_attention(q, k, v)  # [n, heads, k, head_dim]
        z = z + self.out(read.transpose(1, 2).flatten(2))
        return z + self.ffn(z)
