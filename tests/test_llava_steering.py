"""The LLaVA Steering suite (arXiv 2412.12359): every model in every stage is checked offline, with the counts of the paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllm_factory import run
from mllm_factory.config import Composer

COMPOSER = Composer("train", keep=True)
CONNECTOR = {"3b": 9_507_840, "7b": 20_979_712, "13b": 31_467_520}
TOKENS = {"3b": 729, "7b": 576, "13b": 576}
LLM = {"3b": 2_779_683_840, "7b": 6_738_415_616, "13b": 13_015_864_320}


def checked(folder: Path, *overrides: str) -> dict[str, Any]:
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "grey"}]
    file = folder / "data.json"
    file.write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": turns}]))
    composed = COMPOSER.compose([*overrides, f"data.train.path={file}"])
    assert composed.check() == []
    assert composed.tree is not None
    return run.check({**composed.tree, "trainer": {**composed.tree["trainer"], "batch_size": 1, "accumulate": 1}})


@pytest.mark.parametrize("size", CONNECTOR)
@pytest.mark.parametrize(
    ("tuning", "trained"),
    [
        ("projector_only", {"3b": 0, "7b": 0, "13b": 0}),
        ("mores", {"3b": 163_872, "7b": 262_176, "13b": 409_640}),
    ],
)
def test_counts_are_those_of_the_paper(tmp_path: Path, size: str, tuning: str, trained: dict[str, int]) -> None:
    found = checked(tmp_path, f"experiment=[llava_steering_{size},instruct]", f"tuning={tuning}")
    parts = found["parts"]
    assert parts["projector"] == {**parts["projector"], "total": CONNECTOR[size], "trainable": CONNECTOR[size]}
    assert parts["backbone"]["trainable"] == found["trainable_backbone"] == trained[size]
    assert parts["backbone"]["total"] == LLM[size] + trained[size]
    assert found["tokens"] == {"vision": TOKENS[size]}


@pytest.mark.parametrize(
    ("overrides", "trained"),
    [
        (["tuning=lora", "tuning.backbone.rank=128"], 188_743_680),
        (["tuning=lora", "tuning.backbone.rank=4"], 5_898_240),
        (["tuning=full", "schedule.lr=2e-5"], LLM["3b"]),
        (["tuning=mores", "tuning.backbone.rank=4"], 655_488),
    ],
)
def test_other_strategies_of_the_paper(tmp_path: Path, overrides: list[str], trained: int) -> None:
    found = checked(tmp_path, "experiment=[llava_steering_3b,instruct]", *overrides)
    assert found["trainable_backbone"] == trained


@pytest.mark.parametrize(("stage", "backbone"), [("pretrain", 0), ("instruct", 163_872), ("task", 163_872)])
def test_every_stage(tmp_path: Path, stage: str, backbone: int) -> None:
    steps = ["trainer.max_steps=100"] if stage == "task" else []
    found = checked(tmp_path, f"experiment=[llava_steering_3b,{stage}]", *steps)
    assert found["trainable_backbone"] == backbone
    assert found["trainable"] == CONNECTOR["3b"] + backbone
