"""The composite of the `overhead` benchmark written by hand: what one would type for one encoder, one MLP and one Llama.

Only torch, no options, no checks. The vision encoder is taken from outside, because it is not what is compared. Names of the
weights are those of our composite, so that a state dict moves from one to the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.gqa = kv_heads != heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, heads, T, head_dim]
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.gqa)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, D))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, dim: int, hidden: int, heads: int, kv_heads: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(dim, eps)
        self.self_attn = Attention(dim, heads, kv_heads)
        self.post_attention_layernorm = RMSNorm(dim, eps)
        self.mlp = SwiGLU(dim, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Plain(nn.Module):
    """Frozen encoder, two-layer MLP, Llama; the summed loss at the label positions."""

    def __init__(
        self, encoder: nn.Module, features: int, vocabulary: int, dim: int, hidden: int, layers: int, heads: int,
        kv_heads: int, positions: int, theta: float = 10000.0, eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential(nn.Linear(features, dim), nn.GELU(), nn.Linear(dim, dim))
        self.embed_tokens = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(Layer(dim, hidden, heads, kv_heads, eps) for _ in range(layers))
        self.norm = RMSNorm(dim, eps)
        self.lm_head = nn.Linear(dim, vocabulary, bias=False)
        head_dim = dim // heads
        frequencies = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(torch.arange(positions).float(), frequencies).repeat(1, 2)  # [positions, head_dim]
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, ids: Tensor, labels: Tensor, is_image: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T], [B, T], [B, T] bool, [n, 3, H, W] -> loss sum [] and number of labels []"""
        with torch.no_grad():
            features = self.encoder(pictures)
        x = self.embed_tokens(ids)
        x = x.masked_scatter(is_image[..., None], self.projector(features))
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        targets = labels[:, 1:]
        keep = targets != -100
        logits = self.lm_head(self.norm(x)[:, :-1][keep])
        return F.cross_entropy(logits, targets[keep], reduction="sum"), keep.sum()
