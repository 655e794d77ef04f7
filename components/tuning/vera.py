"""VeRA (arXiv 2310.11454) through peft: one frozen random pair of factors for all layers, two vectors a layer learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from mllm_factory import Tuning, register
from mllm_factory.components.tuning.peft_layers import fold, insert, pattern
from mllm_factory.components.tuning.targets import ALL_LINEAR, resolve

if TYPE_CHECKING:
    from mllm_factory import MultimodalModel


@register("vera")
class Vera(Tuning):
    """h = W x + diag(b) B diag(d) A x; A [rank, in] and B [out, rank] random and shared, b zero at the start, d constant.

    A and B are as large as the widest target and cut to the others. They are drawn from the run's seed and are frozen
    parameters, so a checkpoint does not hold them but its fingerprint covers them. What the part trains besides follows the
    rule of ``lora``.

    Args:
        rank: width of the two factors; a layer learns rank + out values.
        dropout: on the input of A.
        targets: ends of module names, or ``all-linear``, as for ``lora``.
        d_initial: value of every entry of d at the start.

    Attributes:
        resolved: full names of the adapted layers inside the part, after ``apply``.

    Raises:
        ValueError: a rank, dropout, start or list of targets that makes no sense.
    """

    def __init__(
        self,
        rank: int = 256,
        dropout: float = 0.0,
        targets: list[str] | str = "all-linear",
        d_initial: float = 0.1,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank: {rank} is no width; use 1 or more")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout} is no probability; use 0 or more and less than 1")
        if d_initial == 0:
            raise ValueError("d_initial: 0 gives b no gradient; use another value, such as 0.1")
        if not targets:
            raise ValueError(f"targets: nothing to adapt; name layers such as q_proj, or set {ALL_LINEAR}")
        self.rank, self.dropout, self.targets, self.d_initial = rank, dropout, targets, d_initial
        self.resolved: list[str] = []

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """Wrap the target layers and freeze what they were.

        Raises:
            ConfigError: targets that name nothing or are taken.
        """
        from peft import VeraConfig

        names = resolve(part, self.targets, "vera")
        config = VeraConfig(
            r=self.rank,
            vera_dropout=self.dropout,
            d_initial=self.d_initial,
            target_modules=pattern(names),
            projection_prng_key=int(torch.randint(2**31, (), device="cpu")),
            save_projection=True,
        )
        insert(part, config)
        self.resolved = names
        _share_as_parameters(part)

    def merge(self, part: nn.Module, model: MultimodalModel) -> None:
        """Fold the updates into plain layers."""
        fold(part)


def _share_as_parameters(part: nn.Module) -> None:
    """Turn the factors, which peft keeps in buffers that every layer refers to, into frozen parameters of the same name."""
    from peft.tuners.vera.layer import VeraLayer

    made: dict[int, nn.ParameterDict] = {}
    for layer in part.modules():
        if isinstance(layer, VeraLayer):
            for name in ("vera_A", "vera_B"):
                table = getattr(layer, name)
                if id(table) not in made:
                    frozen = {key: nn.Parameter(value.float(), requires_grad=False) for key, value in table.items()}
                    made[id(table)] = nn.ParameterDict(frozen)
                setattr(layer, name, made[id(table)])
