"""LoRA (arXiv 2106.09685) and its relatives through peft: low-rank updates of linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from mllm_factory import ConfigError, Tuning, hint, register
from mllm_factory.components.tuning.peft_layers import fold, insert, pattern
from mllm_factory.components.tuning.quantized import KINDS, quantize_layers
from mllm_factory.components.tuning.targets import ALL_LINEAR, freeze_unless_chosen, resolve

if TYPE_CHECKING:
    from mllm_factory import MultimodalModel

INITS: dict[str, Any] = {"default": True, "pissa": "pissa"}
"""What peft calls each start of the factors."""


@register("lora")
class Lora(Tuning):
    """h = W x + s B A x with W frozen, A [rank, in] random and B [out, rank] zero at the start, s = alpha / rank.

    Where every weight of the part still learns (nothing came before, or ``full``), all of them are frozen first. Otherwise
    the former strategies' choice stands, so ``[another, lora]`` trains both; a layer that another one trains or adapts is
    refused. The factors are float32 also on a part of half precision: small updates would be lost in it.

    Args:
        rank: width of the two factors.
        alpha: the update is scaled by s = alpha / rank.
        dropout: on the input of A.
        targets: ends of module names at a dot, such as ``q_proj`` or ``3.mlp.up_proj``; or ``all-linear``: every linear layer
            of the part, of a backbone those of its decoder layers.
        rslora: s = alpha / sqrt(rank), which keeps the update's size at any rank (rsLoRA, arXiv 2312.03732).
        dora: the direction of each row of W + s B A, times a length of its own that learns (DoRA, arXiv 2402.09353).
        init: ``default``; or ``pissa``: s B A are W's ``rank`` principal components, W what is left of it
            (PiSSA, arXiv 2404.02948).
        quantize: store W in ``nf4``, ``fp4`` (QLoRA, arXiv 2305.14314) or ``int8`` through bitsandbytes; None leaves it.

    Attributes:
        resolved: full names of the adapted layers inside the part, after ``apply``.

    Raises:
        ValueError: a rank, dropout, list of targets or choice that makes no sense, or no bitsandbytes to quantise with.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        targets: list[str] | str = "all-linear",
        rslora: bool = False,
        dora: bool = False,
        init: str = "default",
        quantize: str | None = None,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank: {rank} is no width; use 1 or more")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout} is no probability; use 0 or more and less than 1")
        if not targets:
            raise ValueError(f"targets: nothing to adapt; name layers such as q_proj, or set {ALL_LINEAR}")
        if init not in INITS:
            raise ValueError(f"init: '{init}'{hint(init, INITS)}")
        if quantize is not None and quantize not in KINDS:
            raise ValueError(f"quantize: '{quantize}'{hint(quantize, KINDS)}")
        if init == "pissa" and quantize is not None:
            raise ValueError("init: pissa needs the weights as they are; set quantize: null, or init: default")
        self.rank, self.alpha, self.dropout, self.targets = rank, alpha, dropout, targets
        self.rslora, self.dora, self.init, self.quantize = rslora, dora, init, quantize
        self.resolved: list[str] = []

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """Wrap the target layers and freeze what they were.

        Raises:
            ConfigError: the part has no linear layer, a target names none of them, or another strategy has one of them.
            ValueError: the layers cannot be quantised.
        """
        from peft import LoraConfig

        self.resolved = resolve(part, self.targets, "lora")
        scale: Any = self.alpha  # peft's annotation knows whole numbers only
        config = LoraConfig(
            r=self.rank,
            lora_alpha=scale,
            lora_dropout=self.dropout,
            target_modules=pattern(self.resolved),
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=INITS[self.init],
        )
        freeze_unless_chosen(part)  # before whole numbers come in, which never learn
        with quantize_layers(part, self.resolved, self.quantize):
            insert(part, config)

    def merge(self, part: nn.Module, model: MultimodalModel) -> None:
        """Fold the updates into plain layers.

        Raises:
            ConfigError: the weights are quantised.
        """
        if self.quantize is not None:
            raise ConfigError(
                f"lora: weights quantised to {self.quantize} cannot take the update without rounding it; export without merge"
            )
        fold(part)
