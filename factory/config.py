"""From overrides to a checked tree, on Hydra's compose API: every problem at once, each with where it came from.

Hydra stops at its first error. Here the groups are composed first, then each value override is applied on its own, by Hydra's
rules; an override that does not fit becomes a problem and is left out, so that the rest can still be checked.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mllm_factory import presets
from mllm_factory.checks import check_tree as check_tree
from mllm_factory.errors import Problem, hint
from mllm_factory.merge import Listing, Source, listing, merge
from mllm_factory.origins import Origins
from mllm_factory.overrides import (
    apply,
    as_hydra_takes,
    explain,
    is_choice,
    named_in,
    origin,
    parse,
    quoted,
    refuse_sweeps,
    unknown_choice,
)
from mllm_factory.schema import MISSING

VERSION_BASE = "1.3"
MODALITIES = ("vision", "audio")


@dataclass
class Composed:
    """A tree with everything that is wrong with it.

    Attributes:
        tree: plain resolved values without the ``hydra`` node; a missing value is ``"???"``; None where nothing composes.
        problems: what was wrong with files and overrides.
        choices: group -> chosen preset, Hydra's own groups included.
        sweep: values that the config itself sweeps over (``hydra.sweeper.params``).
        origins: where keys were set.
        spoilt: keys that a faulty override was meant for.
    """

    tree: dict[str, Any] | None
    problems: list[Problem]
    choices: Mapping[str, Any]
    sweep: Mapping[str, Any]
    origins: Origins
    spoilt: set[str] = field(default_factory=set)

    def origin(self, key: str) -> str:
        """The override, or the YAML file and line, that set a key last; empty where nothing did."""
        return self.origins.of(key)

    def check(self, registered_only: bool = False, evaluate: bool = False) -> list[Problem]:
        """All problems, those of ``check_tree`` included; none about keys that a faulty override was meant for."""
        found = [] if self.tree is None else check_tree(self.tree, registered_only, evaluate)
        fresh = [p for p in found if not any(_related(p.key, key) for key in self.spoilt)]
        return list(dict.fromkeys([*self.problems, *(Problem(p.message, p.key, self.origin(p.key)) for p in fresh)]))


def _related(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def compose(
    config_name: str, overrides: Iterable[str], config_dirs: Sequence[str] = (), config_path: str | None = None
) -> Composed:
    """Compose a tree; what is wrong is in the result.

    Args:
        config_name: primary config, such as ``train``.
        overrides: Hydra overrides without sweeps.
        config_dirs: folders of presets beside the built-in ones.
        config_path: folder (or ``pkg://package``) of an own primary config instead of the built-in one.
    """
    return Composer(config_name, config_dirs, config_path).compose(overrides)


class Base(NamedTuple):
    """The tree of a choice of groups before value overrides; ``quick`` if it lacks what Hydra itself puts in."""

    tree: DictConfig | None
    problems: list[Problem]
    spoilt: set[str]
    sources: list[Source]
    choices: Mapping[str, Any]
    quick: bool


class Composer:
    """Composes one primary config with several lists of overrides; what depends on the groups alone is done once."""

    def __init__(
        self,
        config_name: str,
        config_dirs: Sequence[str] = (),
        config_path: str | None = None,
        stored: Mapping[str, Path] | None = None,
        keep: bool = False,
    ) -> None:
        """``stored`` names primary configs in Hydra's ConfigStore and the file of each; ``keep`` if more than one tree is wanted."""
        self.keep = keep
        self.name, self.stored, self.own_primary = config_name, dict(stored or {}), config_path is not None
        self.place, self.dirs = config_path or presets.BUILT_IN, list(config_dirs)
        self._bases: dict[tuple[str, ...], Base] = {}

    def compose(self, overrides: Iterable[str]) -> Composed:
        """Compose with overrides."""
        parsed, problems = parse(overrides)
        problems += refuse_sweeps(parsed)
        parsed = [override for override in parsed if not override.is_sweep_override()]
        of_hydra = [o for o in parsed if o.key_or_group.startswith("hydra.") and o.key_or_group != "hydra.searchpath"]
        return self._compose(parsed, problems, quick=not of_hydra)

    def _compose(self, parsed: Sequence[Override], unread: Sequence[Problem], quick: bool) -> Composed:
        roots, search, missing = self.roots(parsed)
        choices = [override for override in parsed if is_choice(override, roots)]
        values = [override for override in parsed if override not in choices]
        base = self._base(choices, roots, search, quick)
        problems = [*unread, *missing, *base.problems]
        spoilt = {*base.spoilt, *(problem.key for problem in problems if problem.key)}
        origins = Origins(base.sources, values)
        if base.tree is None:
            return Composed(None, problems, base.choices, {}, origins, spoilt)
        tree = copy.deepcopy(base.tree) if self.keep else base.tree
        for override in values:
            found = [p for p in apply(tree, override) if not any(_related(p.key, key) for key in base.spoilt)]
            problems += found
            spoilt |= {problem.key for problem in found}
        try:
            resolved = plain(tree, base.choices)
        except OmegaConfBaseException:
            if base.quick:  # the hydra node might be what an interpolation needs
                return self._compose(parsed, unread, quick=False)
            resolved, unresolved = _resolve_in_a_job(tree, base.choices)
            problems += [Problem(p.message, p.key, origins.of(p.key)) for p in unresolved]
            spoilt |= {problem.key for problem in unresolved}
        sweep = OmegaConf.select(tree, "hydra.sweeper.params") or {}
        return Composed(resolved, problems, base.choices, sweep, origins, spoilt)

    def handed(self, parsed: Sequence[Override]) -> list[str]:
        """Overrides as Hydra takes them (``vision=null`` is ``~vision`` there), sweeps included."""
        roots, _, _ = self.roots(parsed)
        return [line for override in parsed if (line := as_hydra_takes(override, roots)) is not None]

    def roots(self, parsed: Sequence[Override]) -> tuple[list[Path], list[str], list[Problem]]:
        """The folders that presets come from, Hydra's words for those beside the primary one, and what does not exist."""
        primary = presets.folder(self.place)
        places = [(self.place, "--config-path")] + [(directory, "--config-dir") for directory in self.dirs]
        own = [override for override in parsed if override.key_or_group == "hydra.searchpath"]
        listed = own[0].value() if own else presets.searchpath(primary / f"{self.name}.yaml") if primary else []
        places += [(str(place), origin(own[0]) if own else "hydra.searchpath") for place in listed or ()]  # type: ignore[union-attr]
        found = [(place, presets.folder(place), source) for place, source in places]
        problems = [
            Problem(f"there is no folder '{place}'", origin=source) for place, path, source in found if path is None
        ]
        search = [place if "://" in place else f"file://{path}" for place, path, _ in found[1:] if path is not None]
        return list(dict.fromkeys(path for _, path, _ in found if path is not None)), search, problems

    def _base(self, choices: Sequence[Override], roots: list[Path], search: list[str], quick: bool) -> Base:
        key = (str(quick), *search, *(str(override.input_line) for override in choices))
        if key not in self._bases or not self.keep:
            self._bases[key] = self._compose_groups(choices, roots, search, quick)
        return self._bases[key]

    def _compose_groups(self, choices: Sequence[Override], roots: list[Path], search: list[str], quick: bool) -> Base:
        problems = self._check_files(roots)
        wrong = {override.key_or_group: p for override in choices if (p := unknown_choice(override, roots)) is not None}
        problems += wrong.values()
        spoilt = set(wrong)
        usable = {
            line: override
            for override in choices
            if override.key_or_group not in {*wrong, "hydra.searchpath"} and (line := as_hydra_takes(override, roots))
        }
        found = Listing([], False, {})
        if presets.folder(self.place) is None or not (self.name in self.stored or presets.locate(self.name, roots)):
            return Base(None, problems, spoilt, [], {}, quick)
        extra = [f"hydra.searchpath=[{','.join(map(quoted, search))}]"] if search else []
        with self._hydra(roots[0]), presets.fast_yaml():
            loader = GlobalHydra.instance().config_loader()
            while True:
                lines = [*extra, *usable]
                try:
                    found = listing(loader, self.name, lines, roots, self.stored)
                    quick = quick and found.complete
                    tree = merge(found.sources) if quick else hydra_compose(self.name, lines, return_hydra_config=True)
                    return Base(tree, problems, spoilt, found.sources, found.choices, quick)
                except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
                    culprit = named_in(error, usable)
                    problems += explain(error, usable.get(culprit or ""), roots)
                if culprit is None:
                    return Base(None, problems, spoilt, found.sources, found.choices, quick)
                spoilt.add(usable.pop(culprit).key_or_group)

    def _hydra(self, root: Path) -> AbstractContextManager[None]:
        if self.place.startswith("pkg://"):
            return initialize_config_module(self.place.removeprefix("pkg://"), self.name, VERSION_BASE)
        return initialize_config_dir(str(root), self.name, VERSION_BASE)

    def _check_files(self, roots: list[Path]) -> list[Problem]:
        problems = presets.duplicates(roots[1:] if self.own_primary else roots)
        if presets.folder(self.place) and self.name not in self.stored and presets.locate(self.name, roots) is None:
            known = [file.stem for file in roots[0].glob("*.yaml")]
            where = presets.shown(roots[0])
            problems.append(
                Problem(f"{where} has no config '{self.name}'{hint(self.name, known)}", origin="--config-name")
            )
        return problems


# ---------------------------------------------------------------- plain values


def plain(tree: DictConfig, choices: Mapping[str, Any]) -> dict[str, Any]:
    """A composed tree as plain resolved values, without the ``hydra`` node.

    A modality that was deselected has no node, or only what an experiment would have changed in it: both become null.

    Args:
        tree: the composed tree.
        choices: group -> chosen preset, from ``hydra.runtime.choices``.

    Raises:
        OmegaConfBaseException: an interpolation that leads nowhere.
    """
    values = {str(key): _plain(tree, key) for key in tree if key != "hydra"}
    for part in MODALITIES:
        node = values.get(part)
        deselected = choices.get(part) is None and isinstance(node, dict) and "name" not in node
        values[part] = None if deselected else node
    return values


def _plain(tree: DictConfig, key: Any) -> Any:
    value = MISSING if OmegaConf.is_missing(tree, key) else tree[key]
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=False) if OmegaConf.is_config(value) else value


def _resolve_in_a_job(tree: DictConfig, choices: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Plain values as a job has them, null where an interpolation leads nowhere, and the problems of those."""
    with open_dict(tree.hydra):  # known only when a job runs; interpolations such as ${hydra:job.num} get a stand-in
        for key, value in (("runtime.output_dir", "output_dir"), ("job.num", 0), ("job.id", "0")):
            if OmegaConf.is_missing(OmegaConf.select(tree.hydra, key.partition(".")[0]), key.partition(".")[2]):
                OmegaConf.update(tree.hydra, key, value)
    HydraConfig.instance().set_config(tree)
    try:
        problems = [problem for key in tree if key != "hydra" for problem in _unresolved(tree, key, str(key))]
        return plain(tree, choices), problems
    finally:
        HydraConfig.instance().cfg = None


def _unresolved(node: DictConfig | ListConfig, key: Any, path: str) -> Iterator[Problem]:
    """Problems of the interpolations at and below a key; each is replaced by null."""
    try:
        value = None if OmegaConf.is_missing(node, key) else node[key]
    except OmegaConfBaseException as error:
        yield Problem(str(error).splitlines()[0], path)
        with open_dict(node):
            node[key] = None
        return
    if isinstance(value, DictConfig | ListConfig) and not OmegaConf.is_interpolation(node, key):
        for inner in list(value) if isinstance(value, DictConfig) else range(len(value)):
            yield from _unresolved(value, inner, f"{path}.{inner}")
