"""Where each key of a composed tree was set: an override, or a line of a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from hydra.core.override_parser.types import Override

from mllm_factory import presets
from mllm_factory.merge import Source
from mllm_factory.overrides import origin


class Origins:
    """Answers for one composition. The files are only read when the first question comes."""

    def __init__(self, sources: Sequence[Source], values: Sequence[Override]) -> None:
        """``sources`` in the order of merging, ``values`` in the order of the command line."""
        self.sources, self.values = list(sources), list(values)

    def of(self, key: str) -> str:
        """The override or file and line that set ``key``, or else the nearest key above it, last; empty if nothing did."""
        path = tuple(key.split("."))
        for override in reversed(self.values):
            if _sets(override, path):
                return origin(override)
        for length in range(len(path), 0, -1):
            for file, package, lines in reversed(self._files):
                below = path[:length]
                if below == package:
                    return f"{presets.shown(file)}:{min(lines.values(), default=1)}"
                if below[: len(package)] == package and below[len(package) :] in lines:
                    return f"{presets.shown(file)}:{lines[below[len(package) :]]}"
        return ""

    @cached_property
    def _files(self) -> list[tuple[Path, tuple[str, ...], dict[tuple[str, ...], int]]]:
        """(file, package, line of each key), in the order of merging."""
        return [(file, tuple(filter(None, package.split("."))), presets.lines(file)) for file, package in self.sources]


def _sets(override: Override, path: tuple[str, ...]) -> bool:
    """True where an override sets a key or what is around it; a mapping is merged, so it sets only what it names."""
    target, value = tuple(override.key_or_group.split(".")), override.value()
    if path[: len(target)] != target:
        return False
    for part in path[len(target) :]:
        if not isinstance(value, dict):
            break
        if part not in value:
            return False
        value = value[part]
    return True
