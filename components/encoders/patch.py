"""The smallest image encoder: one convolution and a position embedding, as in front of a ViT (arXiv 2010.11929, eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllm_factory import Encoder, register
from mllm_factory.components.encoders.pixels import pixels_of


@register("patch")
class Patch(Encoder):
    """z = [x_1 E; ...; x_k E] + E_pos for the k patches x_i of a picture, row by row. Trained from scratch.

    Args:
        image_size: pixels of a side; a multiple of ``patch_size``.
        patch_size: pixels of a patch's side.
        dim: width of a token.
        layout: ``square`` (squash), ``pad`` (grey around) or ``anyres`` (overview and tiles, an item each).
        tiles: most tiles of ``anyres``.

    Raises:
        ValueError: sizes that make no patches, or an unknown layout.
    """

    modality = "vision"

    def __init__(
        self, image_size: int = 64, patch_size: int = 8, dim: int = 128, layout: str = "square", tiles: int = 4
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise ValueError(f"image_size: {image_size} pixels are no whole number of patches of {patch_size}")
        if dim < 1:
            raise ValueError(f"dim: {dim} is no width; use 1 or more")
        self.dim, self.num_tokens = dim, (image_size // patch_size) ** 2
        self.project = nn.Conv2d(3, dim, patch_size, patch_size)  # E
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.num_tokens, dim))  # E_pos
        self.transform = pixels_of(layout, tiles, image_size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def forward(self, items: Tensor) -> Tensor:
        """[n, 3, image_size, image_size] -> [n, num_tokens, dim]"""
        return self.project(items).flatten(2).transpose(1, 2) + self.positions
