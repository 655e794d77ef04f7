"""MoReS, modality linear representation-steering (LLaVA Steering, arXiv 2412.12359): visual tokens moved in a subspace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from mllm_factory import Tuning, hint, register
from mllm_factory.components.tuning.positions import Positions
from mllm_factory.components.tuning.steering import FORMS
from mllm_factory.components.tuning.steering_apply import Options, steer
from mllm_factory.components.tuning.steering_merge import merge

if TYPE_CHECKING:
    from mllm_factory import MultimodalModel

PARAMETRIZATIONS = ("orthonormal", "none", "untied")


@register("mores")
class Mores(Tuning):
    """h' = h + R (W h + b - R^T h) for chosen tokens at chosen layers, R [D, r] with R^T R = I; the backbone is frozen.

    Equations 3-4 and A.4 of the paper in the form that its code computes. One map a layer: rank (2 D + 1) parameters, in
    float32 on a base of any dtype. Rows without such tokens stay bit for bit what they are; in generation the prompt alone
    is steered.

    Args:
        rank: width r of the subspace.
        layers: ``all``, ``every:k``, ``shallow``, ``middle``, ``deep``, or numbers from 0.
        placement: ``block_output`` as in the paper, where the last layer's map reaches no loss; or ``block_input``.
        positions: ``all``, ``first:n``, ``last:m``, ``f4+l5``, ``uniform:n``, ``ratio:p``, ``random:p``; p may be a range such
            as ``0.01-0.25``, drawn for each training batch. They count a row's tokens of one modality.
        modalities: ``vision``, ``audio``, ``text`` (the prompt's), or a list of them.
        parametrization: ``orthonormal``; ``none``: R free; ``untied``: h + U (W h + b - V h), as the paper prints it.
        init: ``identity`` starts as the untouched backbone; ``random`` as in the released code.
        dropout: in training only.
        dropout_on: the ``update`` added to h, or the whole ``state`` as in the released code.
        share: one map for all layers.
        seed: of ``random`` positions.

    Attributes:
        resolved: full names of the steered layers inside the part, after ``apply``.

    Raises:
        ValueError: a value that makes no sense.
    """

    def __init__(
        self,
        rank: int = 1,
        layers: list[int] | str = "all",
        placement: str = "block_input",
        positions: str = "f4+l5",
        modalities: list[str] | str = "vision",
        parametrization: str = "orthonormal",
        init: str = "identity",
        dropout: float = 0.0,
        dropout_on: str = "update",
        share: bool = False,
        seed: int = 0,
    ) -> None:
        if parametrization not in PARAMETRIZATIONS:
            raise ValueError(
                f"parametrization: there is no '{parametrization}'{hint(parametrization, PARAMETRIZATIONS)}"
            )
        places = Positions(positions, modalities, seed)
        form = FORMS[parametrization]
        self.options = Options("mores", form, rank, layers, placement, places, init, dropout, dropout_on, share)
        self.resolved: list[str] = []

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """Insert the maps and freeze what has no choice of its own.

        Raises:
            ConfigError: the part is no backbone, an option does not fit it, or its tokens are steered there already.
        """
        self.resolved = steer(self.options, part, model)

    def merge(self, part: nn.Module, model: MultimodalModel) -> None:
        """Fold all that steers the model into its projectors: exact for every token of the media at the input of layer 0.

        Raises:
            ConfigError: it is steered elsewhere too; says where.
        """
        merge(model)
