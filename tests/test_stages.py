"""Stages: what is composed for each, that one goes on where the other ended, and that a run of them survives a kill."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jobs
import pytest
from safetensors.torch import load_file

from mllm_factory import UserError, cli, run, runs, staged, stages
from mllm_factory.config import Composer

SMOKE = ["experiment=smoke", "metrics=[answer_loss]", "trainer.max_steps=3"]
FIRST = {"name": "projector", "tuning": "projector_only", "schedule.lr": 1e-2}
SECOND = {"name": "task", "tuning": "lora", "trainer": {"max_steps": 40, "save_every": 4}, "seed": 1}
THIRD = {"name": "last", "tuning": "lora", "tuning.projector.name": "frozen", "trainer.max_steps": 2}


def composer() -> Composer:
    return Composer("train", keep=True)


def tree_of(folder: Path, *parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A whole tree with stages."""
    made = composer()
    base = made.compose(SMOKE).tree
    assert base is not None
    return stages.expanded(made, SMOKE, {**base, "output_dir": str(folder), "stages": list(parts), **changes})


def train(tree: dict[str, Any]) -> None:
    """As ``jobs.train`` does it."""
    try:
        (staged.train if tree.get("stages") else run.train)(tree)
    except UserError as error:
        print(f"ERROR {error}", flush=True)
        raise SystemExit(2) from None


def do(tree: dict[str, Any], log: Path, expected: int = 0) -> str:
    code = jobs.finish(jobs.start(train, tree, log=log))
    assert code == expected, f"exit code {code}\n{log.read_text()}"
    return log.read_text()


def weights(folder: Path) -> dict[str, Any]:
    found = runs.latest(folder)
    assert found is not None
    return load_file(found / "model.safetensors")


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# ---------------------------------------------------------------- what is composed


def test_a_stage_is_a_command_line_that_goes_on() -> None:
    assert stages.words({**SECOND, "metrics": ["exact_match"], "vision": None, "data.note": "a, b's"}) == [
        "tuning='lora'",
        "metrics=['exact_match']",
        "vision=null",
        "++name='task'",
        "++trainer.max_steps=40",
        "++trainer.save_every=4",
        "++seed=1",
        "++data.note='a, b\\'s'",
    ]
    made = composer()
    for stage, line in [
        (FIRST, ["name=projector", "tuning=projector_only", "schedule.lr=0.01"]),
        (THIRD, ["name=last", "tuning=lora", "tuning.projector.name=frozen", "trainer.max_steps=2"]),
    ]:
        (found,) = stages.composed_stages(made, SMOKE, [stage])
        wanted = made.compose([*SMOKE, *line])
        assert found.check() == []
        assert {k: v for k, v in (found.tree or {}).items() if k != "output_dir"} == {
            k: v for k, v in (wanted.tree or {}).items() if k != "output_dir"
        }


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("[{tuning: lorra}]", "stages.0.tuning: no tuning preset is named 'lorra'; did you mean 'lora'?"),
        ("[{tuning: lora},{trainer: {max_step: 3}}]", "stages.1.trainer.max_step: "),
        ("[{tuning.backbone.rnk: 3}]", "stages.0.tuning.backbone.rnk: "),
        ("[{output_dir: x}]", "stages.0.output_dir: belongs to the whole run"),
        ("[]", "stages: is a list of partial configs"),
        ("lora", "stages: is a list of partial configs"),
    ],
)
def test_mistakes(given: str, says: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mllm-factory"])
    assert cli.main(["train", *SMOKE, f"stages={given}"]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing was started"


# ---------------------------------------------------------------- what is trained


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three stages."""
    folder = tmp_path_factory.mktemp("stages") / "run"
    do(tree_of(folder, FIRST, SECOND, THIRD), folder.parent / "log")
    return folder


def test_a_stage_starts_where_the_other_ended(whole: Path, tmp_path: Path) -> None:
    """By hand: a run of the first stage, and one of the second from its checkpoint."""
    first, second = (dict(stage) for stage in tree_of(tmp_path, FIRST, SECOND)["stages"])
    plain = {"resume": None, "init_from": None, "trust_components": False}
    do({**first, **plain, "output_dir": str(tmp_path / "a")}, tmp_path / "log_a")
    do({**second, **plain, "output_dir": str(tmp_path / "b"), "init_from": str(tmp_path / "a")}, tmp_path / "log_b")
    jobs.assert_same_end(whole / "stages" / "1_projector", tmp_path / "a", 3)
    assert same(weights(whole / "stages" / "2_task"), weights(tmp_path / "b"))
    assert jobs.lines(whole / "stages" / "2_task") == jobs.lines(tmp_path / "b")


def test_what_is_frozen_later_is_kept_and_saved(whole: Path, tmp_path: Path) -> None:
    second, third = weights(whole / "stages" / "2_task"), weights(whole / "stages" / "3_last")
    assert second.keys() == third.keys()
    still = {name for name in third if second[name].equal(third[name])}
    assert still == {name for name in third if name.startswith("projectors.")}
    told = json.loads((whole / "report.json").read_text())
    last = json.loads((whole / "stages" / "3_last" / "report.json").read_text())
    assert {key: told[key] for key in last} == last
    names = {"1_projector", "2_task", "3_last"}
    assert {key.partition("/")[0] for key in told if key.startswith(("1_", "2_", "3_"))} == names
    tree = {**tree_of(tmp_path, THIRD)["stages"][0], "output_dir": str(tmp_path / "again"), "checkpoint": str(whole)}
    assert run.evaluate({**tree, "resume": None, "init_from": None}) == pytest.approx(last["answer_loss"], rel=1e-6)


def test_what_has_no_place_in_a_later_stage_is_refused(tmp_path: Path) -> None:
    text = do(tree_of(tmp_path / "run", SECOND | {"trainer.max_steps": 1}, FIRST), tmp_path / "log", 2)
    assert "have no place in the next stage; keep the strategies of the earlier stage" in text


def test_kill_9_in_a_later_stage_and_resume(whole: Path, tmp_path: Path) -> None:
    folder, tree = tmp_path / "run", tree_of(tmp_path / "run", FIRST, SECOND, THIRD)
    process = jobs.start(train, tree, log=tmp_path / "log")
    assert jobs.until(lambda: bool(runs.steps(folder / "stages" / "2_task")), process)
    os.kill(process.pid or 0, signal.SIGKILL)
    jobs.finish(process)
    assert not (folder / "stages" / "3_last").exists()
    assert "holds the stages of a run; continue it with resume=auto" in do(tree, tmp_path / "log2", 2)
    assert runs.find_run(str(folder), tree) == folder
    text = do({**tree, "resume": str(folder)}, tmp_path / "log3")
    assert text.count("done already") == 1
    for stage, steps in (("1_projector", 3), ("2_task", 40), ("3_last", 2)):
        jobs.assert_same_end(folder / "stages" / stage, whole / "stages" / stage, steps)
    other = tree_of(folder, FIRST, {**SECOND, "name": "other"})
    assert "was begun with the stages" in do({**other, "resume": "auto"}, tmp_path / "log4", 2)
