"""Whole runs: the report, and everything a user can get wrong before the first step, in one line each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import tree

from mllm_factory import UserError, recorder, run
from mllm_factory.errors import ConfigError, DataError

FROZEN = {"name": "frozen"}


def refused(node: dict[str, Any]) -> UserError:
    """The error of a run that must not start; one line, and no checkpoint."""
    with pytest.raises(UserError) as raised:
        run.train(node)
    assert "\n" not in str(raised.value)
    folder = Path(node["output_dir"])
    assert not folder.is_dir() or not (folder / "checkpoints").exists()
    return raised.value


def test_a_run_reports_what_was_promised(tmp_path: Path) -> None:
    node = tree(
        tmp_path / "run", metrics__ablation={"name": "ablation", "score": {"name": "exact_match", "max_new_tokens": 2}}
    )
    node["trainer"] |= {"eval_every": 2, "eval_limit": 4, "tensorboard": True}
    value = run.train(node)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    promised = "exact_match ablation/vision/exact_match samples train/steps train/seconds train/samples_per_second peak_memory_bytes"
    assert set(promised.split()) <= report.keys()
    assert all(isinstance(number, float) for number in report.values())
    assert value == report["exact_match"] and report["samples"] == 8.0 and report["train/steps"] == 4.0
    assert report["train/samples_per_second"] * report["train/seconds"] == pytest.approx(16)
    assert report["peak_memory_bytes"] > 1e8 and 0 < report["parameters/trainable"] < report["parameters/total"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4], "an evaluation after step 2; the last one is the report"
    assert {"loss", "grad_norm", "lr/projector", "lr/backbone", "samples_per_second", "seconds"} <= lines[0].keys()
    assert lines[2]["eval/samples"] == 4.0
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_the_log_says_what_was_trained(tmp_path: Path) -> None:
    """The logged loss is the mean over all labels since the line before; with a rate of 0 it is that of the data."""
    node = tree(
        tmp_path / "run", schedule={"name": "constant", "lr": 0.0}, metrics={"answer_loss": {"name": "answer_loss"}}
    )
    node["trainer"] |= {"max_steps": 4, "batch_size": 4, "accumulate": 2, "log_every": 4, "clip": None}
    node["data"]["eval"] = node["data"]["train"]  # 32 samples: an epoch of 4 x 2 x 4
    value = run.train(node)
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["loss"] == pytest.approx(value, rel=1e-6)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["train/samples_per_second"] * report["train/seconds"] == pytest.approx(32)


def test_a_model_learns_what_it_sees(tmp_path: Path) -> None:
    node = tree(
        tmp_path / "run", metrics__ablation={"name": "ablation", "score": {"name": "exact_match", "max_new_tokens": 14}}
    )
    node["metrics"]["exact_match"]["max_new_tokens"] = 14
    node["trainer"] |= {"max_steps": 120, "batch_size": 16, "log_every": 60, "save_every": 120}
    node["backbone"]["sizes"] |= {"hidden_size": 32, "intermediate_size": 64}
    assert run.train(node) == 1.0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["ablation/vision/exact_match"] < 0.3


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    recorder.report(tmp_path, {"a": 1.0, "b": math.nan, "c": math.inf, "d": -math.inf})
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": 1.0, "b": None, "c": None, "d": None}
    with recorder.Recorder(tmp_path, 3, 0, False, True) as lines:
        lines.write(1, {"eval/x": math.nan})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "eval/x": None,
    }


def test_bars_may_stand_in_each_other_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluating while training shows two at once."""
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    monkeypatch.setattr(recorder, "console", Console(file=out, force_terminal=True, width=120))
    run.train(tree(tmp_path / "run[1]", trainer__eval_every=1))
    assert "train" in out.getvalue() and "4/4" in out.getvalue() and "run[1]" in out.getvalue()


def test_without_metrics_there_is_a_report_of_the_training(tmp_path: Path) -> None:
    node = tree(tmp_path / "run", metrics=None)
    del node["data"]["eval"]
    assert run.train(node) is None
    assert json.loads((tmp_path / "run" / "report.json").read_text())["train/steps"] == 4.0


def test_two_stages_share_the_projector(tmp_path: Path) -> None:
    first = tree(tmp_path / "one", tuning={"vision": FROZEN, "projector": {"name": "full"}, "backbone": FROZEN})
    run.train(first)
    lora = {"name": "lora", "rank": 2, "targets": "all-linear"}
    second = tree(tmp_path / "two", init_from=str(tmp_path / "one"), tuning__backbone=lora, schedule__lr=0.0)
    run.train(second)
    from safetensors.torch import load_file

    files = [tmp_path / name / "checkpoints" / "step_000004" / "model.safetensors" for name in ("one", "two")]
    align, instruct = map(load_file, files)
    assert align.keys() < instruct.keys() and all(torch.equal(value, instruct[name]) for name, value in align.items())


def test_evaluating_an_untrained_model_is_allowed(tmp_path: Path) -> None:
    value = run.evaluate({**tree(tmp_path / "out"), "checkpoint": None})
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["exact_match"] == value and report["samples"] == 8.0 and "peak_memory_bytes" in report


def test_check_counts_parts_without_weights(tmp_path: Path) -> None:
    found = run.check(tree(tmp_path))
    assert found["parts"]["vision"] == {"name": "toys:Patches", "total": 24, "trainable": 0}
    assert found["total"] == sum(part["total"] for part in found["parts"].values())
    assert found["trainable"] == found["total"] - 24 and found["tokens"] == {"vision": 4}
    assert found["memory"]["optimizer"] == 8 * found["trainable"]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": None}, r"data\.train: the samples of toys:Colours carry vision but vision=null; choose an encoder"),
        ({"data__train": {"name": "toys:Empty"}}, r"data\.train: toys:Empty is empty"),
        ({"data__eval": {"name": "toys:Empty"}}, r"data\.eval: toys:Empty is empty"),
        ({"data__eval": None}, r"data\.eval: metrics need data to be judged on; set data\.eval, or metrics=null"),
        ({"data__train": None}, r"data\.train: there is no data; choose a source"),
        (
            {"projector": {"name": "toys:Liar"}},
            r"the projector says it gives .* \[1, 5, 16\] for one item but gives \[1, 4, 16\]",
        ),
        (
            {"projector": {"name": "toys:Stubborn"}},
            r"vision: encoder and projector do not fit: .*shapes cannot be multiplied",
        ),
        ({"data__max_length": 4}, r"data\.max_length: one vision item takes 4 tokens but max_length is 4"),
        ({"data__max_length": 300}, r"data\.max_length: 300 is more than the backbone's 256 positions"),
        ({"tuning__projector": FROZEN, "tuning__backbone": FROZEN}, "nothing is trainable"),
        ({"tuning": {"vision": FROZEN, "backbone": FROZEN}}, r"tuning\.projector: no strategy for this part"),
        ({"trainer__max_stepz": 3}, r"trainer\.max_stepz: .*did you mean 'max_steps'"),
        ({"trainer__device": "tpu"}, r"trainer\.device: 'tpu' is no device"),
        ({"trainer__clip": -1.0}, r"trainer: clip must be above 0"),
        ({"schedule__warmup": 2.0}, r"schedule: cosine: warmup is a share"),
        (
            {"metrics__x": {"name": "exact_match", "max_new_tokens": 0}},
            r"metrics\.x: exact_match: max_new_tokens must be at least 1",
        ),
        ({"vision": {"name": "os:system"}}, "is not a subclass of"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_before_the_first_step(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    error = refused(tree(tmp_path / "run", **changes))
    import re

    assert isinstance(error, ConfigError) and re.search(message, str(error)), error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"projector": {"name": "toys:DeadWeight"}},
            "1 trainable tensors got no gradient in the first step: projectors.vision.unused",
        ),
        ({"projector": {"name": "toys:TurnsNan", "after": 0}}, "step 1: the loss sum is nan"),
        ({"data__max_length": 10, "data__overflow": "refuse"}, "step 1: no label token in the samples"),
        (
            {"data__train": {"name": "toys:FailsLate", "at": 3}},
            "sample number 3 cannot be read: OSError: sample 3 is broken",
        ),
        ({"data__train": {"name": "toys:FailsLate", "at": 3}, "trainer__workers": 1}, "sample number 3 cannot be read"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_what_turns_out_in_the_first_step_is_one_line_too(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    error = refused(tree(tmp_path / "run", **changes))
    assert isinstance(error, DataError) and message in str(error)


@pytest.mark.parametrize("place", ["file/x", "file", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    error = refused(tree(tmp_path / place))
    assert isinstance(error, ConfigError) and "cannot be written" in str(error) and "output_dir: " in str(error)


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    run.train(tree(tmp_path / "run"))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(
        ConfigError, match="output_dir: .* holds the checkpoints of a run; continue it with resume=auto"
    ):
        run.train(tree(tmp_path / "run"))
    assert before == {p: p.read_bytes() for p in before}


def test_a_metrics_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be (written|read): Is a directory; move it away"):
        run.train(tree(tmp_path / "run"))


def test_nothing_to_measure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="metrics: there is nothing to measure"):
        run.evaluate({**tree(tmp_path), "metrics": {}, "checkpoint": None})
    with pytest.raises(UserError, match="there is no checkpoint at"):
        run.evaluate({**tree(tmp_path), "checkpoint": str(tmp_path / "no")})


def test_init_from_what_shares_nothing_is_refused(tmp_path: Path) -> None:
    run.train(tree(tmp_path / "one", tuning={"vision": {"name": "full"}, "projector": FROZEN, "backbone": FROZEN}))
    node = tree(tmp_path / "two", init_from=str(tmp_path / "one"))
    assert "init_from: " in str(refused(node)) and "shares no trained tensor" in str(refused(node))
