"""A run that was killed and continued ends bit for bit like one that never stopped."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from toys import tree

from mllm_factory import run, runs
from mllm_factory.errors import CheckpointError, ConfigError

STEPS = 9
DROPOUT = {"name": "lora", "rank": 2, "dropout": 0.3, "targets": "all-linear"}


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Bucketing, accumulation, dropout in two places, noise of other generators, saving and logging out of step with each other."""
    node = tree(
        folder,
        tuning__backbone=DROPOUT,
        vision={"name": "toys:NormedPatches", "jitter": 0.1},
        tuning__vision={"name": "full"},
        data__train={"name": "toys:Colours", "n": 40, "text_every": 6},
    )
    node["trainer"] |= {"max_steps": STEPS, "batch_size": 3, "accumulate": 2, "bucket": 4, "log_every": 2}
    node["trainer"] |= {"save_every": 1, "keep": None, "workers": 0}
    node["backbone"]["sizes"]["attention_dropout"] = 0.2
    for key, value in changes.items():
        group, _, option = key.partition("__")
        node[group] = {**node[group], option: value} if option else value
    return node


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    jobs.run(settings(folder), folder.with_suffix(".log"))
    return folder


def test_an_uninterrupted_run_repeats(whole: Path, tmp_path: Path) -> None:
    jobs.run(settings(tmp_path / "run"), tmp_path / "log")
    jobs.assert_same_end(tmp_path / "run", whole, STEPS)
    assert [line["step"] for line in jobs.lines(whole)] == [2, 4, 6, 8, 9]


@pytest.mark.slow
def test_kill_at_any_moment_and_continue(whole: Path, tmp_path: Path) -> None:
    """Killed again and again at random moments, most of them in or near a save; then run to the end."""
    folder, draw, kills = tmp_path / "run", random.Random(0), 0
    for _ in range(40):
        process = jobs.start(jobs.train, settings(folder, resume="auto"), log=tmp_path / "log")
        before = max(runs.steps(folder), default=0)
        target = before + draw.randrange(1, 3)
        saving = draw.choice([f"step_{target:06d}.tmp", f"step_{target:06d}.tmp/trainer.pt", f"step_{target:06d}"])
        alive = jobs.until(
            lambda at=folder / "checkpoints" / saving: at.exists() or at.with_suffix("").exists(), process
        )
        time.sleep(draw.random() * 0.02)
        if alive and process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and kills >= 4, (kills, (tmp_path / "log").read_text())
    jobs.assert_same_end(folder, whole, STEPS)
    assert not [p.name for p in (folder / "checkpoints").iterdir() if p.suffix]


@pytest.mark.parametrize("workers", [0, 2])
def test_continuing_between_two_lines_of_the_log_loses_nothing(whole: Path, tmp_path: Path, workers: int) -> None:
    """From step 5, where the line of step 6 is half summed up; with other loader workers than before."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    for step in range(6, STEPS + 1):
        shutil.rmtree(runs.folder_of(folder, step))
    log = jobs.run(settings(folder, resume="auto", trainer__workers=workers), tmp_path / "log")
    assert f"resuming from {runs.folder_of(folder, 5)}\n" in log
    assert ("changed since then: trainer.workers: 0 -> 2" in log) == bool(workers)
    jobs.assert_same_end(folder, whole, STEPS)


def test_a_finished_run_is_only_evaluated_again(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    (folder / "report.json").unlink()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "step_" in str(p)}
    log = jobs.run(settings(folder, resume="auto"), tmp_path / "log")
    assert "resuming from" in log and "changed since then" not in log
    assert {p: p.stat().st_mtime_ns for p in before} == before and jobs.lines(folder) == jobs.lines(whole)
    ours, theirs = (json.loads((f / "report.json").read_text()) for f in (folder, whole))
    for key in ("train/seconds", "train/samples_per_second"):
        assert ours[key] == pytest.approx(theirs[key])
    assert {k: v for k, v in ours.items() if k not in ("peak_memory_bytes",)} == pytest.approx(
        {k: v for k, v in theirs.items() if k not in ("peak_memory_bytes",)}
    )


def test_a_named_step_is_where_it_continues(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    seconds = torch.load(runs.folder_of(folder, 8) / "trainer.pt", weights_only=True)["counts"]["seconds"]
    log = jobs.run(settings(folder, resume=str(runs.folder_of(folder, 8))), tmp_path / "log")
    assert "step_000008" in log
    jobs.assert_same_end(folder, whole, STEPS)
    assert json.loads((folder / "report.json").read_text())["train/seconds"] > seconds


def test_a_damaged_newest_step_is_passed_over(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    weights = runs.folder_of(folder, 9) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    log = jobs.run(settings(folder, resume="auto"), tmp_path / "log")
    assert "skipping the damaged checkpoint" in log and "step_000008" in log
    jobs.assert_same_end(folder, whole, STEPS)


def test_killed_while_evaluating(tmp_path: Path) -> None:
    """Between two checkpoints; and evaluating changes nothing of the training."""
    flags = {name: tmp_path / name for name in ("done", "ours")}
    flags["done"].touch()
    folders = {name: tmp_path / f"run_{name}" for name in ("done", "ours", "plain")}
    options = {"eval_every": 2, "save_every": 3, "log_every": 1, "eval_limit": 4}
    trees = {
        name: settings(
            folders[name],
            metrics={
                "exact_match": {"name": "exact_match", "max_new_tokens": 2},
                "killer": {"name": "toys:Killer", "flag": str(flags[name]), "at": 1},
            },
        )
        for name in flags
    }
    for node in trees.values():
        node["trainer"] |= options
    jobs.run(trees["done"], tmp_path / "log_done")
    jobs.run(trees["ours"], tmp_path / "log", expected=-9)
    assert [line["step"] for line in jobs.lines(folders["ours"])] == [1, 2], "died in the evaluation of step 2"
    log = jobs.run({**trees["ours"], "resume": "auto"}, tmp_path / "log")
    assert "holds no usable checkpoint; starting from the beginning" in log
    flags["ours"].unlink()
    trees["ours"]["metrics"]["killer"]["at"] = 100
    trees["ours"]["output_dir"] = str(tmp_path / "run_again")
    plain = settings(folders["plain"])
    plain["trainer"] |= {**options, "eval_every": None}
    jobs.run(plain, tmp_path / "log_plain")
    jobs.assert_same_end(folders["ours"], folders["done"], STEPS)
    found, without = jobs.lines(folders["ours"]), jobs.lines(folders["plain"])
    assert [line for line in found if "loss" in line] == without
    assert [line["step"] for line in found if "eval/exact_match" in line] == [2, 4, 6, 8]
    ends = [runs.folder_of(folders[name], STEPS) / "model.safetensors" for name in ("ours", "plain")]
    assert ends[0].read_bytes() == ends[1].read_bytes(), "evaluating draws no random number from training"


def test_another_architecture_is_refused_with_what_differs(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    node = settings(folder, resume="auto", projector={"name": "mlp", "depth": 1})
    node["backbone"]["sizes"]["hidden_size"] = 32
    with pytest.raises(CheckpointError) as raised:
        run.train(node)
    text = str(raised.value)
    assert "projector.depth: 2 -> 1; backbone.sizes.hidden_size: 16 -> 32; start a new run, or use init_from" in text
    assert "trained with another architecture" in text and "\n" not in text
    with pytest.raises(CheckpointError, match=r"audio: None -> \{'name': 'x'\}"):
        run.train(settings(folder, resume=str(folder), audio={"name": "x"}))


def test_two_runs_do_not_share_a_folder(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = jobs.start(
        jobs.train, settings(folder, trainer__max_steps=100000, trainer__workers=1), log=tmp_path / "log"
    )
    assert jobs.until(lambda: len(jobs.lines(folder)) > 1, process)
    with pytest.raises(CheckpointError, match=rf"another process is running in {folder}; wait for it"):
        run.train(settings(folder, resume="auto"))
    process.kill()
    time.sleep(0.5)  # dead, while its loader's worker lives on for some seconds
    with pytest.raises(
        ConfigError, match="output_dir: .* holds the checkpoints of a run; continue it with resume=auto"
    ):
        run.train(settings(folder))
    steps = max(runs.steps(folder))
    run.train(settings(folder, resume="auto", trainer__max_steps=steps))


def test_lines_that_a_crash_cut_off_are_written_again(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(runs.folder_of(folder, 9))
    with (folder / "metrics.jsonl").open("r+") as file:
        text = file.read()
        file.seek(0)
        file.truncate()
        file.write(text[:-20])
    jobs.run(settings(folder, resume="auto"), tmp_path / "log")
    jobs.assert_same_end(folder, whole, STEPS)
