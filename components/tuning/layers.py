"""A part whose last blocks learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from mllm_factory import ConfigError, Tuning, register
from mllm_factory.components.tuning.targets import adapted_layers, blocks_of, freeze_unless_chosen

if TYPE_CHECKING:
    from mllm_factory import MultimodalModel


@register("layers")
class Layers(Tuning):
    """The last blocks of an encoder or a backbone learn in full; what comes before and behind them does not.

    Blocks are found by structure: a backbone's decoder layers, elsewhere the list of two or more modules of one class that
    holds the most parameters. Where every weight of the part still learns, all are frozen first; otherwise the former
    strategies' choice stands beside the blocks.

    Args:
        last: how many blocks learn.

    Attributes:
        resolved: full names of the blocks inside the part, after ``apply``.

    Raises:
        ValueError: ``last`` is below 1.
    """

    def __init__(self, last: int = 2) -> None:
        if last < 1:
            raise ValueError(f"last: {last} blocks learn nothing; use 1 or more, or the strategy frozen")
        self.last = last
        self.resolved: list[str] = []

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """Set ``requires_grad`` of the blocks' parameters.

        Raises:
            ConfigError: the part is no stack of blocks, has fewer, or another strategy adapts one of them.
        """
        blocks = blocks_of(part, "layers")
        if self.last > len(blocks):
            raise ConfigError(
                f"last: {self.last} is more than the {len(blocks)} blocks of the part; use at most that many"
            )
        chosen = list(blocks)[-self.last :]
        taken = [layer for layer in adapted_layers(part) if any(layer.startswith(f"{block}.") for block in chosen)]
        if taken:
            raise ConfigError(
                f"layers: another strategy adapts {taken[0]} already; choose fewer blocks, or other targets there"
            )
        freeze_unless_chosen(part)
        for block in chosen:
            blocks[block].requires_grad_(True)
        self.resolved = chosen
