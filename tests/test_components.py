"""The contracts of the kinds, held for every registered component and every preset: a new one is tested when it appears."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mllm_factory import build
from mllm_factory import names as registered
from mllm_factory.interfaces import KINDS
from mllm_factory.registry import find, resolve
from mllm_factory.schema import of_class
from mllm_factory.testing import SIZES, check_component
from mllm_factory.weightless import weightless

CONF = Path(str(find_spec("mllm_factory.conf").origin)).parent  # type: ignore[union-attr]
GROUPS = {
    **{"vision": "Encoder", "audio": "Encoder", "projector": "Projector", "backbone": "Backbone", "tuning": "Tuning"},
    **{"schedule": "Schedule", "metrics": "Metric", "data": "Source"},
}
CHEAP: dict[str, dict[str, Any]] = {  # sizes that take milliseconds
    file.stem: yaml.safe_load(file.read_text()) for file in (Path(__file__).parent / "cheap").glob("*.yaml")
}
ALL = [(kind, name) for kind in KINDS for name in registered(kind)]
MODULES = ("Encoder", "Projector", "Backbone")
LARGE = 1_500_000
"""Parameters above which a preset is built on the meta device only."""


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with a name, at any depth."""
    if isinstance(tree, dict):
        if isinstance(tree.get("name"), str):
            yield tree
        for value in tree.values():
            yield from nodes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from nodes(value)


def files_of(kind: str) -> list[Path]:
    return [file for group, of in GROUPS.items() if of == kind for file in sorted((CONF / group).glob("*.yaml"))]


def presets(kind: str, name: str) -> list[dict[str, Any]]:
    """The nodes of that name in the presets of the kind's groups."""
    return [node for file in files_of(kind) for node in nodes(yaml.safe_load(file.read_text())) if node["name"] == name]


def offline(node: Any, tmp_path: Path) -> Any:
    """The node with random weights and files that are there."""
    if isinstance(node, list):
        return [offline(value, tmp_path) for value in node]
    if not isinstance(node, dict):
        return node
    changed = {key: offline(value, tmp_path) for key, value in node.items()}
    changed |= {"pretrained": None} if "pretrained" in node else {}
    option, made = FILES.get(node.get("name", ""), ("", None))
    return changed | ({option: str(made(tmp_path))} if made is not None and not Path(node[option]).exists() else {})


def cheap(kind: str, name: str, tmp_path: Path) -> dict[str, Any]:
    """The first preset that names an architecture, made small."""
    choices = [node for node in presets(kind, name) if node.get("architecture", "") is not None]
    changes = {key: value for key, value in CHEAP.get(name, {}).items() if key not in SIZES}
    return offline({**choices[0], **changes}, tmp_path)


def conversations(folder: Path) -> Path:
    turns = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]
    file = folder / "samples.json"
    file.write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(3)]))
    return file


def shard(folder: Path) -> Path:
    with tarfile.open(folder / "samples.tar", "w") as tar:
        for i in range(3):
            info = tarfile.TarInfo(f"{i}.txt")
            info.size = 2
            tar.addfile(info, io.BytesIO(b"so"))
    return folder / "samples.tar"


def rows(folder: Path) -> Path:
    import datasets

    turns = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]
    datasets.Dataset.from_list([{"conversations": turns, "image": None}] * 3).save_to_disk(str(folder / "rows"))
    return folder / "rows"


FILES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "llava_json": ("path", conversations),
    "webdataset": ("shards", shard),
    "hf_dataset": ("path", rows),
}
"""What sources read, and the option that names it."""


def given(name: str) -> dict[str, int]:
    """Sizes that only some projectors fit, from the same file."""
    return {key: value for key, value in CHEAP.get(name, {}).items() if key in SIZES}


# ---------------------------------------------------------------- every component


def test_there_is_something_to_test() -> None:
    assert {"timm", "mlp", "hf", "frozen", "full", "lora"} <= {name for _, name in ALL}
    assert {kind for kind, _ in ALL} == set(KINDS)
    assert set(CHEAP) <= {name for _, name in ALL}, "tests/cheap has a file for no component"


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_it_has_a_preset_and_a_docstring(kind: str, name: str) -> None:
    assert presets(kind, name), f"no preset in conf/ is named {name}"
    assert len((resolve(KINDS[kind], name).__doc__ or "").split()) > 5


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_its_schema_read_from_source_is_that_of_the_class(kind: str, name: str) -> None:
    asleep, alive = find(kind, name), of_class(resolve(KINDS[kind], name))
    assert list(asleep.params.values()) == list(alive.params.values())
    assert (asleep.cls, asleep.module, asleep.doc, asleep.kind) == (alive.cls, alive.module, alive.doc, kind)
    assert not asleep.unsupported
    assert not alive.unsupported


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_it_keeps_the_contract_of_its_kind(kind: str, name: str, tmp_path: Path) -> None:
    check_component(kind, cheap(kind, name, tmp_path), given=given(name))


# ---------------------------------------------------------------- every preset of encoders and backbones


WEIGHTED = [(kind, file) for kind in ("Encoder", "Backbone") for file in files_of(kind)]


@pytest.mark.parametrize(
    ("kind", "file"), WEIGHTED, ids=lambda v: f"{v.parent.name}/{v.stem}" if isinstance(v, Path) else v
)
def test_a_preset_keeps_it_too_or_builds_on_the_meta_device(kind: str, file: Path, tmp_path: Path) -> None:
    node = yaml.safe_load(file.read_text())
    if "???" in node.values():
        pytest.skip("the user names the model")
    with weightless():
        part = build(KINDS[kind], node)  # with its source: packages are looked up, the hub is not asked
    assert {p.device.type for p in part.parameters()} == {"meta"}
    if kind == "Encoder":
        assert part.dim > 0
        assert part.num_tokens > 0
        with torch.no_grad():
            items = torch.empty(2, *_item_shape(part), device="meta")
            assert tuple(part.eval()(items).shape) == (2, part.num_tokens, part.dim)
    if sum(p.numel() for p in part.parameters()) <= LARGE and CHEAP.get(node["name"]) is not None:
        check_component(kind, offline(node, tmp_path))


def _item_shape(encoder: Any) -> tuple[int, ...]:
    from mllm_factory.testing import raw_item

    return tuple(encoder.transform(raw_item(encoder)).shape[1:])
