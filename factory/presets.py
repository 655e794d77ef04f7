"""The preset files of the configuration tree: where they are, what they are called, and on which line a key stands.

A root is a folder with one sub-folder per group. The built-in root is the package ``mllm_factory.conf``; users add theirs with
``--config-dir`` or ``hydra.searchpath``. Nothing here needs Hydra or torch.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import util
from pathlib import Path

import yaml

from mllm_factory.errors import Problem

GROUPS = ("vision", "audio", "projector", "backbone", "tuning", "schedule", "data", "metrics", "experiment")
"""The groups that have presets to choose from, in the order of the tree."""

BUILT_IN = "pkg://mllm_factory.conf"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_COMMENT = re.compile(r"(?:^|\s)#\s*(.*)$")


@contextmanager
def fast_yaml() -> Iterator[None]:
    """OmegaConf derives its loader from ``yaml.SafeLoader``; libyaml's reads a tree in a third of the time."""
    slow = yaml.SafeLoader
    yaml.SafeLoader = _Loader
    try:
        yield
    finally:
        yaml.SafeLoader = slow


def folder(place: str) -> Path | None:
    """The folder that ``pkg://package``, ``file://folder`` or a plain path means; None where there is none."""
    if place.startswith("pkg://"):
        return _package(place.removeprefix("pkg://"))
    path = Path(place.removeprefix("file://")).expanduser().absolute()
    return path if path.is_dir() else None


@cache
def _package(name: str) -> Path | None:
    try:
        spec = util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec and spec.origin else None


def shown(file: Path) -> str:
    """A path for messages: ``conf/...`` for a built-in file, else relative to the current folder where it is inside."""
    built_in = folder(BUILT_IN)
    if built_in and file.is_relative_to(built_in):
        return str("conf" / file.relative_to(built_in))
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def names(group: str, roots: Iterable[Path]) -> list[str]:
    """The presets of a group, sorted."""
    return sorted({file.stem for root in roots for file in (root / group).glob("*.yaml")})


def is_group(name: str, roots: Iterable[Path]) -> bool:
    """True where a folder of that name exists in one of the roots."""
    return any((root / name).is_dir() for root in roots)


def locate(config: str, roots: Iterable[Path]) -> Path | None:
    """The file of a config such as ``vision/timm``: the first root that has it wins, as in Hydra."""
    return next((file for root in roots if (file := root / f"{config}.yaml").is_file()), None)


def files(root: Path) -> Iterator[Path]:
    """Every YAML file of a root: those at its top and in its sub-folders, hidden ones left out."""
    return (f for f in sorted(root.rglob("*.yaml")) if not any(p.startswith(".") for p in f.relative_to(root).parts))


def duplicates(roots: Sequence[Path]) -> list[Problem]:
    """A problem for every preset that two roots have: only the first would ever be read."""
    places: dict[Path, list[Path]] = defaultdict(list)
    for root in dict.fromkeys(roots):
        for file in files(root):
            places[file.relative_to(root)].append(file)
    return [
        Problem(f"'{name.with_suffix('')}' exists twice: {shown(both[0])} and {shown(both[1])}; rename one")
        for name, both in places.items()
        if len(both) > 1
    ]


def broken(roots: Iterable[Path]) -> list[Problem]:
    """A problem for every file that is no YAML, or has a key twice, with its line."""
    problems = []
    for file in (file for root in roots for file in files(root)):
        try:
            lines(file)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            problems.append(Problem(f"not YAML: {error.problem}", origin=f"{shown(file)}:{line}"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            problems.append(Problem(f"not YAML: {' '.join(str(error).split())}", origin=shown(file)))
    return problems


def lines(file: Path) -> dict[tuple[str, ...], int]:
    """The line of every key and list item of a file.

    Raises:
        yaml.YAMLError: the file is no YAML.
    """
    root = yaml.compose(file.read_text(encoding="utf-8"), Loader=_Loader)
    return dict(_walk(root, ())) if root is not None else {}


def _walk(node: yaml.Node, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key.value}' stands there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
            yield (*path, key.value), key.start_mark.line + 1
            yield from _walk(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield (*path, str(i)), item.start_mark.line + 1
            yield from _walk(item, (*path, str(i)))


def chooser(group: str, name: str, roots: Iterable[Path]) -> str:
    """The file and line whose defaults list chooses a preset; empty where none does."""
    entry = re.compile(rf"^\s*-\s*(override\s+)?/?{re.escape(group)}(@\S+)?:.*\b{re.escape(name)}\b")
    for file in (file for root in roots for file in files(root)):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if entry.match(line):
                return f"{shown(file)}:{number}"
    return ""


def comments(file: Path) -> dict[tuple[str, ...], str]:
    """The comment on the line of every key; empty where there is none."""
    text = file.read_text(encoding="utf-8").splitlines()
    found = {key: _COMMENT.search(text[line - 1]) for key, line in lines(file).items()}
    return {key: match.group(1).strip() if match else "" for key, match in found.items()}


def searchpath(file: Path) -> list[str]:
    """``hydra.searchpath`` of a primary config; empty where it has none or is no YAML."""
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
        return list(tree["hydra"]["searchpath"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return []


def about(file: Path) -> str:
    """The first comment line of a file that is no Hydra directive: what the preset is."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @package"):
            return line.lstrip("# ").strip()
    return ""
