"""Orthogonal fine-tuning (arXiv 2306.07280) through peft: the input of a linear layer is rotated in blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from mllm_factory import ConfigError, Tuning, register
from mllm_factory.components.tuning.peft_layers import fold, insert, pattern
from mllm_factory.components.tuning.targets import ALL_LINEAR, resolve

if TYPE_CHECKING:
    from mllm_factory import MultimodalModel


@register("oft")
class Oft(Tuning):
    """h = W R x, R = diag(R_1 .. R_b) orthogonal, R_i = (I + Q_i)^-1 (I - Q_i) by Cayley, Q_i skew-symmetric, 0 at the start.

    A block of size s = in / b has s (s - 1) / 2 parameters: the entries of Q_i above its diagonal. What the part trains
    besides follows the rule of ``lora``.

    Args:
        blocks: number b of blocks; has to divide the input width of every target.
        dropout: share of blocks that are left out (R_i = I) in a training step.
        targets: ends of module names, or ``all-linear``, as for ``lora``.

    Attributes:
        resolved: full names of the adapted layers inside the part, after ``apply``.

    Raises:
        ValueError: a number of blocks, dropout or list of targets that makes no sense.
    """

    def __init__(self, blocks: int = 16, dropout: float = 0.0, targets: list[str] | str = "all-linear") -> None:
        if blocks < 1:
            raise ValueError(f"blocks: {blocks} is no number of blocks; use 1 or more")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout} is no probability; use 0 or more and less than 1")
        if not targets:
            raise ValueError(f"targets: nothing to adapt; name layers such as q_proj, or set {ALL_LINEAR}")
        self.blocks, self.dropout, self.targets = blocks, dropout, targets
        self.resolved: list[str] = []

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """Wrap the target layers and freeze what they were.

        Raises:
            ConfigError: targets that name nothing or are taken, a layer that is no ``nn.Linear``, or a width that cannot be
                cut into so many blocks of two or more.
        """
        from peft import OFTConfig

        names = resolve(part, self.targets, "oft")
        for name in names:
            self._require_fit(name, part.get_submodule(name))
        config = OFTConfig(
            r=self.blocks,
            oft_block_size=0,
            module_dropout=self.dropout,
            target_modules=pattern(names),
            use_cayley_neumann=False,
        )
        insert(part, config)
        self.resolved = names

    def _require_fit(self, name: str, layer: nn.Module) -> None:
        if not isinstance(layer, nn.Linear):
            raise ConfigError(f"oft: {name} is a {type(layer).__name__}, not a Linear; leave it out of targets")
        if layer.in_features % self.blocks or layer.in_features < 2 * self.blocks:
            raise ConfigError(
                f"blocks: {self.blocks} do not cut the {layer.in_features} inputs of {name} into equal blocks of 2 or more; "
                "use another divisor"
            )

    def merge(self, part: nn.Module, model: MultimodalModel) -> None:
        """Fold the rotations into plain layers."""
        fold(part)
