"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751; for language models: LLM-Adapters, arXiv 2304.01933)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm_factory import ConfigError, Tuning, hint, register
from mllm_factory.components.tuning.targets import ALL_LINEAR, INSERTED, freeze_unless_chosen, resolve

if TYPE_CHECKING:
    from mllm_factory import MultimodalModel

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}
SIDES = ("narrow", "input", "output")


class Bottleneck(nn.Module):
    """x + U f(D x), D [width, dim] random, U [dim, width] zero at the start; float32 inside, the input's type outside."""

    def __init__(self, dim: int, width: int, activation: str, bias: bool, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(dim, width, bias, device=device, dtype=torch.float32)
        self.act = ACTIVATIONS[activation]()
        self.up = nn.Linear(width, dim, bias, device=device, dtype=torch.float32)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]"""
        return x + self.up(self.act(self.down(x.float()))).to(x.dtype)


@register("adapter")
class Adapter(Tuning):
    """a(x) = x + U f(D x) in front of a linear layer, h = W a(x), or behind it, h = a(W x); the identity at the start.

    An adapter has 2 x width x dim weights. Not linear, so it cannot be merged. What the part trains besides follows the rule
    of ``lora``. LLM-Adapters on the feed-forward's layers is ``side: narrow``, ``activation: tanh``, ``bias: false``; there U
    is random at the start, so that the model is disturbed before it learns.

    Args:
        width: of the bottleneck.
        activation: f: ``gelu``, ``relu``, ``silu`` or ``tanh``.
        side: ``input`` or ``output`` of the target; or ``narrow``: the narrower of the two, the input if they are equal.
        bias: D and U have biases.
        targets: ends of module names, or ``all-linear``, as for ``lora``.

    Attributes:
        resolved: full names of the adapted layers inside the part, after ``apply``.

    Raises:
        ValueError: a width, list of targets or choice that makes no sense.
    """

    def __init__(
        self,
        width: int = 64,
        activation: str = "gelu",
        side: str = "narrow",
        bias: bool = False,
        targets: list[str] | str = "all-linear",
    ) -> None:
        if width < 1:
            raise ValueError(f"width: {width} is no width; use 1 or more")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: '{activation}'{hint(activation, ACTIVATIONS)}")
        if side not in SIDES:
            raise ValueError(f"side: '{side}'{hint(side, SIDES)}")
        if not targets:
            raise ValueError(f"targets: nothing to adapt; name layers such as down_proj, or set {ALL_LINEAR}")
        self.width, self.activation, self.side, self.bias, self.targets = width, activation, side, bias, targets
        self.resolved: list[str] = []

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """Put an adapter into each target layer and freeze what the layers were.

        Raises:
            ConfigError: targets that name nothing or are taken.
        """
        self.resolved = resolve(part, self.targets, "adapter")
        freeze_unless_chosen(part)
        for name in self.resolved:
            self._insert(part.get_submodule(name))

    def _insert(self, layer: nn.Module) -> None:
        weight: Any = layer.weight
        given, gives = weight.shape[::-1] if isinstance(layer, nn.Linear) else weight.shape  # GPT-2's is [in, out]
        before = self.side == "input" or (self.side == "narrow" and given <= gives)
        made = Bottleneck(given if before else gives, self.width, self.activation, self.bias, weight.device)
        layer.add_module(INSERTED, made)
        if before:
            layer.register_forward_pre_hook(_in_front)
        else:
            layer.register_forward_hook(_behind)

    def merge(self, part: nn.Module, model: MultimodalModel) -> None:
        """Refuse.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("adapter: f is not linear, so no plain layer does the same; export without merge")


def _in_front(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (layer.get_submodule(INSERTED)(args[0]), *args[1:])


def _behind(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return layer.get_submodule(INSERTED)(output)
