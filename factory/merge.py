"""A tree's files in Hydra's order, merged without Hydra's own node, which takes two thirds of the time of a composition.

Which files, in which order and where they go is Hydra's answer (``compute_defaults_list``); merging is OmegaConf's. What
needs the ``hydra`` node is composed by Hydra in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.config_loader import ConfigLoader
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from mllm_factory import presets


class Source(NamedTuple):
    """A file of the tree, and the node it is merged into; an empty package is the root."""

    file: Path
    package: str


class Listing(NamedTuple):
    """The files of a tree in the order of merging, whether that is all of it, and the chosen preset of every group."""

    sources: list[Source]
    complete: bool
    choices: Mapping[str, Any]


def listing(
    loader: ConfigLoader, name: str, lines: Sequence[str], roots: Sequence[Path], stored: Mapping[str, Path]
) -> Listing:
    """Hydra's defaults list without Hydra's own configs.

    Args:
        loader: knows the search path.
        name: primary config.
        lines: overrides that choose presets.
        roots: folders of presets.
        stored: primary configs outside of them, and the file of each.

    Raises:
        HydraException: the list cannot be made.
    """
    found = loader.compute_defaults_list(name, list(lines), RunMode.RUN)
    sources, complete = [], True
    for default in found.defaults:
        config = str(default.config_path)
        file = stored.get(config) or presets.locate(config, roots)
        if file is not None:
            sources.append(Source(file, (default.package or "").removeprefix("_global_").strip(".")))
        complete = complete and (config.startswith("hydra/") or (file is not None and config not in stored))
    return Listing(sources, complete, found.overrides.known_choices)


def merge(sources: Sequence[Source]) -> DictConfig:
    """The tree that the files make, closed to new keys, as Hydra closes it.

    Raises:
        OmegaConfBaseException, YAMLError: a file is none, or does not go with those before it.
    """
    tree = OmegaConf.create()
    for file, package in sources:
        node: DictConfig | ListConfig = OmegaConf.load(file)
        if isinstance(node, DictConfig) and OmegaConf.is_list(node.get("defaults")):
            del node["defaults"]
        if package:
            wrapped = OmegaConf.create()
            OmegaConf.update(wrapped, package, node, merge=False)
            node = wrapped
        tree.merge_with(node)
    OmegaConf.set_struct(tree, True)
    return tree
