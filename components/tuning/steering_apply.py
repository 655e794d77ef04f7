"""What ``mores`` and ``reft`` share: options, which layers, and putting the maps into a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mllm_factory import Backbone, ConfigError, MultimodalModel, hint
from mllm_factory.components.tuning.positions import Positions
from mllm_factory.components.tuning.steering import INITS, SITES, Form, LowRankMap
from mllm_factory.components.tuning.steering_hooks import Flight, Site, attach

PLACEMENTS = ("block_input", "block_output")
"""Where a layer is steered: its input, or its output as the papers do."""

RANGES = ("shallow", "middle", "deep")
"""Halves of the layers: the first, the one in the middle, the last (arXiv 2412.12359, A.9)."""

_FORMS = "all, every:k, shallow, middle, deep, or a list such as [0, 2, 4]"


@dataclass(frozen=True)
class Options:
    """Options of a steering strategy.

    Attributes:
        method: the strategy's name, for messages.
        form: of the map.
        positions: which tokens.

    Raises:
        ValueError: a value outside its range.
    """

    method: str
    form: Form
    rank: int
    layers: list[int] | str
    placement: str
    positions: Positions
    init: str
    dropout: float
    dropout_on: str
    share: bool

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: {self.rank} is no width; use 1 or more")
        for name, choices in (("placement", PLACEMENTS), ("init", INITS), ("dropout_on", SITES)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}: there is no '{value}'{hint(value, choices)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout} is no probability; use 0 or more and less than 1")
        choose(self.layers, None)


def choose(layers: Sequence[int] | str, count: int | None) -> list[int]:
    """Numbers of the chosen layers among ``count``, ascending; with None the text alone is judged.

    ``all``; ``every:k``, layers 0, k, 2k, ...; ``shallow``, ``middle``, ``deep``, half of the layers each; or numbers.

    Raises:
        ValueError: no such choice, a number twice, or one that is out of range.
    """
    n = 0 if count is None else count
    if not isinstance(layers, str):
        return _numbered(layers, count)
    word, _, step = layers.partition(":")
    if layers in RANGES:
        start = {"shallow": 0, "middle": (n - n // 2) // 2, "deep": n - n // 2}[layers]
        return list(range(start, start + n // 2)) or list(range(n))
    if layers == "all" or (word == "every" and step.isdecimal() and int(step) > 0):
        return list(range(0, n, int(step or 1)))
    raise ValueError(f"layers: '{layers}' is no choice; use {_FORMS}")


def _numbered(layers: Sequence[int], count: int | None) -> list[int]:
    if not layers:
        raise ValueError(f"layers: the list is empty; use {_FORMS}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers: {list(layers)} names a layer twice; name each once")
    bad = [i for i in layers if i < 0 or (count is not None and i >= count)]
    if bad:
        there = "counted from 0" if count is None else f"0 to {count - 1}"
        raise ValueError(f"layers: {bad[0]} is out of range; the layers are {there}")
    return sorted(layers)


class Steering(nn.ModuleDict):
    """The maps of one strategy, by layer number, or ``shared``; a child of the backbone.

    Attributes:
        options: of the strategy.
        flight: what its hooks look at.
        chosen: numbers of the steered layers.
    """

    def __init__(self, options: Options, flight: Flight, chosen: list[int]) -> None:
        super().__init__()
        self.options, self.flight, self.chosen = options, flight, chosen

    def at(self, layer: int) -> LowRankMap:
        """The map of a layer."""
        found = self["shared" if self.options.share else str(layer)]
        if not isinstance(found, LowRankMap):
            raise TypeError(f"layer {layer} holds {type(found).__name__}")
        return found


def steerings(backbone: nn.Module) -> list[tuple[str, Steering]]:
    """What steers a backbone, by name, in the order of application."""
    return [(name, child) for name, child in backbone.named_children() if isinstance(child, Steering)]


def steer(options: Options, part: nn.Module, model: MultimodalModel) -> list[str]:
    """Insert the maps into a backbone, hook them to its layers, and let nothing else learn that did not before.

    Where every weight of the part still learns (nothing came before, or ``full``), all of them are frozen. Otherwise the
    former strategies' choice stands.

    Returns:
        Full names of the steered layers inside the part.

    Raises:
        ConfigError: the part is no backbone, the layers or the rank do not fit it, a modality has no encoder, or a former
            strategy steers the same tokens at the same place.
    """
    if not isinstance(part, Backbone):
        raise ConfigError(
            f"{options.method}: {type(part).__name__} is no backbone, and only a backbone has layers that know the batch's "
            "tokens; choose frozen, full or lora for this part"
        )
    for name in options.positions.modalities:
        if name != "text" and name not in model.encoders:
            raise ConfigError(
                f"modalities: the model has no {name} encoder; choose one ({name}=...), or do not steer {name}"
            )
    if options.rank > part.dim:
        raise ConfigError(f"rank: {options.rank} is above the backbone's width {part.dim}; use at most that")
    try:
        chosen = choose(options.layers, len(part.layers))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _require_free(options, part, chosen)
    if all(p.requires_grad for p in part.parameters()):
        part.requires_grad_(False)
    return _insert(Steering(options, Flight(model, options.positions), chosen), part)


def _require_free(options: Options, part: nn.Module, chosen: list[int]) -> None:
    for _, other in steerings(part):
        layers = sorted(set(chosen) & set(other.chosen))
        names = set(options.positions.modalities) & set(other.options.positions.modalities)
        if layers and names and options.placement == other.options.placement:
            raise ConfigError(
                f"{options.method}: {other.options.method} steers {', '.join(sorted(names))} at the {options.placement} of layer "
                f"{layers[0]} already; choose other layers, modalities or another placement, or list one of them only"
            )


def _insert(steering: Steering, part: Backbone) -> list[str]:
    options, device = steering.options, next(part.parameters()).device
    names = {id(module): name for name, module in part.named_modules()}
    for i in steering.chosen:
        key = "shared" if options.share else str(i)
        if key not in steering:
            steering[key] = _new_map(options, part.dim, device)
        attach(part.layers[i], Site(steering.flight, steering.at(i)), options.placement)
    taken = len(steerings(part))
    part.add_module(f"steering_{taken + 1}" if taken else "steering", steering)
    return [names[id(part.layers[i])] for i in steering.chosen]


def _new_map(options: Options, dim: int, device: torch.device) -> LowRankMap:
    return LowRankMap(dim, options.rank, options.form, options.init, options.dropout, options.dropout_on, device)
