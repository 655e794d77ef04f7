"""What the wrappers of vision libraries share: near names, agreement with found weights, sizes measured by one picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm_factory import Encoder, hint, one_line


def require_library(module: str, package: str) -> None:
    """Refuse an encoder whose library is missing.

    Raises:
        ValueError: ``module`` cannot be imported; names the ``package`` to install.
    """
    try:
        import_module(module)
    except ImportError as error:
        raise ValueError(f"name: the library {module} cannot be imported ({error}); pip install {package}") from error


def near(word: str, known: Iterable[str]) -> str:
    """``; did you mean '...'?`` or nothing: for libraries whose whole list would be hundreds of words."""
    return hint(word, known).partition(" known:")[0].rstrip(";")


def require_picture(image_size: int) -> None:
    """Refuse a picture without pixels with a ValueError."""
    if image_size < 1:
        raise ValueError(f"image_size: {image_size} pixels hold no picture; use 32 or more")


def require_agreement(asked: Mapping[str, Any], found: Mapping[str, Any], source: object, option: str) -> None:
    """Refuse weights of something else than what the configuration says.

    Args:
        asked: values of the configuration by name.
        found: values of the weights by name.
        source: where they were found.
        option: what to correct.

    Raises:
        ValueError: names the first value that differs.
    """
    for name, value in asked.items():
        theirs = found.get(name)
        if _plain(theirs) != _plain(value):
            raise ValueError(
                f"pretrained: {source} has {name} {theirs!r} where {option} says {value!r}; correct {option}, or set "
                "architecture: null"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def fill(module: nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
    """Copy weights of equal names and shapes into ``module``; none may be missing or left over.

    Raises:
        ValueError: names the first difference.
    """
    targets = module.state_dict()
    for name in targets:
        if name not in weights:
            raise ValueError(f"pretrained: {source} has no '{name}'; correct architecture")
        if weights[name].shape != targets[name].shape:
            raise ValueError(
                f"pretrained: {source} has '{name}' {list(weights[name].shape)} where the architecture has "
                f"{list(targets[name].shape)}; correct architecture"
            )
    surplus = [name for name in weights if name not in targets]
    if surplus:
        raise ValueError(
            f"pretrained: {source} has {len(surplus)} tensors that the architecture lacks, such as '{surplus[0]}'; "
            "correct architecture"
        )
    module.load_state_dict(dict(weights))


def level_of(layer: int, levels: int, architecture: str) -> int:
    """``layer`` counted from the front.

    Raises:
        ValueError: out of range.
    """
    if not -levels <= layer < levels:
        raise ValueError(
            f"layer: {layer} is out of range, '{architecture}' has {levels} feature levels (0 to {levels - 1})"
        )
    return layer % levels


def cells(grid: Tensor) -> Tensor:
    """A feature map row by row: [n, d, h, w] -> [n, h*w, d]"""
    return grid.flatten(2).transpose(1, 2)


def probe(encoder: Encoder, image_size: int) -> Tensor:
    """What an encoder gives for one empty picture; leaves no trace (eval mode, no graph, no random number).

    Raises:
        ValueError: it cannot take a picture of that size.
    """
    training = encoder.training
    try:
        with torch.no_grad():
            return encoder.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = one_line(error, 200)
        raise ValueError(f"image_size: the architecture cannot take {image_size} pixels ({reason})") from error
    finally:
        encoder.train(training)


def traced(encoder: Encoder, image_size: int) -> tuple[tuple[int, ...], set[str]]:
    """The shape of an encoder's output for one picture, and the names of the parameters without influence on it.

    Found on stand-ins without memory, so it costs next to nothing however large the encoder is.

    Raises:
        ValueError: it cannot take a picture of that size.
    """
    stand_ins = {name: torch.empty_like(p, device="meta").requires_grad_() for name, p in encoder.named_parameters()}
    buffers = {name: torch.empty_like(b, device="meta") for name, b in encoder.named_buffers()}
    training = encoder.training
    try:
        with torch.enable_grad():
            items = torch.zeros(1, 3, image_size, image_size, device="meta")
            out = torch.func.functional_call(encoder.eval(), {**stand_ins, **buffers}, (items,))
        used = _leaves(out)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = one_line(error, 200)
        raise ValueError(f"image_size: the architecture cannot take {image_size} pixels ({reason})") from error
    finally:
        encoder.train(training)
    return tuple(out.shape), {name for name, stand_in in stand_ins.items() if id(stand_in) not in used}


def _leaves(out: Tensor) -> set[int]:
    """Identities of the tensors that a result was computed from, by its graph."""
    found, seen, waiting = set(), set(), [out.grad_fn]
    while waiting:
        step = waiting.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        if hasattr(step, "variable"):
            found.add(id(step.variable))
        waiting += [before for before, _ in step.next_functions]
    return found


def json_in(folder: Path | str, name: str) -> dict[str, Any]:
    """A JSON file of a local folder; empty where the folder is none or has no such file.

    Raises:
        ValueError: the file is damaged.
    """
    import json

    file = Path(folder) / name
    if isinstance(folder, str) or not file.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"pretrained: {file} is no valid JSON ({error}); download it again") from error
    return found
