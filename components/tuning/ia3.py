"""(IA)^3 (arXiv 2205.05638) through peft: learned vectors rescale what goes through linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from mllm_factory import ConfigError, Tuning, register
from mllm_factory.components.tuning.peft_layers import fold, insert, pattern
from mllm_factory.components.tuning.targets import ALL_LINEAR, resolve

if TYPE_CHECKING:
    from mllm_factory import MultimodalModel


@register("ia3")
class Ia3(Tuning):
    """h = l * (W x + b) for ``targets``, h = W (l * x) + b for ``inputs``; l is all ones at the start.

    The paper rescales keys, values and what enters the last layer of the feed-forward. What the part trains besides
    follows the rule of ``lora``.

    Args:
        targets: layers whose output is rescaled: ends of module names, or ``all-linear``, as for ``lora``.
        inputs: layers whose input is rescaled: ends of module names; none of them in ``targets``.

    Attributes:
        resolved: full names of the adapted layers inside the part, after ``apply``.

    Raises:
        ValueError: no layers at all.
    """

    def __init__(self, targets: list[str] | str = "all-linear", inputs: list[str] | None = None) -> None:
        if not targets and not inputs:
            raise ValueError(f"targets: nothing to adapt; name layers such as k_proj, or set {ALL_LINEAR}")
        self.targets, self.inputs = targets, inputs or []
        self.resolved: list[str] = []

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """Wrap the target layers and freeze what they were.

        Raises:
            ConfigError: targets that name nothing, are taken, or are in both lists.
        """
        from peft import IA3Config

        outputs = resolve(part, self.targets, "ia3") if self.targets else []
        inputs = resolve(part, self.inputs, "ia3", "inputs") if self.inputs else []
        both = sorted({*outputs} & {*inputs})
        if both:
            raise ConfigError(f"inputs: {both[0]} is among targets too; name it in one of them")
        names = [*outputs, *inputs]
        insert(part, IA3Config(target_modules=pattern(names), feedforward_modules=pattern(inputs)))
        self.resolved = names

    def merge(self, part: nn.Module, model: MultimodalModel) -> None:
        """Fold the vectors into plain layers."""
        fold(part)
