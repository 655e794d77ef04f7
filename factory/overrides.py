"""Overrides of the command line: read one by one, applied to a tree by Hydra's rules, expanded where they are sweeps."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mllm_factory import presets
from mllm_factory.checks import ROOT_KEYS, engine_schema
from mllm_factory.errors import Problem, hint
from mllm_factory.registry import find, index

_NOT_FOUND = re.compile(r"(?:In '([^']+)': )?Could not (?:find|load) '(?:([^']+)/)?([^'/]+)'")


def parse(texts: Iterable[str]) -> tuple[list[Override], list[Problem]]:
    """Read overrides; one that cannot be read is a problem."""
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in texts:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException as error:
            reason = str(error).splitlines()[0]
            advice = "; quote special characters: 'key=\"value\"'" if "=" in text else "; write key=value"
            problems.append(Problem(f"{reason}{advice}", text.partition("=")[0].lstrip("+~"), origin(text)))
    return parsed, problems


def origin(text: str | Override) -> str:
    """How messages name an override."""
    return f"override '{text if isinstance(text, str) else text.input_line}'"


def quoted(text: str) -> str:
    """A text as an override's value, whatever characters it has."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


# ---------------------------------------------------------------- choices of presets


def is_choice(override: Override, roots: Sequence[Path]) -> bool:
    """True where an override chooses a preset or concerns Hydra itself: those are Hydra's to apply."""
    key = override.key_or_group
    group = key in presets.GROUPS or presets.is_group(key, roots)
    return override.is_hydra_override() or (group and not isinstance(override.value(), dict))


def as_hydra_takes(override: Override, roots: Sequence[Path]) -> str | None:
    """Hydra knows no ``group=null``: it deletes groups, and empties those that are lists; None where it has no such group."""
    key, plain = override.key_or_group, not (override.is_add() or override.is_force_add() or override.is_delete())
    if not plain or override.value() is not None or not is_choice(override, roots) or override.is_hydra_override():
        return str(override.input_line)
    if key == "metrics":
        return "metrics=[]"
    return f"~{key}" if presets.is_group(key, roots) else None


def unknown_choice(override: Override, roots: Sequence[Path]) -> Problem | None:
    """A problem where an override names a preset that does not exist."""
    group, value = override.key_or_group, override.value()
    if override.is_delete() or override.is_hydra_override() or value is None:
        return None
    for choice in value if isinstance(value, list) else [value]:
        if presets.locate(f"{group}/{choice}", roots) is None:
            of_class = (
                f"; a class is no preset: write '~{group}' '+{group}.name={choice}'" if ":" in str(choice) else ""
            )
            message = f"no {group} preset is named '{choice}'{of_class}{hint(str(choice), presets.names(group, roots))}"
            return Problem(message, group, origin(override))
    return None


# ---------------------------------------------------------------- one override on a tree


def apply(tree: DictConfig, override: Override) -> list[Problem]:
    """Change ``tree`` as Hydra would; problems, and no change, where Hydra would stop."""
    key, value, line = override.key_or_group, override.value(), str(override.input_line)
    adds = override.is_add() or override.is_force_add()
    if override.package is not None:
        return [Problem(f"there is no group '{key}' to put at '{override.package}'", key, origin(line))]
    if not adds and not override.is_delete():
        places = [(place, why) for place in _leaves(tree, key, value) if (why := _unknown(tree, place, line))]
        if places:
            return [Problem(why, place, origin(line)) for place, why in places]
    try:
        message = _change(tree, override, adds)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        if isinstance(value, list):
            message += f"; to put a list in the place of what is there, write '~{key}' '+{line}'"
    return [Problem(message, key, origin(line))] if message else []


def _leaves(tree: DictConfig, key: str, value: object) -> list[str]:
    """The keys that an override sets: its own, or those inside a mapping, which is merged into the one that is there."""
    if not isinstance(value, dict) or not isinstance(OmegaConf.select(tree, key, throw_on_missing=False), DictConfig):
        return [key]
    return [leaf for inner, item in value.items() for leaf in _leaves(tree, f"{key}.{inner}", item)]


def _change(tree: DictConfig, override: Override, adds: bool) -> str:
    key, value = override.key_or_group, override.value()
    if override.is_delete():
        return _delete(tree, key, value)
    merges = isinstance(value, dict | list)
    if override.is_add() and not merges and OmegaConf.select(tree, key, throw_on_missing=False) is not None:
        return f"stands there already; write {str(override.input_line).lstrip('+')}, without the +"
    OmegaConf.update(tree, key, value, merge=True, force_add=adds)
    return ""


def _delete(tree: DictConfig, key: str, value: object) -> str:
    found = OmegaConf.select(tree, key, throw_on_missing=False)
    if found is None:
        return "there is nothing to delete"
    if value is not None and value != found:
        return f"is {found}, not {value}; nothing was deleted"
    parent, _, last = key.rpartition(".")
    with open_dict(tree):
        del (OmegaConf.select(tree, parent) if parent else tree)[last]
    return ""


def _unknown(tree: DictConfig, key: str, line: str) -> str:
    """Why a key does not exist: its first part that is not there, and what is; empty if it exists."""
    done: list[str] = []
    for part in key.split("."):
        node = OmegaConf.select(tree, ".".join(done), throw_on_missing=False) if done else tree
        if isinstance(node, ListConfig) or "[" in part:
            return ""  # an index; OmegaConf knows whether it fits
        if not isinstance(node, DictConfig):
            return f"{'.'.join(done)} is {node}, so it has no '{part}'; set {'.'.join(done)} first"
        if part not in list(node):  # "in" would overlook a value that is still missing
            break
        done.append(part)
    else:
        return ""
    if not done and part in ROOT_KEYS:
        return f"{part} is null here; choose one first: {part}=<preset>"
    known = [str(name) for name in node if name != "hydra"] if done else ROOT_KEYS
    where = f" in {'.'.join(done)}" if done else ""
    advice = f" (to add it, write +{line})" if done and _may_have(node, done, part) else ""
    return f"no key '{part}'{where}{hint(part, known)}{advice}"


def _may_have(node: DictConfig, path: list[str], option: str) -> bool:
    """False where a node's class is known and has no such option."""
    if path == ["trainer"]:
        return option in engine_schema("trainer", "Trainer").params
    name = node.get("name")
    kinds = [kind for kind, known in index().items() if name in known]
    return not kinds or any(option in find(kind, str(name)).params for kind in kinds)


# ---------------------------------------------------------------- what Hydra says


def named_in(error: Exception, usable: Mapping[str, Override]) -> str | None:
    """The override that an error names."""
    for line, override in usable.items():
        if f"'{override.key_or_group}'" in str(error) or line in str(error):
            return line
    return None


def explain(error: Exception, culprit: Override | None, roots: Sequence[Path]) -> list[Problem]:
    """Hydra's error as problems of one line each."""
    broken = presets.broken(roots) if culprit is None else []
    if broken:
        return broken
    missing = _NOT_FOUND.search(str(error))
    if missing:
        by, group, name = missing.groups()
        file = presets.locate(by, roots) if by else None
        where = presets.chooser(group or "", name, roots) or (presets.shown(file) if file else "")
        message = f"no {group or 'config'} preset is named '{name}'{hint(name, presets.names(group or '', roots))}"
        return [Problem(message, group or "", where)]
    reasons = [str(e).strip().splitlines()[0] for e in (error, error.__cause__) if e is not None and str(e).strip()]
    place = (culprit.key_or_group, origin(culprit)) if culprit else ("", "")
    return [Problem("; ".join(reasons) or type(error).__name__, *place)]


# ---------------------------------------------------------------- sweeps


def expand(overrides: Sequence[Override], limit: int) -> list[list[str]]:
    """The combinations of a sweep, at most ``limit``; what cannot be listed (an interval) is left out of all."""
    choices: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [str(override.input_line)]
        elif override.is_discrete_sweep():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
    return [list(row) for row in itertools.islice(itertools.product(*choices.values()), limit)]


def refuse_sweeps(overrides: Iterable[Override]) -> list[Problem]:
    """A problem for each override that gives several values where one run takes one."""
    return [
        Problem(
            f"gives several values; add -m to run one job each, or write a list as {o.get_key_element()}=[...]",
            o.key_or_group,
            origin(o),
        )
        for o in overrides
        if o.is_sweep_override()
    ]
