"""Where a component comes from, read from its source: libraries, papers, what its options mean, and what is to be installed."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PAPER = re.compile(r"\b(\d{4}\.\d{4,5})\b")
PACKAGE = re.compile(r":\s+pkg://(\w+)")
_NEEDED = re.compile(r"([\w.-]+)[^;]*(?:;\s*extra\s*==\s*['\"]([\w-]+)['\"])?")
_ARGUMENT = re.compile(r"^    (\w+(?:, \w+)*): (.+(?:\n     +.+)*)", re.MULTILINE)
_OWN = {"mllm_factory", "torch", "numpy", "PIL", "yaml"}


class Origin(NamedTuple):
    """What a component's source shows: libraries it imports, commands that install those that are extra, arXiv numbers."""

    libraries: list[str]
    install: list[str]
    papers: list[str]


def origin_of(file: str) -> Origin:
    """The origin of a class by its file; siblings that the file imports from its own pack count as part of it."""
    if not file:
        return Origin([], [], [])
    files, libraries, doc = [Path(file)], set[str](), ""
    for path in files:  # grows while it is read
        tree = ast.parse(path.read_text(encoding="utf-8"))
        doc += ast.get_docstring(tree) or "" if path == files[0] else ""
        for module in _imported(tree):
            top, own = module.partition(".")[0], _sibling(path, module)
            if own is not None and own not in files:
                files.append(own)
            elif own is None and top not in _OWN and top not in sys.stdlib_module_names:
                libraries.add(top)
    return Origin(sorted(libraries), [c for name in sorted(libraries) for c in install(name)], PAPER.findall(doc))


def _imported(tree: ast.Module) -> Iterator[str]:
    """Modules that a source imports or looks for (``find_spec("...")``)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and "find_spec" in ast.unparse(node.func):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (
                f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("mllm_factory.")
            )


def _sibling(path: Path, module: str) -> Path | None:
    """The file of a module beside ``path``; what is named like a library but lies elsewhere is none."""
    stem = module.rpartition(".")[2]
    beside = path.with_name(f"{stem}.py")
    return beside if "." in module and beside.is_file() and module.split(".")[-2:-1] == [path.parent.name] else None


def install(package: str) -> list[str]:
    """The command that installs an importable package where mllm-factory does not bring it; empty where it does."""
    from importlib import metadata

    wanted = {"open_clip": "open-clip-torch"}.get(package, package).replace("_", "-").lower()
    for line in metadata.requires("mllm-factory") or ():
        found = _NEEDED.fullmatch(line)
        if found and found[1].replace("_", "-").lower() == wanted:
            return [f"pip install 'mllm-factory[{found[2]}]'"] if found[2] else []
    return [f"pip install {wanted}"]


def arguments(doc: str) -> dict[str, str]:
    """What the ``Args`` of a docstring say, by name."""
    section = doc.partition("\nArgs:\n")[2].partition("\n\n")[0]
    found = _ARGUMENT.findall(section)
    return {name: " ".join(text.split()) for names, text in found for name in names.split(", ")}
