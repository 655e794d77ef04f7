"""A part that learns in full."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from mllm_factory import Tuning, register

if TYPE_CHECKING:
    from mllm_factory import MultimodalModel


@register("full")
class Full(Tuning):
    """Every parameter of the part learns, also those that strategies before it inserted or froze."""

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """Set ``requires_grad`` of every parameter to True."""
        part.requires_grad_(True)
