"""``list`` and ``describe``: presets and components, read from YAML and Python sources without Hydra or torch."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mllm_factory import presets
from mllm_factory.errors import UserError, hint
from mllm_factory.flags import Parser, json_flag
from mllm_factory.provenance import PACKAGE, PAPER, arguments, install, origin_of
from mllm_factory.registry import find, index
from mllm_factory.schema import GIVEN, KIND_NAMES, Schema

GROUPS_OF = {
    **{"Encoder": ("vision", "audio"), "Projector": ("projector",), "Backbone": ("backbone",), "Tuning": ("tuning",)},
    **{"Schedule": ("schedule",), "Metric": ("metrics",), "Source": ("data",)},
}
"""Kind -> the groups whose presets name components of it."""

DESCRIBED = (*presets.GROUPS, "trainer")


def _roots(config_dir: str | None) -> list[Path]:
    roots = [presets.folder(presets.BUILT_IN), presets.folder(config_dir) if config_dir else None]
    if config_dir and roots[1] is None:
        raise UserError(f"there is no folder '{config_dir}' (from --config-dir)")
    return [root for root in roots if root is not None]


# ---------------------------------------------------------------- list


def list_(argv: Sequence[str]) -> int:
    """The verb ``list``: presets by group, or one group, or the registered names of a kind."""
    parser = json_flag(Parser())
    parser.add_argument("what", nargs="?")
    parser.add_argument("--components", action="store_true")
    parser.add_argument("--config-dir", "-cd")
    flags = parser.read(argv)
    roots = _roots(flags.config_dir)
    if flags.what is not None and flags.what not in (*presets.GROUPS, *KIND_NAMES):
        raise UserError(f"there is no group or kind '{flags.what}'{hint(flags.what, (*presets.GROUPS, *KIND_NAMES))}")
    groups = [flags.what] if flags.what in presets.GROUPS else [] if flags.what else presets.GROUPS
    kinds = [flags.what] if flags.what in KIND_NAMES else KIND_NAMES if flags.components else []
    table: dict[str, Any] = {group: presets.names(group, roots) for group in groups}
    components = {kind: sorted(index()[kind]) for kind in kinds}
    if flags.json:
        print(json.dumps(table | ({"components": components} if kinds else {}), indent=2))
        return 0
    for group, names in table.items():
        _print_table(group, [(name, presets.about(_file(group, name, roots))) for name in names])
    for kind, names in components.items():
        _print_table(kind, [(name, find(kind, name).doc.partition("\n")[0]) for name in names])
    return 0


def _file(group: str, name: str, roots: Sequence[Path]) -> Path:
    file = presets.locate(f"{group}/{name}", roots)
    if file is None:
        raise UserError(f"no {group} preset is named '{name}'{hint(name, presets.names(group, roots))}")
    return file


def _print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    print(title)
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows or [("(none)", "")]:
        print(f"  {name:{width}}  {text}".rstrip())
    print()


# ---------------------------------------------------------------- describe


def describe(argv: Sequence[str]) -> int:
    """The verb ``describe``: a component with its options, or a preset with the components it names."""
    parser = json_flag(Parser())
    parser.add_argument("what", nargs="*")
    parser.add_argument("--config-dir", "-cd")
    flags = parser.read(argv)
    if len(flags.what) != 2:
        raise UserError("describe takes a group or kind and a name, such as: describe projector mlp")
    what, name = flags.what
    roots = _roots(flags.config_dir)
    if what in KIND_NAMES:
        facts = _component(what, name, roots)
    elif what in DESCRIBED:
        facts = _preset(what, name, roots)
    else:
        raise UserError(f"there is no group or kind '{what}'{hint(what, (*DESCRIBED, *KIND_NAMES))}")
    print(json.dumps(facts, indent=2, default=str) if flags.json else _rendered(facts))
    return 0


def _component(kind: str, name: str, roots: Sequence[Path]) -> dict[str, Any]:
    schema = find(kind, name)
    place = index()[kind].get(name)
    users = _presets_naming(kind, name, roots)
    comments = {key[-1]: text for file in users.values() for key, text in presets.comments(file).items() if text}
    meanings = {**arguments(schema.doc), **{key: text for key, text in comments.items() if key in schema.params}}
    origin = origin_of(schema.file)
    return {
        "kind": kind,
        "name": name,
        "class": f"{schema.module}:{schema.cls}",
        "pack": place.pack if place else None,
        "doc": schema.doc,
        "libraries": origin.libraries,
        "install": origin.install,
        "papers": sorted({*origin.papers, *PAPER.findall(schema.doc)}),
        "options": _options(schema, GIVEN.get(kind, ()), meanings),
        "given": [given for given in GIVEN.get(kind, ()) if given in schema.params],
        "presets": sorted(users),
        "about": {label: presets.about(users[label]) for label in sorted(users)},
    }


def _options(schema: Schema, given: Sequence[str], comments: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "name": param.name,
            "type": param.annotation,
            "required": param.required,
            "default": None if param.required else param.default,
            "about": comments.get(param.name, ""),
        }
        for param in schema.params.values()
        if param.name not in given
    ]


def _presets_naming(kind: str, name: str, roots: Sequence[Path]) -> dict[str, Path]:
    """``group=preset`` -> file of the presets that name a component."""
    files = {f"{group}={p}": _file(group, p, roots) for group in GROUPS_OF[kind] for p in presets.names(group, roots)}
    return {label: file for label, file in files.items() if name in _named(_load(file))}


def _load(file: Path) -> Any:
    try:
        with presets.fast_yaml():
            return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{presets.shown(file)} is not YAML: {' '.join(str(error).split())}") from error


def _named(node: Any) -> set[str]:
    """The component names in a preset, at any depth."""
    if isinstance(node, list):
        return {name for item in node for name in _named(item)}
    if not isinstance(node, dict):
        return set()
    own = {node["name"]} if isinstance(node.get("name"), str) else set()
    return own | {name for value in node.values() for name in _named(value)}


def _preset(group: str, name: str, roots: Sequence[Path]) -> dict[str, Any]:
    file = _file(group, name, roots)
    kinds = [kind for kind, groups in GROUPS_OF.items() if group in groups]
    text = file.read_text(encoding="utf-8")
    named = sorted(_named(_load(file))) if kinds else []
    return {
        "group": group,
        "name": name,
        "about": presets.about(file),
        "file": presets.shown(file),
        "yaml": text,
        "components": [{"kind": kind, "name": part} for kind in kinds for part in named if part in index()[kind]],
        "papers": sorted(set(PAPER.findall(text))),
        "install": [command for package in PACKAGE.findall(text) for command in install(package)],
    }


def _rendered(facts: dict[str, Any]) -> str:
    if "yaml" in facts:
        more = [f"mllm-factory describe {part['kind']} {part['name']}" for part in facts["components"]]
        more += [f"install: {command}" for command in facts["install"]]
        more += [f"paper: https://arxiv.org/abs/{paper}" for paper in facts["papers"]]
        return "\n".join([facts["file"], "", facts["yaml"].rstrip(), *(["", *more] if more else [])])
    lines = [
        f"{facts['kind']} {facts['name']}  ({facts['class']}, pack {facts['pack'] or 'none'})",
        "",
        facts["doc"],
        "",
        *([f"libraries: {', '.join(facts['libraries'])}"] if facts["libraries"] else []),
        *(f"install: {command}" for command in facts["install"]),
        *(
            [f"papers: {', '.join(f'https://arxiv.org/abs/{paper}' for paper in facts['papers'])}"]
            if facts["papers"]
            else []
        ),
    ]
    lines.append("options:" if facts["options"] else "options: none")
    for option in facts["options"]:
        default = "required" if option["required"] else f"= {option['default']!r}"
        lines.append(f"  {option['name']}: {option['type']}  {default}")
        lines += textwrap.wrap(option["about"], 110, initial_indent="      ", subsequent_indent="      ")
    if facts["given"]:
        lines.append(f"given by the engine: {', '.join(facts['given'])}")
    lines.append("presets:" if facts["presets"] else "presets: none")
    return "\n".join([*lines, *(f"  {label:34}  {about}".rstrip() for label, about in facts["about"].items())])


def complete(verb: str, words: Sequence[str], current: str) -> list[str]:
    """The words that can follow ``list`` or ``describe``."""
    roots = _roots(None)
    groups = DESCRIBED if verb == "describe" else presets.GROUPS
    known: Sequence[str] = (*groups, *KIND_NAMES) if not words else ()
    if verb == "describe" and len(words) == 1:
        known = sorted(index()[words[0]]) if words[0] in KIND_NAMES else presets.names(words[0], roots)
    return [f"{word} " for word in known if word.startswith(current)]
