"""Overrides of the command line: read one by one, applied to a tree by Hydra's rules, expanded where they are sweeps."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mllm_factory.checks import ROOT_KEYS
from mllm_factory.errors import Problem, hint


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


# ---------------------------------------------------------------- one override on a tree


def apply(tree: DictConfig, override: Override) -> Problem | None:
    """Change ``tree`` as Hydra would; a problem where Hydra would stop."""
    key, line = override.key_or_group, str(override.input_line)
    if override.package is not None:
        return Problem(f"there is no group '{key}' to put at '{override.package}'", key, origin(line))
    try:
        message = _change(tree, override)
    except (ConfigAttributeError, ConfigKeyError):
        message = _unknown(tree, key, line)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
    return Problem(message, key, origin(line)) if message else None


def _change(tree: DictConfig, override: Override) -> str:
    key, value = override.key_or_group, override.value()
    if override.is_delete():
        return _delete(tree, key, value)
    merges = isinstance(value, dict | list)
    if override.is_add() and not merges and OmegaConf.select(tree, key, throw_on_missing=False) is not None:
        return f"stands there already; write {str(override.input_line).lstrip('+')}, without the +"
    OmegaConf.update(tree, key, value, merge=True, force_add=override.is_add() or override.is_force_add())
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
    """Why a key cannot be set: the first part of it that does not exist, and what does."""
    done: list[str] = []
    for part in key.split("."):
        node = OmegaConf.select(tree, ".".join(done), throw_on_missing=False) if done else tree
        if not isinstance(node, DictConfig):
            return f"{'.'.join(done)} is {node}, so it has no '{part}'; set {'.'.join(done)} first"
        if part not in node:
            break
        done.append(part)
    if not done and part in ROOT_KEYS:
        return f"{part} is null here; choose one first: {part}=<preset>"
    known = [str(name) for name in node if name != "hydra"] if done else ROOT_KEYS
    where = f" in {'.'.join(done)}" if done else ""
    close = difflib.get_close_matches(part, known, n=1, cutoff=0.5)
    return f"no key '{part}'{where}{hint(part, known)}{'' if close else f' (to add it, write +{line})'}"


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
