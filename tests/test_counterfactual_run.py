"""Counterfactual measures in runs: during training, in several processes, as tables, and by the verb ``imbalance``."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_distributed import settings, together
from toys import tree

from mllm_factory import cli, recorder, run
from mllm_factory.completion import candidates

METRICS = {
    "counterfactual": {"name": "counterfactual", "resamples": 100},
    "ablation": {"name": "ablation", "score": {"name": "exact_match", "max_new_tokens": 2}},
}


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_during_training_and_at_its_end(tmp_path: Path) -> None:
    node = tree(tmp_path / "run", trainer__eval_every=2, metrics=METRICS)
    main = run.train(node)
    found = report(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    over_time = [line["eval/image_gain"] for line in lines if "eval/image_gain" in line]
    assert len(over_time) >= 1 and all(isinstance(value, float) for value in over_time)
    assert main == found["image_gain"] and found["image_gain/low"] <= main <= found["image_gain/high"]
    with (tmp_path / "run" / "tables" / "counterfactual_samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 == len({row["id"] for row in rows})
    assert sum(float(row["image_gain"]) for row in rows) / 8 == pytest.approx(found["image_gain"])
    checked = tree(tmp_path / "again", metrics=METRICS) | {"checkpoint": str(tmp_path / "run")}
    assert run.evaluate(checked) == pytest.approx(main, abs=1e-6)


def test_measuring_changes_no_training(tmp_path: Path) -> None:
    run.train(tree(tmp_path / "measured", trainer__eval_every=1, metrics=METRICS))
    run.train(tree(tmp_path / "plain", metrics=None))
    losses = [
        [
            line["loss"]
            for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
            if "loss" in line
        ]
        for name in ("measured", "plain")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_measure_what_one_measures(tmp_path: Path, strategy: str) -> None:
    node = settings(tmp_path / "two", strategy=strategy, eval_every=3, max_steps=4)
    node["metrics"] = METRICS
    together(node, tmp_path / "log")
    found = report(tmp_path / "two")
    alone = {**node, "output_dir": str(tmp_path / "one"), "checkpoint": str(tmp_path / "two")}
    run.evaluate(alone)
    expected = report(tmp_path / "one")
    keys = [
        key for key in expected if key.startswith(("image_gain", "js_", "modality", "interaction", "ablation", "flip"))
    ]
    assert len(keys) > 30
    for key in keys:
        assert found[key] == (None if expected[key] is None else pytest.approx(expected[key], abs=1e-5)), key


def test_tables_hold_what_rows_have(tmp_path: Path) -> None:
    rows = [{"id": "a, b", "x": 1.5}, {"id": 'c "d"', "x": math.nan, "y": 2}]
    assert recorder.tables(tmp_path, {"m": {"samples": rows, "none": []}, "n": {}}) == [
        tmp_path / "tables" / "m_samples.csv"
    ]
    with (tmp_path / "tables" / "m_samples.csv").open() as file:
        read = list(csv.DictReader(file))
    assert read == [{"id": "a, b", "x": "1.5", "y": ""}, {"id": 'c "d"', "x": "", "y": "2"}]


# ---------------------------------------------------------------- the verb


def printed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert cli.main(argv) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_verb_chooses_the_preset_unless_others_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    shown = ["experiment=smoke", "--cfg", "job", "--package", "metrics"]
    whole = printed(["imbalance", "metrics.counterfactual.shuffles=5", *shown], capsys)
    assert list(whole) == ["counterfactual", "attention", "exact_match", "ablation"]
    assert whole["counterfactual"]["shuffles"] == 5
    assert list(printed(["imbalance", "metrics=[counterfactual]", *shown], capsys)) == ["counterfactual"]


def test_the_verb_is_completed() -> None:
    assert candidates("mllm-factory imb") == ["imbalance "]
    assert "metrics=imbalance" in candidates("mllm-factory imbalance metrics=im")
    assert any(word.startswith("checkpoint=") for word in candidates("mllm-factory imbalance check"))
