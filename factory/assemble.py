"""From a tree to objects: model with its tuning applied, sources, collator, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from mllm_factory import files
from mllm_factory.data import Collator
from mllm_factory.errors import ConfigError, DataError, Problem, no_memory
from mllm_factory.interfaces import Backbone, Encoder, Metric, Projector, Source, Tuning
from mllm_factory.media import BLANK
from mllm_factory.model import MultimodalModel
from mllm_factory.randomness import seed_all, seed_of
from mllm_factory.registry import build, schema_of, validate_options
from mllm_factory.types import MODALITIES

T = TypeVar("T")
Tree = Mapping[str, Any]
MISFITS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""What torch and user code raise at tensors of the wrong size."""


def build_model(tree: Tree) -> MultimodalModel:
    """The model of a tree with its tuning applied. Each part draws its random weights from a seed of its own.

    Raises:
        ConfigError: everything wrong with the parts, at once.
    """
    problems: list[Problem] = []

    def attempt(kind: type[T], part: str, key: str, **given: Any) -> T | None:
        seed_all(seed_of(tree["seed"], part))
        try:
            return build(kind, tree[key], key, **given)
        except ConfigError as error:
            problems.extend(error.problems)
            return None

    backbone = attempt(Backbone, "backbone", "backbone")
    encoders = {name: attempt(Encoder, name, name) for name in MODALITIES if tree.get(name)}
    projectors = {}
    for name, encoder in encoders.items():
        if encoder is not None and backbone is not None:
            problems += _wrong_modality(name, encoder)
            part = "projector" if name == "vision" else f"{name}_projector"
            key = part if tree.get(part) else "projector"
            sizes = {"in_dim": encoder.dim, "out_dim": backbone.dim, "in_tokens": encoder.num_tokens}
            projectors[name] = attempt(Projector, part, key, **sizes)
    if problems or backbone is None:
        raise ConfigError(problems)
    model = MultimodalModel(backbone, encoders, projectors)  # type: ignore[arg-type]
    _require_shapes(model)
    tune(model, tree)
    return model


def _wrong_modality(name: str, encoder: Encoder) -> list[Problem]:
    if encoder.modality == name:
        return []
    return [Problem(f"{type(encoder).__name__} encodes {encoder.modality}, not {name}", f"{name}.name")]


def _require_shapes(model: MultimodalModel) -> None:
    """Compare what encoders and projectors say of their sizes with what they give for one blank item."""
    problems = []
    for name, encoder in model.encoders.items():
        with torch.no_grad(), torch.device("cpu"):
            items = encoder.transform(BLANK[name]())  # type: ignore[operator]
        weight = next(encoder.parameters(), None)
        items = items[:1].to(weight.device if weight is not None else "cpu")
        try:
            with torch.no_grad():
                encoded = encoder.eval()(items)
                projected = model.projectors[name].eval()(encoded)
        except MISFITS as error:
            if no_memory(error):
                raise
            problems.append(Problem(f"encoder and projector do not fit: {files.reason(error)}", name))
            continue
        for what, says, gives in (
            ("encoder", (1, encoder.num_tokens, encoder.dim), encoded.shape),
            ("projector", (1, model.tokens_per_item[name], model.backbone.dim), projected.shape),
        ):
            if tuple(gives) != says:
                problems.append(
                    Problem(
                        f"the {what} says it gives [n, tokens, width] = {list(says)} for one item but gives {list(gives)}",
                        name,
                    )
                )
    if problems:
        raise ConfigError(problems)


def tune(model: MultimodalModel, tree: Tree) -> None:
    """Apply each part's strategy or list of strategies.

    Raises:
        ConfigError: a part has no strategy, or one does not fit its part.
    """
    problems = []
    for part, module in model.parts().items():
        key = part if tree["tuning"].get(part) else "projector" if part.endswith("projector") else part
        node = tree["tuning"].get(key)
        if not node:
            problems.append(
                Problem(f"no strategy for this part; for example tuning.{key}.name=frozen", f"tuning.{key}")
            )
            continue
        seed_all(seed_of(tree["seed"], f"tuning.{part}"))
        for strategy in node if isinstance(node, list) else [node]:
            try:
                built = build(Tuning, strategy, f"tuning.{key}")
                built.apply(module, model)
                model.strategies.setdefault(part, []).append(built)
            except ConfigError as error:
                problems += [Problem(p.message, p.key or f"tuning.{key}") for p in error.problems]
            except (TypeError, ValueError) as error:
                problems.append(Problem(str(error), f"tuning.{key}"))
    if problems:
        raise ConfigError(problems)


def build_engine_node(cls: type[T], node: Tree, key: str, **given: Any) -> T:
    """An engine class from its node, checked like a component.

    Raises:
        ConfigError: an option that does not exist or does not fit.
    """
    options, problems = validate_options(schema_of(cls), node, key, given)
    if problems:
        raise ConfigError(problems)
    try:
        return cls(**options, **given)
    except ValueError as error:
        raise ConfigError(Problem(str(error), key)) from error


def build_source(tree: Tree, key: str, encoders: set[str]) -> Source:
    """``data.train`` or ``data.eval``.

    Raises:
        ConfigError: it is null, empty, or carries a modality that has no encoder.
    """
    node = tree["data"].get(key)
    if not node:
        raise ConfigError(Problem("there is no data; choose a source", f"data.{key}"))
    source = build(Source, node, f"data.{key}")
    if len(source) == 0:
        raise ConfigError(Problem(f"{node['name']} is empty", f"data.{key}"))
    for modality in sorted(source.modalities - encoders):
        raise ConfigError(
            Problem(
                f"the samples of {node['name']} carry {modality} but {modality}=null; choose an encoder", f"data.{key}"
            )
        )
    return source


def build_collator(tree: Tree, model: MultimodalModel) -> Collator:
    """The collator of a model.

    Raises:
        ConfigError: one item of media does not fit into ``max_length``, or that not into the backbone.
    """
    options = {key: value for key, value in tree["data"].items() if key not in ("train", "eval")}
    tokenizer = model.backbone.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collator = build_engine_node(
        Collator,
        options,
        "data",
        template=model.template,
        pad_id=pad if pad is not None else 0,  # any id will do: padding is masked, media positions are overwritten
        encoders=model.encoders,
        tokens=model.tokens_per_item,
    )
    for name, tokens in model.tokens_per_item.items():
        if tokens >= collator.max_length:
            raise ConfigError(
                Problem(
                    f"one {name} item takes {tokens} tokens but max_length is {collator.max_length}", "data.max_length"
                )
            )
    limit = model.backbone.max_positions
    if limit is not None and collator.max_length > limit:
        raise ConfigError(
            Problem(f"{collator.max_length} is more than the backbone's {limit} positions", "data.max_length")
        )
    return collator


def length_of(source: Source, collator: Collator) -> Callable[[int], int]:
    """Tokens of a sample by its index.

    Raises:
        DataError: while called, for a sample that cannot be read.
    """

    def length(index: int) -> int:
        try:
            return collator.length(source[index])
        except DataError:
            raise
        except Exception as error:  # a user's source may raise anything
            raise DataError(f"sample number {index} cannot be read: {type(error).__name__}: {error}") from error

    return length


def build_metrics(tree: Tree) -> dict[str, Metric]:
    """Fresh metrics by label."""
    return {label: build(Metric, node, f"metrics.{label}") for label, node in (tree.get("metrics") or {}).items()}
