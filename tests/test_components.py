"""The contracts of the kinds, held for every registered component: a new one is tested the moment it is registered."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from mllm_factory import Backbone, Encoder, Metric, MultimodalModel, Sample, Schedule, Source, Tuning, build
from mllm_factory import names as registered
from mllm_factory.interfaces import KINDS
from mllm_factory.registry import find, resolve
from mllm_factory.schema import of_class

CONF = Path(str(find_spec("mllm_factory.conf").origin)).parent  # type: ignore[union-attr]
GROUPS = {
    "vision": "Encoder",
    "audio": "Encoder",
    "projector": "Projector",
    "backbone": "Backbone",
    "tuning": "Tuning",
    "schedule": "Schedule",
    "metrics": "Metric",
    "data": "Source",
}
CHEAP: dict[str, dict[str, Any]] = {  # sizes that take milliseconds
    file.stem: yaml.safe_load(file.read_text()) for file in (Path(__file__).parent / "cheap").glob("*.yaml")
}
GIVEN = {"in_dim": 6, "out_dim": 10, "in_tokens": 4}
ALL = [(kind, name) for kind in KINDS for name in registered(kind)]
MODULES = [(kind, name) for kind, name in ALL if kind in ("Encoder", "Projector", "Backbone")]


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with a name, at any depth."""
    if isinstance(tree, dict):
        if isinstance(tree.get("name"), str):
            yield tree
        for value in tree.values():
            yield from nodes(value)


def presets(kind: str, name: str) -> list[dict[str, Any]]:
    """The nodes of that name in the presets of the kind's groups."""
    files = [file for group, of in GROUPS.items() if of == kind for file in sorted((CONF / group).glob("*.yaml"))]
    return [node for file in files for node in nodes(yaml.safe_load(file.read_text())) if node["name"] == name]


def made(kind: str, name: str, tmp_path: Path, seed: int = 0, cheap: bool = True) -> Any:
    """The component of the first preset that names an architecture, with random weights."""
    choices = [node for node in presets(kind, name) if node.get("architecture", "") is not None]
    node = {**choices[0], **(CHEAP.get(name, {}) if cheap else {})}
    node |= {"pretrained": None} if "pretrained" in node else {}
    node |= {"path": str(conversations(tmp_path))} if node.get("path") == "???" else {}
    torch.manual_seed(seed)
    return build(KINDS[kind], node, **(GIVEN if kind == "Projector" else {}))


def conversations(folder: Path) -> Path:
    turns = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]
    file = folder / "samples.json"
    file.write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(3)]))
    return file


def run(kind: str, part: Any) -> Tensor:
    """The part's output on random input of its kind."""
    generator = torch.Generator().manual_seed(1)
    if kind == "Encoder":
        return part(torch.cat([part.transform(item(part)), part.transform(item(part, 1))]))
    if kind == "Projector":
        return part(torch.randn(2, GIVEN["in_tokens"], GIVEN["in_dim"], generator=generator))
    ids = torch.randint(0, len(part.tokenizer), (2, 5), generator=generator)
    return part.logits(part(part.embed(ids)))


def item(encoder: Any, seed: int = 0) -> Any:
    """One raw media item of the encoder's modality."""
    random = np.random.default_rng(seed)
    if encoder.modality == "vision":
        return Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    return torch.from_numpy(random.standard_normal((1, 16000), dtype=np.float32)), 16000


# ---------------------------------------------------------------- every component


def test_there_is_something_to_test() -> None:
    assert {"timm", "mlp", "hf", "frozen", "full", "lora"} <= {name for _, name in ALL}
    assert {kind for kind, _ in ALL} == set(KINDS)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_it_has_a_preset_that_builds_and_a_docstring(kind: str, name: str, tmp_path: Path) -> None:
    assert presets(kind, name), f"no preset in conf/ is named {name}"
    assert isinstance(made(kind, name, tmp_path), KINDS[kind])
    assert len((resolve(KINDS[kind], name).__doc__ or "").split()) > 5


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_its_schema_read_from_source_is_that_of_the_class(kind: str, name: str) -> None:
    asleep, alive = find(kind, name), of_class(resolve(KINDS[kind], name))
    assert list(asleep.params.values()) == list(alive.params.values())
    assert (asleep.cls, asleep.module, asleep.doc, asleep.kind) == (alive.cls, alive.module, alive.doc, kind)
    assert not asleep.unsupported
    assert not alive.unsupported


# ---------------------------------------------------------------- modules


@pytest.mark.parametrize(("kind", "name"), MODULES)
def test_sizes_are_what_it_says(kind: str, name: str, tmp_path: Path) -> None:
    part = made(kind, name, tmp_path)
    shape = tuple(run(kind, part).shape)
    if kind == "Encoder":
        assert shape == (2, part.num_tokens, part.dim)
        assert part.modality in ("vision", "audio")
    elif kind == "Projector":
        assert shape == (2, part.num_tokens, GIVEN["out_dim"])
    else:
        assert shape[:2] == (2, 5)
        assert part.embed(torch.zeros(1, 1, dtype=torch.long)).shape == (1, 1, part.dim)
        assert part(torch.randn(2, 5, part.dim)).shape == (2, 5, part.dim)
        assert len(part.layers) > 0
        assert part.max_positions is None or part.max_positions > 0
        assert part.tokenizer.chat_template
        assert part.tokenizer.pad_token_id is not None


@pytest.mark.parametrize(("kind", "name"), MODULES)
def test_a_gradient_reaches_every_parameter(kind: str, name: str, tmp_path: Path) -> None:
    part = made(kind, name, tmp_path).train()
    assert all(p.requires_grad for p in part.parameters())
    run(kind, part).square().sum().backward()
    assert [n for n, p in part.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(("kind", "name"), MODULES)
def test_one_seed_gives_one_part(kind: str, name: str, tmp_path: Path) -> None:
    states = [made(kind, name, tmp_path, seed).state_dict() for seed in (3, 3, 4)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


@pytest.mark.parametrize(("kind", "name"), MODULES)
def test_its_state_makes_another_one_the_same(kind: str, name: str, tmp_path: Path) -> None:
    one, other = (made(kind, name, tmp_path, seed).eval() for seed in (0, 1))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(run(kind, one), run(kind, other))


@pytest.mark.parametrize(("kind", "name"), MODULES)
def test_it_is_built_on_the_meta_device_with_the_same_sizes(kind: str, name: str, tmp_path: Path) -> None:
    real = made(kind, name, tmp_path, cheap=False)
    with torch.device("meta"):
        empty = made(kind, name, tmp_path, cheap=False)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {k: p.shape for k, p in empty.named_parameters()} == {k: p.shape for k, p in real.named_parameters()}
    for size in ("dim", "num_tokens", "max_positions"):
        assert getattr(empty, size, None) == getattr(real, size, None)


@pytest.mark.parametrize("name", registered(Encoder))
def test_a_transform_is_deterministic_and_travels_to_workers(name: str, tmp_path: Path) -> None:
    encoder = made("Encoder", name, tmp_path)
    travelled = pickle.loads(pickle.dumps(encoder.transform))  # noqa: S301 - as a data loader does
    items = encoder.transform(item(encoder))
    assert items.shape[0] >= 1
    assert torch.equal(items, encoder.transform(item(encoder)))
    assert torch.equal(items, travelled(item(encoder)))


@pytest.mark.parametrize("name", registered(Backbone))
def test_a_backbone_does_not_look_ahead(name: str, tmp_path: Path) -> None:
    part = made("Backbone", name, tmp_path).eval()
    embeds = torch.randn(1, 6, part.dim)
    with torch.no_grad():
        torch.testing.assert_close(part(embeds)[:, :4], part(embeds[:, :4]))


# ---------------------------------------------------------------- strategies, data, numbers


@pytest.mark.parametrize("name", registered(Tuning))
@pytest.mark.parametrize("target", ["Backbone", "Projector"])
def test_a_strategy_only_inserts_and_marks(name: str, target: str, tmp_path: Path) -> None:
    part = made(target, "hf" if target == "Backbone" else "mlp", tmp_path)
    before = copy.deepcopy(part)
    node = {
        **presets("Tuning", name)[0],
        **({"targets": "all-linear"} if target == "Projector" and name == "lora" else {}),
    }
    torch.manual_seed(0)
    build(Tuning, node).apply(part, cast(MultimodalModel, None))
    assert len(list(part.buffers())) == len(list(before.buffers()))
    values = [p.clone() for p in part.parameters()]
    for parameter in before.parameters():
        assert any(torch.equal(parameter, value) for value in values if value.shape == parameter.shape)
    with torch.no_grad():
        torch.testing.assert_close(run(target, part.eval()), run(target, before.eval()))
    learning = {n: p for n, p in part.train().named_parameters() if p.requires_grad}
    if learning:
        run(target, part).square().sum().backward()
        assert [n for n, p in learning.items() if p.grad is None] == []


@pytest.mark.parametrize("name", registered(Source))
def test_a_source_gives_samples_and_travels_to_workers(name: str, tmp_path: Path) -> None:
    source = made("Source", name, tmp_path)
    assert source.modalities <= {"vision", "audio"}
    assert len(source) == 3
    travelled = pickle.loads(pickle.dumps(source))  # noqa: S301 - as a data loader does
    for i in range(len(source)):
        sample = source[i]
        assert isinstance(sample, Sample)
        assert sample == source[i] == travelled[i]
        assert sample.id
        assert sample.messages
        assert set(sample.media) <= source.modalities
    assert len({source[i].id for i in range(3)}) == 3


@pytest.mark.parametrize("name", registered(Metric))
def test_a_metric_says_what_it_needs(name: str, tmp_path: Path) -> None:
    metric = made("Metric", name, tmp_path)
    assert isinstance(metric.max_new_tokens, int)
    assert isinstance(metric.teacher_forced, bool)
    assert (metric.max_new_tokens > 0) != metric.teacher_forced


@pytest.mark.parametrize("name", registered(Schedule))
def test_a_schedule_starts_with_a_state_it_can_load(name: str, tmp_path: Path) -> None:
    schedule, other = made("Schedule", name, tmp_path), made("Schedule", name, tmp_path)
    other.load_state_dict(schedule.state_dict())
    assert schedule.state_dict() == other.state_dict()
