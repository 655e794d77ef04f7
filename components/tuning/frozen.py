"""A part that does not learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from mllm_factory import Tuning, register

if TYPE_CHECKING:
    from mllm_factory import MultimodalModel


@register("frozen")
class Frozen(Tuning):
    """No parameter of the part learns, whatever strategies before it said."""

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """Set ``requires_grad`` of every parameter to False."""
        part.requires_grad_(False)
