"""What all strategies through peft share: insert the layers of a method into a part, and fold them into plain weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from mllm_factory.components.tuning.targets import freeze_unless_chosen

if TYPE_CHECKING:
    from peft import PeftConfig


def pattern(names: Iterable[str]) -> str:
    """A regular expression for exactly these module names; peft takes a list's words for ends of names."""
    return "|".join(map(re.escape, names))


def insert(part: nn.Module, config: PeftConfig) -> None:
    """Put the layers of ``config`` into a part, its targets being full names.

    What the part trained before, it still does (see ``freeze_unless_chosen``). What is inserted and learns is float32 also in
    a part of half precision: small updates would be lost in it.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as TUNERS

    freeze_unless_chosen(part)
    kept = {name for name, p in part.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # peft sets it right by itself
        kind: Any = config.peft_type
        TUNERS[kind](part, config, "default")
    if hasattr(part, "peft_config"):
        del part.peft_config  # a record of peft's that the next method of the same part would stumble over
    for name, parameter in part.named_parameters():
        if name in kept:
            parameter.requires_grad = True
        elif parameter.requires_grad:
            parameter.data = parameter.data.float()


def fold(part: nn.Module) -> None:
    """Replace every inserted layer of peft by a plain layer that computes the same.

    Raises:
        ValueError: the update of a layer is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(part.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(part.get_submodule(parent), child, layer.get_base_layer())
