"""Which layers of a part a strategy means: linear layers by the ends of their names, blocks by structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from mllm_factory import Backbone, ConfigError, hint

ALL_LINEAR = "all-linear"
INSERTED = "bottleneck_adapter"
"""Name of the module that an adapter adds to a linear layer."""


def resolve(part: nn.Module, targets: Sequence[str] | str, who: str, option: str = "targets") -> list[str]:
    """Full names, inside the part, of the linear layers that ``targets`` mean.

    Args:
        part: a part of the model.
        targets: ends of module names at a dot, or ``all-linear``: every linear layer of the part, of a backbone those of
            its decoder layers.
        who: the strategy, to begin an error with.
        option: the option that ``targets`` come from, for the same.

    Raises:
        ConfigError: the part has no linear layer, a target names none of them, or another strategy has one of them already.
    """
    linear = _linear_layers(part)
    if not linear:
        raise ConfigError(
            f"{who}: {type(part).__name__} has no linear layer to adapt; choose frozen or full for this part"
        )
    names = _of_decoder(part, linear) if targets == ALL_LINEAR else _named(part, linear, targets, f"{who}: {option}")
    _require_unclaimed(part, names, who)
    return names


def _named(part: nn.Module, linear: list[str], targets: Sequence[str] | str, who: str) -> list[str]:
    wanted = [targets] if isinstance(targets, str) else targets
    missing = [target for target in wanted if not any(_ends(name, target) for name in linear)]
    if missing:
        ends = sorted({name.rpartition(".")[2] for name in linear if not name.rpartition(".")[2].isdigit()}) or linear
        raise ConfigError(
            f"{who}: no linear layer of {type(part).__name__} is named '{missing[0]}'{hint(missing[0], ends)}, {ALL_LINEAR}"
        )
    return [name for name in linear if any(_ends(name, target) for target in wanted)]


def _require_unclaimed(part: nn.Module, names: list[str], who: str) -> None:
    """Refuse layers that a former strategy of the list adapts or trains. Where every weight learns, nobody chose yet."""
    chosen = not all(p.requires_grad for p in part.parameters())
    for name in names:
        layer = part.get_submodule(name)
        if is_adapted(layer):
            raise ConfigError(f"{who}: another strategy adapts {name} already; leave it out of one's targets")
        if chosen and any(p.requires_grad for p in layer.parameters()):
            raise ConfigError(f"{who}: another strategy trains {name} already; leave it out of one's targets")


def freeze_unless_chosen(part: nn.Module) -> None:
    """Freeze a part of which every weight still learns (nothing came before, or ``full``).

    Otherwise the former strategies' choice stands, so that a list of strategies trains what each of them adds.
    """
    if all(p.requires_grad for p in part.parameters()):
        part.requires_grad_(False)


def is_adapted(layer: nn.Module) -> bool:
    """True where an adapter was put around a layer or into it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer) or hasattr(layer, INSERTED)


def adapted_layers(part: nn.Module) -> list[str]:
    """Names of the layers that strategies have adapted."""
    return [name for name, module in part.named_modules() if is_adapted(module)]


def _linear_layers(part: nn.Module) -> list[str]:
    """Names of linear layers that are called as such; an adapted one counts, what is inside of it does not."""
    return [name for name, module in _outermost(part, "") if _is_linear(module)]


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D  # the linear layer of GPT-2

    return isinstance(module, nn.Linear | Conv1D) or is_adapted(module)


def _outermost(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """All modules but those inside linear layers, and but the output layer of torch's fused attention, which reads its
    weight without calling it.
    """
    yield name, module
    if _is_linear(module):
        return
    for child, inner in module.named_children():
        if not (isinstance(module, nn.MultiheadAttention) and child == "out_proj"):
            yield from _outermost(inner, f"{name}.{child}".lstrip("."))


def _of_decoder(part: nn.Module, linear: list[str]) -> list[str]:
    """Without the head: of a backbone, the layers inside its decoder layers."""
    if not isinstance(part, Backbone):
        return linear
    inside = {id(module) for module in part.layers.modules()}
    return [name for name in linear if id(part.get_submodule(name)) in inside]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


# ---------------------------------------------------------------- blocks


def blocks_of(part: nn.Module, who: str) -> dict[str, nn.Module]:
    """A part's blocks by their full names, first to last.

    Of a backbone these are its decoder layers, elsewhere the list of two or more modules of one class that holds the most
    parameters, the outermost if several hold the same.

    Raises:
        ConfigError: there is no such list.
    """
    if isinstance(part, Backbone):
        lists = [(name, module) for name, module in part.named_modules() if module is part.layers]
    else:
        lists = [(name, module) for name, module in part.named_modules() if _is_list_of_blocks(module)]
    if not lists:
        raise ConfigError(f"{who}: {type(part).__name__} is no stack of blocks; choose frozen or full for this part")
    name, found = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    return {f"{name}.{child}".lstrip("."): block for child, block in found.named_children()}


def _is_list_of_blocks(module: nn.Module) -> bool:
    children = list(module.children()) if isinstance(module, nn.ModuleList | nn.Sequential) else []
    alike = len(children) >= 2 and len({type(child) for child in children}) == 1
    return alike and all(any(True for _ in child.parameters()) for child in children)
