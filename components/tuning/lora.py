"""LoRA (arXiv 2106.09685) through peft: low-rank updates of linear layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from mllm_factory import Backbone, ConfigError, Tuning, hint, register

if TYPE_CHECKING:
    from mllm_factory import MultimodalModel

ALL_LINEAR = "all-linear"


@register("lora")
class Lora(Tuning):
    """h = W x + (alpha / rank) B A x with W frozen, A [rank, in] random and B [out, rank] zero at the start.

    Where every weight of the part still learns (nothing came before, or ``full``), all of them are frozen first. Otherwise
    the former strategies' choice stands and only the layers that get an update are frozen, so ``[another, lora]`` trains both.
    The factors are float32 also on a part of half precision: small updates would be lost in it.

    Args:
        rank: width of the two factors.
        alpha: the update is scaled by alpha / rank.
        dropout: on the input of A.
        targets: ends of module names at a dot, such as ``q_proj`` or ``3.mlp.up_proj``; or ``all-linear``: every linear layer
            of the part, of a backbone those of its decoder layers.

    Attributes:
        resolved: full names of the adapted layers inside the part, after ``apply``.

    Raises:
        ValueError: a rank, dropout or list of targets that makes no sense.
    """

    def __init__(
        self, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, targets: list[str] | str = "all-linear"
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank: {rank} is no width; use 1 or more")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout} is no probability; use 0 or more and less than 1")
        if not targets:
            raise ValueError(f"targets: nothing to adapt; name layers such as q_proj, or set {ALL_LINEAR}")
        self.rank, self.alpha, self.dropout, self.targets = rank, alpha, dropout, targets
        self.resolved: list[str] = []

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """Wrap the target layers and freeze what they were.

        Raises:
            ConfigError: the part has no linear layer or has LoRA already, or a target names none of its layers.
        """
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        if any(isinstance(module, BaseTunerLayer) for module in part.modules()):
            raise ConfigError("lora: the part has LoRA layers already; list the strategy once, with all its targets")
        self.resolved = _resolve(part, self.targets)
        before = {name: p.requires_grad for name, p in part.named_parameters()}
        kept = {name for name, learns in before.items() if learns} if not all(before.values()) else set()
        scale: Any = self.alpha  # peft's annotation knows whole numbers only
        config = LoraConfig(r=self.rank, lora_alpha=scale, lora_dropout=self.dropout, target_modules=self.resolved)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # peft sets it right by itself
            inject_adapter_in_model(config, part)
        for name, parameter in part.named_parameters():
            if name in kept:
                parameter.requires_grad = True
            elif parameter.requires_grad:  # a factor
                parameter.data = parameter.data.float()


def _resolve(part: nn.Module, targets: Sequence[str] | str) -> list[str]:
    """Full names of the layers that ``targets`` mean."""
    linear = _linear_layers(part)
    if not linear:
        raise ConfigError(
            f"lora: {type(part).__name__} has no linear layer to adapt; choose frozen or full for this part"
        )
    if targets == ALL_LINEAR:
        return _of_decoder(part, linear)
    wanted = [targets] if isinstance(targets, str) else targets
    missing = [target for target in wanted if not any(_ends(name, target) for name in linear)]
    if missing:
        ends = sorted({name.rpartition(".")[2] for name in linear if not name.rpartition(".")[2].isdigit()}) or linear
        raise ConfigError(
            f"lora: no linear layer of {type(part).__name__} is named '{missing[0]}'{hint(missing[0], ends)}, {ALL_LINEAR}"
        )
    return [name for name in linear if any(_ends(name, target) for target in wanted)]


def _linear_layers(part: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D  # the linear layer of GPT-2

    return [name for name, module in part.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _of_decoder(part: nn.Module, linear: list[str]) -> list[str]:
    """Without the head: of a backbone, the layers inside its decoder layers."""
    if not isinstance(part, Backbone):
        return linear
    inside = {id(module) for module in part.layers.modules()}
    return [name for name in linear if id(part.get_submodule(name)) in inside]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
