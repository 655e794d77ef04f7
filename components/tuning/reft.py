"""The ReFT family (arXiv 2404.03592): low-rank edits of hidden states at chosen positions."""

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

KINDS = {"loreft": "orthonormal", "noreft": "none", "direft": "direct", "consreft": "constant"}
"""Members of the family and their maps."""


@register("reft")
class Reft(Tuning):
    """Edits h' = h + R s of chosen tokens at chosen layers; the backbone is frozen.

    ``loreft``: s = W h + b - R^T h, R^T R = I. ``noreft``: the same with R free. ``direft``: s = W h + b, R free.
    ``consreft``: s = b - R^T h, R^T R = I. A map has rank (2 D + 1) parameters, ``consreft`` rank (D + 1); in float32.
    Text means the prompt: what stands before the last answer, without other answers.

    Args:
        kind: ``loreft``, ``noreft``, ``direft`` or ``consreft``.
        rank: width r of the subspace.
        layers: ``all``, ``every:k``, ``shallow``, ``middle``, ``deep``, or numbers from 0.
        placement: ``block_output`` as in the paper, or ``block_input``.
        positions: ``all``, ``first:n``, ``last:m``, ``f4+l5``, ``uniform:n``, ``ratio:p``, ``random:p``; p may be a range such
            as ``0.01-0.25``, drawn for each training batch. They count a row's tokens of one modality.
        modalities: ``vision``, ``audio``, ``text``, or a list of them.
        init: ``identity`` starts as the untouched backbone, which ``consreft`` cannot; or ``random`` as in pyreft.
        dropout: in training only.
        dropout_on: the ``update`` added to h, or the whole ``state`` as in pyreft.
        share: one map for all layers.
        seed: of ``random`` positions.

    Attributes:
        resolved: full names of the steered layers inside the part, after ``apply``.

    Raises:
        ValueError: a value that makes no sense.
    """

    def __init__(
        self,
        kind: str = "loreft",
        rank: int = 4,
        layers: list[int] | str = "all",
        placement: str = "block_output",
        positions: str = "f4+l5",
        modalities: list[str] | str = "text",
        init: str = "identity",
        dropout: float = 0.0,
        dropout_on: str = "update",
        share: bool = False,
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind: there is no '{kind}'{hint(kind, KINDS)}")
        form = FORMS[KINDS[kind]]
        if init == "identity" and not form.linear:
            raise ValueError(f"init: {kind} replaces h in the subspace, so no start leaves h as it is; use random")
        places = Positions(positions, modalities, seed)
        self.options = Options(kind, form, rank, layers, placement, places, init, dropout, dropout_on, share)
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
