"""The verb ``report``: the table against numbers worked out by hand, jobs of every state, and what it refuses."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from report_runs import CHOICES, EVAL, costs, sweep, tree_of, write_run

from mllm_factory import cli, recorder
from mllm_factory.errors import UserError
from mllm_factory.report import make
from mllm_factory.report_columns import direction, number
from mllm_factory.report_groups import pareto
from mllm_factory.report_runs import held, read_runs

Run = Callable[..., subprocess.CompletedProcess[str]]


def reported(capsys: pytest.CaptureFixture[str], *argv: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["report", *map(str, argv), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    capsys.readouterr()
    assert cli.main(["report", *map(str, argv)]) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert shown.out == ""
    return line


# ---------------------------------------------------------------- the table


def test_seeds_become_mean_and_deviation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = reported(capsys, sweep(tmp_path / "s"))
    assert found["settings"] == ["tuning"] and found["main"] == "exact_match"
    lora, mores = found["configurations"]
    assert (lora["settings"], lora["n"], lora["jobs"]) == ({"tuning": "lora"}, 2, ["0", "1"])
    value = lora["values"]["exact_match"]
    assert value["mean"] == pytest.approx(0.85)
    assert value["sd"] == pytest.approx(0.1 / 2**0.5)  # two numbers 0.1 apart, divided by n - 1
    assert mores["values"]["exact_match"]["sd"] == pytest.approx(0.2 / 2**0.5)
    assert (lora["best"], mores["best"]) == (
        ["exact_match"],
        ["parameters/trainable", "parameters/trainable_backbone"],
    )
    assert (lora["pareto"], mores["pareto"]) == (True, True)
    assert not (tmp_path / "s" / "report").exists()  # --json alone writes nothing


def test_files_hold_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sweep(tmp_path / "s")
    assert cli.main(["report", str(folder), "--columns", "exact_match,train/seconds"]) == 0
    shown = capsys.readouterr().out
    assert "0.8500 ± 0.0707 ★" in shown and "4 jobs: 4 done" in shown
    assert shown.splitlines()[-1] == f"report: {folder / 'report' / 'report.html'}"
    out = folder / "report"
    with (out / "tables" / "configurations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["tuning"] for row in rows] == ["lora", "mores"]
    assert [float(row["exact_match/mean"]) for row in rows] == [pytest.approx(0.85), pytest.approx(0.6)]
    with (out / "tables" / "runs.csv").open() as file:
        assert [(r["job"], r["seed"], float(r["exact_match"])) for r in csv.DictReader(file)] == [
            ("0", "0", 0.8),
            ("1", "1", 0.9),
            ("2", "0", 0.5),
            ("3", "1", 0.7),
        ]
    with (out / "tables" / "values.csv").open() as file:
        assert ["3", "parameters/trainable", "10.0"] in list(csv.reader(file))
    lines = (out / "report.md").read_text().splitlines()
    assert "| tuning | n | exact_match ↑ | train/seconds ↓ | Pareto |" in lines
    assert "| lora | 2 | **0.8500 ± 0.0707** ★ | 1.5000 | ● |" in lines
    assert json.loads((out / "report.json").read_text()) == reported(
        capsys, folder, "--columns", "exact_match,train/seconds"
    )


def test_less_is_better_where_the_name_or_the_user_says_so() -> None:
    assert [direction(k) for k in ("exact_match", "answer_loss", "loss", "train/seconds", "checkpoint_bytes")] == [
        1,
        -1,
        -1,
        -1,
        -1,
    ]
    assert [direction(k) for k in ("parameters/trainable", "train/samples_per_second", "accuracy")] == [-1, 1, 1]
    # descriptions rank nothing, and a breakdown is not its metric
    assert not any(
        direction(k) for k in ("lmar/vision", "image_gain", "ablation/vision/exact_match", "blind_accuracy/vision")
    )
    assert (
        direction("mine", up=["mine"]),
        direction("mine", down=["mine"]),
        direction("accuracy", down=["accuracy"]),
    ) == (1, -1, -1)


def test_the_user_ranks_by_a_metric_of_their_own(tmp_path: Path) -> None:
    for i, score in enumerate((3.0, 1.0, 2.0)):
        tree = tree_of(tuning={"backbone": {"name": "lora", "rank": i}})
        write_run(
            tmp_path / str(i), [f"tuning.backbone.rank={i}"], tree, {"surprise": score, **costs(10 + i)}, choices={}
        )
    assert [g.label for g in make([str(tmp_path)]).groups] == [
        "rank=0",
        "rank=1",
        "rank=2",
    ]  # unknown way: as they came
    assert [g.label for g in make([str(tmp_path)], down=["surprise"]).groups] == ["rank=1", "rank=2", "rank=0"]
    assert make([str(tmp_path)], down=["surprise"]).front == [True, False, True]
    assert make([str(tmp_path)], up=["surprise"]).front == [True, False, False]
    assert make([str(tmp_path)]).front == [False] * 3


def test_what_ranks_by_default_is_a_metric_with_a_better_way(tmp_path: Path) -> None:
    for i, (gain, accuracy) in enumerate([(0.9, 0.5), (0.1, 0.7)]):
        tree = tree_of(tuning={"backbone": {"name": str(i)}})
        values = {"image_gain": gain, "accuracy": accuracy, "image_gain/low": 0.0, **costs(1)}
        write_run(tmp_path / str(i), [], tree, values, choices={})
    made = make([str(tmp_path)])
    assert made.main == "accuracy" and [g.values["accuracy"].mean for g in made.groups] == [0.7, 0.5]
    assert list(made.columns)[:2] == ["image_gain", "accuracy"] and "image_gain/low" not in made.columns
    assert make([str(tmp_path)], main="image_gain").main == "image_gain"


def test_pareto_front_by_brute_force() -> None:
    """On the front: the best of its cost, and better than all that cost less."""
    source = random.Random(0)
    for _ in range(50):
        places = [(source.randint(0, 6), source.randint(0, 6)) for _ in range(source.randint(1, 12))]
        expected = []
        for cost, merit in places:
            cheaper = [m for c, m in places if c < cost]
            as_cheap = [m for c, m in places if c == cost]
            expected.append(merit == max(as_cheap) and all(m < merit for m in cheaper))
        assert pareto(places, True) == expected
        assert pareto([(c, -m) for c, m in places], False) == expected
    assert pareto([None, (1.0, 1.0), None], True) == [False, True, False]


def test_numbers_as_one_reads_them() -> None:
    assert [number(v) for v in (0.0, 1234567.0, 1234.5, 12.345, 0.12345, 0.00012)] == [
        "0",
        "1,234,567",
        "1,234",
        "12.35",
        "0.1235",
        "1.20e-04",
    ]
    assert [number(v, "peak_memory_bytes") for v in (861433856.0, 13256.0, 3e9, 12.0)] == [
        "861.4 MB",
        "13.3 kB",
        "3.0 GB",
        "12.0 B",
    ]


# ---------------------------------------------------------------- which runs are the same


def test_what_is_not_overridden_in_a_run_is_what_was_composed(tmp_path: Path) -> None:
    bare = tree_of(tuning={"backbone": {"name": "lora", "rank": 4}})
    write_run(tmp_path / "a", ["experiment=smoke"], bare, {"exact_match": 0.5, **costs(1)})
    other = tree_of(tuning={"backbone": {"name": "lora", "rank": 8}})
    write_run(tmp_path / "b", ["experiment=smoke", "+tuning.backbone.rank=8"], other, {"exact_match": 0.6, **costs(2)})
    changed = {**CHOICES, "vision": "vit_b"}
    write_run(
        tmp_path / "c",
        ["vision=vit_b"],
        tree_of(vision={"name": "x"}),
        {"exact_match": 0.4, **costs(3)},
        choices=changed,
    )
    settings = [dict(group.settings) for group in make([str(tmp_path)]).groups]
    assert settings == [
        {"tuning.backbone.rank": "8", "vision": "vit_test"},
        {"tuning.backbone.rank": "4", "vision": "vit_test"},
        {"tuning.backbone.rank": "4", "vision": "vit_b"},
    ]


def test_trees_that_differ_without_an_override_are_kept_apart(tmp_path: Path) -> None:
    for name, rank in (("a", 4), ("b", 8)):
        tree = tree_of(tuning={"backbone": {"name": "lora", "rank": rank}})
        write_run(tmp_path / name, ["experiment=mine"], tree, {"exact_match": rank / 10, **costs(1)})
    assert [(dict(g.settings), g.done) for g in make([str(tmp_path)]).groups] == [
        ({"tuning.backbone.rank": "8"}, 1),
        ({"tuning.backbone.rank": "4"}, 1),
    ]


def test_checkpoints_of_one_seed_are_no_repetitions(tmp_path: Path) -> None:
    for step in (1, 2):
        write_run(
            tmp_path / f"step{step}",
            [],
            tree_of(0, checkpoint=f"run/step_{step}"),
            {"exact_match": step / 4, **costs(1)},
        )
    assert [dict(g.settings) for g in make([str(tmp_path)]).groups] == [
        {"checkpoint": "run/step_2"},
        {"checkpoint": "run/step_1"},
    ]
    for seed in (0, 1):
        write_run(
            tmp_path / "seeds" / str(seed), [], tree_of(seed, checkpoint=f"s{seed}"), {"exact_match": 0.5, **costs(1)}
        )
    (group,) = make([str(tmp_path / "seeds")]).groups
    assert group.done == 2 and group.values["exact_match"].n == 2


def test_jobs_in_order_and_no_report_among_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(11):
        write_run(tmp_path / "s" / str(i), [f"seed={i}"], tree_of(i), {"exact_match": 0.5, **costs(1)})
    first = reported(capsys, tmp_path / "s", "--output", tmp_path / "s" / "all")
    assert [job["job"] for job in first["jobs"]] == [str(i) for i in range(11)]
    assert (tmp_path / "s" / "all" / "report.json").exists()
    assert reported(capsys, tmp_path / "s") == first
    assert [run.label for run in read_runs([str(tmp_path / "s" / "3"), str(tmp_path / "s")])][:2] == [
        "3",
        "0",
    ]  # each once


def test_a_missing_value_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, score in ((0, 0.5), (1, float("nan")), (2, 0.7)):
        write_run(tmp_path / str(seed), [f"seed={seed}"], tree_of(seed), {"exact_match": score, **costs(1)})
    value = reported(capsys, tmp_path)["configurations"][0]["values"]["exact_match"]
    assert (value["mean"], value["n"]) == (pytest.approx(0.6), 2)
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert "0.6000 ± 0.1414 (n 2)" in capsys.readouterr().out


# ---------------------------------------------------------------- jobs that are not done


def _hold(folder: Path, ready: Event, end: Event) -> None:
    with recorder.lock(folder):
        ready.set()
        end.wait(60)


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Another process that holds the run's lock."""
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(folder, ready, end))
    process.start()
    try:
        assert ready.wait(60)
        yield
    finally:
        end.set()
        process.join(60)


def test_a_sweep_that_still_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sweep(tmp_path / "s")
    running = write_run(
        folder / "4", ["seed=2", "tuning=lora"], tree_of(2, tuning={"backbone": {"name": "lora"}}), None, [3.0, 2.5]
    )
    with (running / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # being written
    crashed = write_run(
        folder / "5", ["seed=2", "tuning=mores"], tree_of(2, tuning={"backbone": {"name": "mores"}}), None, [3.0]
    )
    (crashed / "job.json").write_text(json.dumps({"status": "failed", "cause": "no memory"}))
    (folder / "6").mkdir()
    (folder / "6" / ".lock").touch()  # stopped before it wrote anything
    waiting: dict[str, Any] = {"status": "waiting", "overrides": ["seed=3", "tuning=lora"]}
    waiting["config"] = tree_of(3, tuning={"backbone": {"name": "lora"}})
    (folder / "7").mkdir()
    (folder / "7" / "job.json").write_text(json.dumps(waiting))  # nothing else is there yet
    with working_in(running):
        assert held(running / ".lock") and not held(crashed / ".lock")
        found = reported(capsys, folder)
        assert cli.main(["report", str(folder)]) == 0
        with pytest.raises(Exception, match="another process"), recorder.lock(running):
            pass  # asking did not take the lock away
    shown = capsys.readouterr().out
    states = {job["job"]: (job["state"], job["step"], job["cause"]) for job in found["jobs"]}
    assert {key: states[key] for key in "34567"} == {
        "3": ("done", 4, ""),
        "4": ("running", 2, ""),
        "5": ("failed", 1, "no memory"),
        "6": ("unfinished", None, ""),
        "7": ("waiting", None, ""),
    }
    assert [g["n"] for g in found["configurations"]] == [2, 2]
    assert "2 of 4" in shown and "2 of 3" in shown  # lora has one running and one waiting, mores one failed
    assert "8 jobs: 4 done, 1 running, 1 waiting, 1 failed, 1 unfinished" in shown
    assert "no memory" in (folder / "report" / "report.md").read_text()


def test_an_old_report_does_not_count_while_the_run_goes_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", [], None, {"exact_match": 0.5, **costs(1)})
    with working_in(folder):
        (run,) = read_runs([str(folder)])
        assert (run.state, run.values) == ("running", {})
    assert read_runs([str(folder)])[0].state == "done"
    (folder / "job.json").write_text('{"status": "failed", "cause": "at the end"}')
    os.utime(folder / "job.json", (time.time() + 5,) * 2)
    assert read_runs([str(folder)])[0].state == "failed"
    os.utime(folder / "report.json", (time.time() + 9,) * 2)  # repeated by hand since then
    assert read_runs([str(folder)])[0].state == "done"


def test_nothing_is_done_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "s" / "0", ["seed=0"], None, None, [2.0])
    assert cli.main(["report", str(tmp_path / "s"), "--columns", "exact_match"]) == 0
    assert "1 job: 1 unfinished" in capsys.readouterr().out
    (tmp_path / "s" / "0" / "report.json").write_text('{"exact_match": 0.')  # cut off by a crash
    assert read_runs([str(tmp_path / "s")])[0].state == "unfinished"


# ---------------------------------------------------------------- refusals


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sweep(tmp_path / "s")
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    assert "there is no folder 'nowhere'" in refused(capsys, "nowhere")
    assert "holds no run (no report.json" in refused(capsys, tmp_path / "empty")
    assert "a sweep folder or run folders" in refused(capsys)
    assert "--columns: no run reports 'exact_mach'; did you mean 'exact_match'?" in refused(
        capsys, folder, "--columns", "exact_mach"
    )
    assert "--main: no run reports 'lmar'" in refused(capsys, folder, "--main", "lmar")
    assert "'loss' is in both" in refused(capsys, folder, "--up", "loss", "--down", "loss,x")
    assert "unrecognized arguments: --colums" in refused(capsys, folder, "--colums=exact_match")
    assert not (folder / "report").exists()
    (folder / "2" / "config.yaml").write_text("a: [")
    assert "2/config.yaml is no YAML" in refused(capsys, folder)


def test_runs_of_different_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, limit in (("a", 16), ("b", 64)):
        data = {"train": {"name": "easy_vqa", "limit": limit}, "eval": {**EVAL, "limit": limit}}
        write_run(
            tmp_path / name, [f"data.eval.limit={limit}"], tree_of(data=data), {"exact_match": limit / 100, **costs(1)}
        )
    line = refused(capsys, tmp_path)
    assert "different data: data.eval.limit: 16 -> 64 (a and b)" in line and "--any" in line
    assert len(reported(capsys, tmp_path, "--any")["configurations"]) == 2
    data = {"train": {"name": "easy_vqa", "limit": 3}, "eval": EVAL}  # trained on less, judged on the same
    write_run(tmp_path / "c", ["data.train.limit=3"], tree_of(data=data), {"exact_match": 0.1, **costs(1)})
    assert len(reported(capsys, tmp_path / "a", tmp_path / "c")["configurations"]) == 2


def test_a_report_replaces_only_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other = sweep(tmp_path / "s"), sweep(tmp_path / "t")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "holds other files" in refused(capsys, folder, "--output", out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    assert cli.main(["report", str(folder), "--output", str(out)]) == 0
    (out / "notes.txt").write_text("mine")
    curve = out / "figures" / "curve_eval_exact_match.png"
    assert curve.exists()
    assert "holds the report of ../s" in refused(capsys, other, "--output", out)
    assert cli.main(["report", str(folder), "--output", str(out), "--columns", "train/seconds"]) == 0
    assert not curve.exists() and (out / "notes.txt").read_text() == "mine"
    assert (out / "figures" / "curve_loss.png").exists()


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sweep(tmp_path / "s")
    (tmp_path / "file").write_text("")
    assert "is a file; choose a folder" in refused(capsys, folder, "--output", tmp_path / "file")
    assert "cannot be written: Not a directory" in refused(capsys, folder, "--output", tmp_path / "file" / "inner")


# ---------------------------------------------------------------- as a command


def test_the_command_leaves_torch_and_hydra_out(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s")
    code = (
        "import sys; from mllm_factory.cli import main; code = main(['report', sys.argv[1]]); "
        "sys.exit(code or [m for m in ('torch', 'hydra', 'omegaconf') if m in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_completion_knows_the_flags() -> None:
    from mllm_factory.completion import candidates

    assert candidates("mllm-factory report x --co") == ["--columns "]
    assert candidates("mllm-factory report outp") == []
    for flag in candidates("mllm-factory report --"):
        assert flag.strip() in cli.verb_usage("report")


@pytest.mark.slow
def test_a_real_sweep(run_cli: Run, tmp_path: Path) -> None:
    argv = ["experiment=smoke", "trainer.max_steps=2", "tuning=lora,projector_only", "hydra.sweep.dir=sweep"]
    assert run_cli("train", "-m", *argv).returncode == 0
    done = run_cli("report", "sweep", "--json", "--output", "out")
    found = json.loads(done.stdout)
    assert found["settings"] == ["tuning"] and len(found["configurations"]) == 2
    for configuration in found["configurations"]:
        (job,) = configuration["jobs"]
        told = json.loads((tmp_path / "sweep" / job / "report.json").read_text())
        assert configuration["values"]["exact_match"]["mean"] == told["exact_match"]
        assert configuration["values"]["parameters/trainable"]["mean"] == told["parameters/trainable"]
    by = {c["settings"]["tuning"]: c["best"] for c in found["configurations"]}
    assert "parameters/trainable" in by["projector_only"] and "parameters/trainable" not in by["lora"]
    assert (tmp_path / "out" / "figures" / "curve_loss.svg").stat().st_size > 2000


def test_configurations_are_named_by_keys_of_their_configs(tmp_path: Path) -> None:
    for i, name in enumerate(("see", "blind", "blind")):
        tree = tree_of(seed=i, name=name)
        write_run(tmp_path / str(i), [f"seed={i}"], tree, {"exact_match": i / 2, **costs(10)}, choices={})
    groups = make([str(tmp_path)], by=["name"]).groups
    assert [(dict(g.settings), g.done) for g in groups] == [({"name": "blind"}, 2), ({"name": "see"}, 1)]
    assert [g.done for g in make([str(tmp_path)]).groups] == [3]  # else the name makes no other configuration
    assert [list(g.settings.values()) for g in make([str(tmp_path)], by=["trainer.max_steps"]).groups] == [["4"]]
    with pytest.raises(UserError, match="--by: no run's config has 'nam'; did you mean 'name'"):
        make([str(tmp_path)], by=["nam"])
