"""The YAML tree: complete, commented, and composing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_factory.config import compose
from mllm_factory.data import Collator
from mllm_factory.registry import find, schema_of
from mllm_factory.schema import GIVEN, child_kind
from mllm_factory.trainer import Trainer

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
PRESETS = sorted(CONF.glob("*/*.yaml"))
KIND_OF = {
    "vision": "Encoder",
    "audio": "Encoder",
    "projector": "Projector",
    "backbone": "Backbone",
    "schedule": "Schedule",
    "metrics": "Metric",
}
COLLATOR_GIVEN = {"template", "pad_id", "encoders", "tokens"}
OFFERED = [file for file in PRESETS if file.parent.name != "experiment"]


def complete(kind: str, node: dict[str, Any], place: str) -> Iterator[str]:
    """What a component's node lacks or has too much, nested nodes included."""
    schema = find(kind, node["name"])
    options = set(schema.params) - set(GIVEN.get(kind, ()))
    if options != set(node) - {"name"}:
        yield f"{place}: {sorted(options ^ (set(node) - {'name'}))}"
    for name in options & set(node):
        child = child_kind(schema.params[name].annotation)
        if child is None or node[name] is None:
            continue
        form, below = child[0], node[name]
        inner = {"": below} if form == "one" else below if form == "dict" else dict(enumerate(below))
        for key, part in inner.items():
            yield from complete(child[1], part, f"{place}.{name}.{key}".rstrip("."))


def engine_options(cls: type, node: dict[str, Any], given: set[str], place: str) -> Iterator[str]:
    options = set(schema_of(cls).params) - given
    if options != set(node):
        yield f"{place}: {sorted(options ^ set(node))}"


def test_there_are_presets() -> None:
    assert len(PRESETS) >= 15


@pytest.mark.parametrize("file", OFFERED, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_a_preset_lists_every_option_of_its_class(file: Path) -> None:
    group, node = file.parent.name, yaml.safe_load(file.read_text(encoding="utf-8"))
    place = f"{group}/{file.stem}"
    if group == "trainer":
        faults = [*engine_options(Trainer, node, set(), place)]
    elif group == "data":
        sources = [node.pop("train"), node.pop("eval")]
        faults = [fault for source in sources for fault in complete("Source", source, place)]
        faults += engine_options(Collator, node, COLLATOR_GIVEN, place)
    elif group == "tuning":
        faults = [f for part, strategy in node.items() for f in complete("Tuning", strategy, f"{place}.{part}")]
        assert set(node) == {"vision", "audio", "projector", "backbone"}
    elif "name" not in node:  # made of other presets
        faults = [name for name in node["defaults"] if not (file.parent / f"{name}.yaml").exists()]
    else:
        faults = [*complete(KIND_OF[group], node, place)]
    assert faults == []


@pytest.mark.parametrize("file", OFFERED, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_a_preset_says_what_it_is_and_comments_every_option(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("# ") and "@package" not in line for line in lines)
    bare = []
    for number, line in enumerate(lines):
        option = re.match(r"( *)([\w-]+): *(\S.*)?$", line)
        if not option or option[2] == "name" or " # " in line:
            continue
        parents = [p for p in lines[:number] if re.match(r" *[\w-]+:", p) and _indent(p) < _indent(line)]
        explained = parents and "#" in parents[-1]  # a mapping of alike values is explained at its head
        heads_nodes = option[3] is None and lines[number + 1].strip().startswith("name:")
        if not explained and not heads_nodes:
            bare.append(line)
    assert bare == []


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


@pytest.mark.parametrize("file", PRESETS, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_every_preset_composes_and_checks(file: Path) -> None:
    group = file.parent.name
    choice = f"{group}=[{file.stem}]" if group == "metrics" else f"{group}={file.stem}"
    composed = compose("train", [choice])
    missing = [p for p in composed.check() if "needs a value" not in p.message]
    assert composed.tree is not None
    assert missing == []


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_every_root_key_has_a_comment(name: str) -> None:
    lines = (CONF / f"{name}.yaml").read_text(encoding="utf-8").partition("\nhydra:")[0].splitlines()
    options = [line for line in lines if re.match(r"(  - \w+|\w+): \S", line)]
    assert options
    assert [line for line in options if "#" not in line] == []


def test_the_primary_is_first_and_the_experiment_last() -> None:
    defaults = yaml.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))["defaults"]
    assert defaults[0] == "_self_"
    own = [entry for entry in defaults[1:] if not next(iter(entry)).startswith("override ")]  # Hydra wants those last
    assert list(own[-1]) == ["experiment"]


def test_an_experiment_beats_the_primary_and_an_override_beats_the_experiment(
    tree: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nseed: 7\ntrainer:\n  max_steps: 40\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text, encoding="utf-8")
    mine = compose("train", ["experiment=mine"], [str(tmp_path)]).tree
    assert mine is not None
    assert (mine["seed"], mine["trainer"]["max_steps"]) == (7, 40)
    over = compose("train", ["experiment=mine", "seed=9"], [str(tmp_path)]).tree
    assert over is not None
    assert (over["seed"], over["trainer"]["max_steps"]) == (9, 40)


def installed(path: Path) -> Path:
    """Where a file or folder of the repository is imported from."""
    if path.parts[:2] == ("factory", "hydra_plugins"):
        return Path(*path.parts[1:])
    return Path("mllm_factory", *(path.parts[1:] if path.parts[0] == "factory" else path.parts))


def test_the_distribution_has_every_folder_and_every_preset_file() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {
        f.parent.relative_to(ROOT)
        for top in ("factory", "components", "conf")
        for f in (ROOT / top).rglob("__init__.py")
    }
    names = {".".join(installed(f).parts) for f in folders} | {
        "hydra_plugins"
    }  # a namespace: it has no file of its own
    assert set(tool["packages"]) == names
    assert "**/*.yaml" in tool["package-data"]["mllm_factory.conf"]


def test_no_config_calls_code() -> None:
    for file in CONF.rglob("*.yaml"):
        assert "_target_" not in file.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_preset(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("factory", "components", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        installed(file.relative_to(ROOT)).as_posix()
        for top in ("factory", "components", "conf")
        for file in (ROOT / top).rglob("*")
        if file.suffix in (".py", ".yaml", ".typed")
    }
    assert inside == wanted | {"mllm_factory/py.typed"}
