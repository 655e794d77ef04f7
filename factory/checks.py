"""A composed tree against the classes it names: every problem at once, before any weight is loaded and without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mllm_factory.errors import Problem, hint
from mllm_factory.registry import validate, validate_options
from mllm_factory.schema import MISSING, Param, Schema, of_source

PARTS = ("vision", "audio", "projector", "audio_projector", "backbone")
"""The parts of a model, as ``tuning`` names them."""

ROOT_KEYS = (
    *(
        "vision",
        "audio",
        "projector",
        "audio_projector",
        "backbone",
        "tuning",
        "schedule",
        "data",
        "trainer",
        "metrics",
    ),
    *("name", "seed", "output_dir", "resume", "init_from", "trust_components", "stages"),
)
"""What a tree consists of."""

_KINDS = {
    **{"vision": "Encoder", "audio": "Encoder", "projector": "Projector", "audio_projector": "Projector"},
    **{"backbone": "Backbone", "schedule": "Schedule"},
}
_TEXT = {"output_dir": False, "resume": True, "init_from": True, "checkpoint": True}
_NO_FOLDER_NAME = re.compile(r'[/\\:*?"<>|\x00-\x1f]')
_COLLATOR_GIVEN = ("template", "pad_id", "encoders", "tokens")


def check_tree(tree: Mapping[str, Any], registered_only: bool = False, evaluate: bool = False) -> list[Problem]:
    """Every problem of a plain tree, without origins.

    Args:
        tree: what ``compose`` gave, or the config of a checkpoint.
        registered_only: refuse classes outside the registry without importing them.
        evaluate: the tree is evaluated, not trained: ``checkpoint`` may be there, ``data.train`` does not matter.
    """
    known = (*ROOT_KEYS, "checkpoint") if evaluate else ROOT_KEYS
    problems = [Problem(f"no such key{hint(str(key), known)}", str(key)) for key in tree if key not in known]
    problems += _check_values(tree)
    for key, kind in _KINDS.items():
        if tree.get(key) is not None:
            problems += validate(kind, tree[key], key, (), registered_only)[1]
        elif key == "backbone" or (key == "schedule" and not evaluate):
            problems.append(Problem(f"needs a value: {key}=<preset>, or {key}.name=<{kind}>", key))
    if tree.get("projector") is None and (tree.get("vision") or tree.get("audio")):
        problems.append(Problem("needs a value: an encoder without a projector cannot reach the backbone", "projector"))
    problems += _check_tuning(tree, registered_only)
    problems += _check_data(tree, registered_only, evaluate)
    problems += _check_engine_node("trainer", "Trainer", tree.get("trainer"), "trainer")
    return problems + _check_metrics(tree, registered_only)


def _check_values(tree: Mapping[str, Any]) -> list[Problem]:
    problems = []
    name, seed, trust = tree.get("name"), tree.get("seed"), tree.get("trust_components", False)
    if not isinstance(name, str) or not name.strip(" .") or name != name.strip() or _NO_FOLDER_NAME.search(name):
        problems.append(Problem(f'names a folder: text without any of / \\ : * ? " < > |, got {name!r}', "name"))
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        problems.append(Problem(f"expected a whole number of 0 or more, got {seed!r}", "seed"))
    if not isinstance(trust, bool):
        problems.append(Problem(f"expected true or false, got {trust!r}", "trust_components"))
    for key, optional in _TEXT.items():
        value = tree.get(key)
        if value == MISSING:
            problems.append(Problem("needs a value", key))
        elif (
            (key in tree or not optional)
            and not (isinstance(value, str) and value)
            and not (optional and value is None)
        ):
            problems.append(Problem(f"expected a path{' or null' if optional else ''}, got {value!r}", key))
    return problems


def _check_tuning(tree: Mapping[str, Any], registered_only: bool) -> list[Problem]:
    tuning = tree.get("tuning")
    if not isinstance(tuning, Mapping):
        return [Problem(f"maps each part to a strategy or a list of them, got {tuning!r}", "tuning")]
    problems = []
    for part, node in tuning.items():
        key = f"tuning.{part}"
        if part not in PARTS:
            problems.append(Problem(f"there is no part '{part}'{hint(str(part), PARTS)}", key))
            continue
        for i, strategy in enumerate(node) if isinstance(node, list) else [(None, node)]:
            problems += validate("Tuning", strategy, key if i is None else f"{key}.{i}", (), registered_only)[1]
    for part in ("vision", "audio", "projector", "backbone"):
        if tree.get(part) is not None and part not in tuning:
            problems.append(
                Problem(f"no strategy for this part; for example tuning.{part}.name=frozen", f"tuning.{part}")
            )
    return problems


def _check_data(tree: Mapping[str, Any], registered_only: bool, evaluate: bool) -> list[Problem]:
    data = tree.get("data")
    if not isinstance(data, Mapping):
        return [Problem(f"holds train, eval and how batches are made, got {data!r}", "data")]
    problems = []
    for key, needed in (("train", not evaluate), ("eval", evaluate)):
        if needed or (key == "eval" and data.get(key) is not None):
            problems += validate("Source", data.get(key), f"data.{key}", (), registered_only)[1]
    options = {key: None if key in ("train", "eval") else value for key, value in data.items()}
    return problems + _check_engine_node("data", "Collator", options, "data", _COLLATOR_GIVEN)


def _check_metrics(tree: Mapping[str, Any], registered_only: bool) -> list[Problem]:
    metrics = tree.get("metrics") or {}
    if not isinstance(metrics, Mapping):
        return [Problem(f"maps labels to metrics, got {metrics!r}", "metrics")]
    problems = []
    for label, node in metrics.items():
        if node is None:
            problems.append(Problem(f"to leave a metric out, write ~metrics.{label}", f"metrics.{label}"))
        else:
            problems += validate("Metric", node, f"metrics.{label}", (), registered_only)[1]
    return problems


def engine_schema(module: str, cls: str) -> Schema:
    """The schema of one of the engine's own classes, from its source.

    Raises:
        LookupError: the engine has no such class.
    """
    found = of_source(str(Path(__file__).with_name(f"{module}.py")), f"mllm_factory.{module}", cls)
    if found is None:
        raise LookupError(f"mllm_factory.{module} has no class {cls}")
    return found


def _check_engine_node(module: str, cls: str, node: Any, key: str, given: tuple[str, ...] = ()) -> list[Problem]:
    if not isinstance(node, Mapping):
        return [Problem(f"expected a mapping of options, got {node!r}", key)]
    schema = engine_schema(module, cls)
    if key == "data":  # the node holds the two sources beside the collator's options
        schema = replace(
            schema, params={**schema.params, "train": Param("train", "Any", None), "eval": Param("eval", "Any", None)}
        )
    return validate_options(schema, node, key, given, key)[1]
