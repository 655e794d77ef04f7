"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190): keys and values that learn, in front of those of the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm_factory import Backbone, ConfigError, Tuning, hint, on_meta, register
from mllm_factory.components.tuning.prefix_fit import computed, decoder_of, quiet, require_attended, shape_of
from mllm_factory.components.tuning.prefix_keys import Prefix
from mllm_factory.components.tuning.targets import freeze_unless_chosen

if TYPE_CHECKING:
    from mllm_factory import MultimodalModel

INITS = ("words", "random")
SMALL = 0.02
"""Standard deviation of ``random``."""


@register("prefix")
class PrefixTuning(Tuning):
    """Every head of every decoder layer l attends to P learned keys and values before those of the tokens:

        o = softmax(c q [K_l; K]^T) [V_l; V]

    with K_l, V_l [P, d] for each key head. Every token sees the whole prefix; rows and hidden states get no longer. Positions
    are those without it: the first token counts 0, and K_l stands behind the rotary embedding. (peft moves the tokens to P.)
    The keys and values learn themselves, without the MLP of the paper that makes them in training.

    Where every weight of the backbone still learns (nothing came before, or ``full``), all of them are frozen first.
    Otherwise the former strategies' choice stands. K_l and V_l are float32 on a base of any type.

    Args:
        length: P.
        init: ``words``: what the backbone computes for P random ordinary tokens; the paper advises real words. Rotary
            positions are -P ... -1, so that the start is the backbone behind these words; others 0 ... P - 1. ``random``:
            normal with a deviation of 0.02.

    Attributes:
        resolved: full names of the decoder layers inside the part, after ``apply``.

    Raises:
        ValueError: a length below 1, or an unknown init.
    """

    def __init__(self, length: int = 16, init: str = "words") -> None:
        if length < 1:
            raise ValueError(f"length: {length} keys are no prefix; use 1 or more")
        if init not in INITS:
            raise ValueError(f"init: there is no '{init}'{hint(init, INITS)}")
        self.length, self.init = length, init
        self.resolved: list[str] = []

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """Add the keys and values to a backbone and hook them to its decoder.

        Raises:
            ConfigError: the part is no decoder of transformers whose layers keep all keys; it has a prefix already, fewer
                positions than the prefix, or does not attend to one as to tokens.
        """
        decoder = decoder_of(part)
        if not isinstance(part, Backbone) or any(isinstance(child, Prefix) for child in part.children()):
            raise ConfigError("prefix: the backbone has a prefix already; list one of them, with the length of both")
        if part.max_positions is not None and self.length > part.max_positions:
            raise ConfigError(f"length: {self.length} is more than the backbone's {part.max_positions} positions")
        if not on_meta():
            require_attended(part, decoder)
        freeze_unless_chosen(part)
        prefix = Prefix(*self._start(part, decoder), decoder)
        names = {id(module): name for name, module in part.named_modules()}
        part.add_module("prefix", prefix)
        prefix.attach(decoder)
        self.resolved = [names[id(layer)] for layer in part.layers]

    def _start(self, part: Backbone, decoder: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [L, Hkv, P, d]."""
        device = next(part.parameters()).device
        if self.init == "words" and not on_meta():
            positions = places(decoder, self.length).to(device)
            with quiet(part):
                return computed(decoder, part.embed(words(part.tokenizer, self.length).to(device)), positions)
        L, Hkv, d = shape_of(decoder.config)
        keys, values = (SMALL * torch.randn(L, Hkv, self.length, d, device=device) for _ in range(2))
        return keys, values


def words(tokenizer: Any, count: int) -> Tensor:
    """[1, P] ids of random tokens that are no marks."""
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = [i for i in range(len(tokenizer)) if i not in marks]
    return torch.tensor(ordinary)[torch.randint(len(ordinary), (1, count))]


def places(decoder: nn.Module, count: int) -> Tensor:
    """[1, P] positions right before 0 where they are rotary, so that any whole number is one; else from 0 on."""
    rotary = any(name.rpartition(".")[2].startswith("rotary") for name, _ in decoder.named_modules())
    return torch.arange(count)[None] - (count if rotary else 0)
