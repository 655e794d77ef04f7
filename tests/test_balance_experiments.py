"""The paper's compositions, checked offline against published sizes; and the toy task of commit_tiny."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from mllm_factory import run
from mllm_factory.components.sources.toy_balance import ToyBalance
from mllm_factory.config import compose
from mllm_factory.errors import ConfigError

EVAL = {"aokvqa": "val", "iconqa": "val", "textvqa": "val", "clothoaqa": "test", "macs": "test", "sdd": "test"}
"""Data preset -> its evaluation file."""
SOUNDS = {"clothoaqa", "macs", "sdd"}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every data set with two samples in the documented layout, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name, judged in EVAL.items():
        folder = tmp_path / "data" / name
        (folder / "media").mkdir(parents=True)
        field, file = ("audio", "media/1.wav") if name in SOUNDS else ("image", "media/1.jpg")
        if name in SOUNDS:
            soundfile.write(folder / file, np.zeros(16000), 16000)
        else:
            Image.new("RGB", (40, 30)).save(folder / file)
        mark = f"<{field}>"
        turns = [{"from": "human", "value": f"{mark}\nWhat is it?"}, {"from": "gpt", "value": "a test"}]
        entries = [{"id": str(i), field: file, "conversations": turns} for i in range(2)]
        for split in ("train", judged):
            (folder / f"{split}.json").write_text(json.dumps(entries))
    return tmp_path


def checked(*overrides: str) -> dict[str, Any]:
    composed = compose("train", list(overrides))
    problems = composed.check()
    if problems or composed.tree is None:
        raise ConfigError(problems)
    return run.check(composed.tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokens", "totals"),
    [
        # 986 M without the last block and the head; 2.65 B; 32 queries
        (
            "blip2_like",
            {"vision": 32},
            {"vision": (0.96e9, 1.0e9), "backbone": (2.6e9, 2.8e9), "projector": (1.0e8, 1.1e8)},
        ),
        (
            "llava_1_5_like",
            {"vision": 576},
            {"vision": (2.8e8, 3.1e8), "backbone": (6.7e9, 6.8e9), "projector": (2.09e7, 2.11e7)},
        ),
        (
            "internvl2_like",
            {"vision": 256},
            {"vision": (3.0e8, 3.1e8), "backbone": (3.8e9, 3.9e9), "projector": (2.0e7, 2.4e7)},
        ),
        (
            "salmonn_like",
            {"audio": 88},
            {"audio": (6.3e8, 6.4e8), "backbone": (6.7e9, 6.8e9), "audio_projector": (1.5e7, 3.0e7)},
        ),
    ],
)
def test_a_composition_of_the_paper_checks_offline(
    data: Path, name: str, tokens: dict[str, int], totals: dict[str, tuple[float, float]]
) -> None:
    found = checked(f"experiment={name}", "schedule=commit")
    assert found["tokens"] == tokens
    parts = found["parts"]
    for part, (least, most) in totals.items():
        assert least <= parts[part]["total"] <= most, (part, parts[part])
    learns = {part for part in parts if parts[part]["trainable"]}
    projector = "audio_projector" if "audio" in tokens else "projector"
    assert learns == {projector, "backbone"}
    assert parts[projector]["trainable"] == parts[projector]["total"]
    assert 0 < found["trainable_backbone"] < 0.02 * parts["backbone"]["total"]


@pytest.mark.parametrize("name", EVAL)
def test_a_data_preset_reads_the_documented_layout(data: Path, name: str) -> None:
    from mllm_factory.assemble import build_source

    tree = compose("train", [f"data={name}"]).tree
    assert tree is not None
    modality = "audio" if name in SOUNDS else "vision"
    for key in ("train", "eval"):
        source = build_source(tree, key, {modality})
        assert len(source) == 2
        assert source.modalities == {modality}
        assert Path(source[1].media[modality][0]).is_file()


# ---------------------------------------------------------------- the toy task


def patches(picture: Image.Image) -> np.ndarray:
    """[4, 4, 4, 3] in reading order."""
    pixels = np.asarray(picture, np.float64)
    return np.stack([pixels[4 * r : 4 * r + 4, 4 * c : 4 * c + 4] for r in range(2) for c in range(2)])


@pytest.mark.parametrize(("stage", "asked"), [("pretrain", (0, 1)), ("adapt", (1, 2))])
def test_the_answer_can_be_read_off_the_named_patch_alone(stage: str, asked: tuple[int, int]) -> None:
    source = ToyBalance(stage, n=200, values=6, noise=0.0)
    shown = []
    for sample in [source[i] for i in range(200)]:
        place = ["nw", "ne", "sw", "se"].index(sample.messages[0].text.removeprefix("<image>"))
        seen = (patches(sample.media["vision"][0])[place] - 128) / 40
        combinations = [(a, b, c) for a in range(6) for b in range(6) for c in range(6)]
        drawn = [sum(source.patterns[i, v] for i, v in enumerate(abc)) / np.sqrt(3) for abc in combinations]
        best = combinations[int(np.argmin([np.abs(seen - p).sum() for p in drawn]))]
        assert sample.messages[1].text == "".join(source.letters[best[i]] for i in asked)
        shown.append(best)
    assert len(set(shown)) > 100


def test_the_stages_differ_in_rendering_vocabulary_and_attribute_and_splits_in_samples() -> None:
    one, other = ToyBalance("pretrain", n=3), ToyBalance("adapt", n=3)
    correlation = np.corrcoef(one.patterns.ravel(), other.patterns.ravel())[0, 1]
    assert correlation == pytest.approx(0.6 / np.hypot(0.6, 0.4), abs=0.05)  # (1 - shift) of the old, shift of the new
    assert one.letters != other.letters and sorted(one.letters) == sorted(other.letters)
    many = ToyBalance("pretrain", n=5000)  # a sample does not depend on how many there are
    for i in range(3):
        assert one[i].media["vision"][0].tobytes() == many[i].media["vision"][0].tobytes()
        assert one[i].messages == many[i].messages
    assert many[4500].media["vision"][0].tobytes() != many[4500 - 4096].media["vision"][0].tobytes()
    assert one[0].media["vision"][0].tobytes() != ToyBalance("pretrain", "test", n=3)[0].media["vision"][0].tobytes()
    with pytest.raises(IndexError):
        one[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "adopt"}, "did you mean 'adapt'"),
        ({"stage": "adapt", "split": "valid"}, "split: 'valid'"),
        ({"stage": "adapt", "n": 0}, "n: 0"),
        ({"stage": "adapt", "values": 17}, "values: 17 is out of range; use 2 to 16"),
        ({"stage": "adapt", "shift": 1.5}, "shift: 1.5"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToyBalance(**options)
