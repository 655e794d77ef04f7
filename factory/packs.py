"""Installed packs of components, read from their sources: which names they register, without importing torch.

A pack is a module or package behind an entry point of the group ``mllm_factory.components``. A class counts where
``@register("name")`` stands above it at the top level of a file; a pack that registers in another way is imported instead.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module, util
from pathlib import Path
from typing import NamedTuple

from mllm_factory.errors import ConfigError
from mllm_factory.schema import Schema, kind_among, of_source

GROUP = "mllm_factory.components"
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_CLASS = re.compile(r"^class (\w+)\s*(?:\[[^\]]*\])?\s*\(([^)]*)\)\s*:", re.MULTILINE)
_REGISTERED = re.compile(
    r"""^@(?:\w+\.)*register\(\s*["']([^"']+)["']\s*\)[^\n]*\n(?:[@#][^\n]*\n)*class (\w+)""", re.MULTILINE
)
_ANY_REGISTER = re.compile(r"^\s*(?:@|\w+ *= *)?(?:[a-z_]\w*\.)*register\(", re.MULTILINE)  # not a class's method


class Place(NamedTuple):
    """Where a registered class stands: its pack's entry point, module, source file and class name."""

    pack: str
    module: str
    file: str
    cls: str


class Header(NamedTuple):
    """A class statement: where it is and its bases as written."""

    module: str
    file: str
    bases: tuple[str, ...]


class Scan(NamedTuple):
    """What the source of a pack shows; ``unclear`` lists the modules that must be imported to know what they register."""

    found: list[tuple[str, str, Place]]
    unclear: list[str]
    classes: dict[str, list[Header]]


class Pack(NamedTuple):
    """An entry point of the group: its name, and the module that registers when imported."""

    name: str
    module: str


@cache
def packs() -> list[Pack]:
    """The installed packs, by name."""
    return sorted(entry_points(GROUP))


def entry_points(group: str) -> list[Pack]:
    """The entry points of a group: what ``importlib.metadata`` finds, without the 50 ms its own imports take.

    Distributions are the ``*.dist-info`` and ``*.egg-info`` folders on ``sys.path``; of one name the first counts.
    """
    found: dict[str, list[Pack]] = {}
    for folder in map(Path, dict.fromkeys(sys.path)):
        for info in [*folder.glob("*.dist-info"), *folder.glob("*.egg-info")]:
            distribution = re.sub(r"[-_.]+", "_", info.stem.partition("-")[0]).lower()
            file = info / "entry_points.txt"
            if distribution not in found:
                found[distribution] = list(_section(file.read_text(encoding="utf-8"), group)) if file.is_file() else []
    return [pack for group_of_one in found.values() for pack in group_of_one]


def _section(text: str, group: str) -> Iterator[Pack]:
    inside = False
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            inside = line == f"[{group}]"
        elif inside and "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            yield Pack(name.strip(), value.partition("[")[0].partition(":")[0].strip())


@cache
def load_packs() -> None:
    """Import every installed pack, so that its classes register.

    Raises:
        ConfigError: a pack cannot be imported; the message names it.
    """
    for pack in packs():
        try:
            import_module(pack.module)
        except Exception as error:
            raise _broken(pack, f"{type(error).__name__}: {error}") from error


def _broken(pack: Pack, reason: str) -> ConfigError:
    reason = " ".join(reason.split())
    return ConfigError(
        f"the component pack '{pack.name}' ({pack.module}) cannot be imported: {reason}; repair or uninstall it"
    )


@cache
def scan(pack: Pack) -> Scan:
    """(kind, name, place) of every registered class of a pack.

    Raises:
        ConfigError: the pack is not there.
    """
    texts = [(module, file, Path(file).read_text(encoding="utf-8")) for module, file in _sources(pack)]
    classes: dict[str, list[Header]] = defaultdict(list)
    for module, file, text in texts:
        for cls, bases in _CLASS.findall(text):
            classes[cls].append(Header(module, file, tuple(base.strip() for base in bases.split(","))))
    result = Scan([], [], classes)
    for module, file, text in texts:
        found = [(_kind(classes, cls, file), name, cls) for name, cls in _REGISTERED.findall(text)]
        if len(found) != len(_ANY_REGISTER.findall(text)) or any(kind is None for kind, _, _ in found):
            result.unclear.append(module)
        else:
            result.found.extend((str(kind), name, Place(pack.name, module, file, cls)) for kind, name, cls in found)
    return result


def _kind(classes: dict[str, list[Header]], cls: str, file: str, depth: int = 8) -> str | None:
    header = _header(classes, cls, file)
    if header is None or depth == 0:
        return None
    kind = kind_among(header.bases)
    if kind is not None:
        return kind
    kinds = {_kind(classes, base.rpartition(".")[2], header.file, depth - 1) for base in header.bases} - {None}
    return kinds.pop() if len(kinds) == 1 else None


def _header(classes: dict[str, list[Header]], cls: str, file: str) -> Header | None:
    """The statement that a class name means in a file: its own, or the only one in the pack."""
    headers = classes.get(cls, [])
    here = [header for header in headers if header.file == file]
    return here[0] if here else headers[0] if len(headers) == 1 else None


def source_schema(place: Place) -> Schema | None:
    """The schema of a registered class, options of its bases in the same pack included; None where sources do not show it."""
    pack = next(pack for pack in packs() if pack.name == place.pack)
    if not place.file.endswith(".py"):
        return None
    first = schema = of_source(place.file, place.module, place.cls)
    while schema is not None and not schema.complete:
        base = schema.bases[0].rpartition(".")[2] if len(schema.bases) == 1 else ""
        header = _header(scan(pack).classes, base, schema.file)
        schema = of_source(header.file, header.module, base) if header else None
    if first is None or schema is None:
        return None
    return replace(first, params=schema.params, unsupported=schema.unsupported, own_init=True)


def path_schema(kind: str, path: str) -> Schema | None:
    """The schema of ``package.module:Class``; None where its source does not show that it is of the kind, or all its options.

    Raises:
        ConfigError: there is no such module, or it cannot be read.
    """
    module, _, cls = path.partition(":")
    if not _PATH.fullmatch(path):
        raise ConfigError(f"{kind} '{path}': the path of a class is written package.module:Class")
    try:
        spec = util.find_spec(module)
        found = of_source(spec.origin, module, cls) if spec and spec.origin and spec.origin.endswith(".py") else None
    except SyntaxError as error:
        raise ConfigError(f"{kind} '{path}': {error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{kind} '{path}' cannot be imported: {reason}; is it installed, or in the current folder?"
        ) from error
    if spec is None:
        raise ConfigError(f"{kind} '{path}': no module named '{module}'; is it installed, or in the current folder?")
    return found if found is not None and found.kind == kind and found.complete else None


def _sources(pack: Pack) -> list[tuple[str, str]]:
    try:
        spec = util.find_spec(pack.module)
    except Exception as error:
        raise _broken(pack, f"{type(error).__name__}: {error}") from error
    if spec is None or spec.origin is None:
        raise _broken(pack, f"there is no module '{pack.module}'")
    root = Path(spec.origin)
    if root.name != "__init__.py":
        return [(pack.module, spec.origin)]
    return [
        (_module_name(pack.module, file.relative_to(root.parent)), str(file))
        for file in sorted(root.parent.rglob("*.py"))
    ]


def _module_name(package: str, file: Path) -> str:
    parts = [*file.parts[:-1], *([] if file.stem == "__init__" else [file.stem])]
    return ".".join([package, *parts])
