"""Searches: what Optuna asks for runs as jobs, and what jobs report is told to Optuna, through any end. Jobs cost milliseconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from mllm_factory import cli, sweep_command
from mllm_factory.errors import ConfigError, UserError
from mllm_factory.sweep_backends import Options
from mllm_factory.sweep_command import Call
from mllm_factory.sweep_jobs import Job
from mllm_factory.sweep_search import RESULTS, Search
from mllm_factory.sweep_space import Choice, Numbers, one_by_one, space_of
from mllm_factory.sweep_study import JOURNAL, SearchOptions

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.WARNING)
PLANE = {"x": Numbers(-1.0, 1.0, None, False), "n": Numbers(1, 9, 1, False)}
SCORE = "values = {'score': (given['x'] - 0.3) ** 2 + (given['n'] - 4) ** 2 / 100}\n"
TREE = {"name": "toy", "metrics": {"score": {}}}


def value(text: str) -> Any:
    return yaml.safe_load(text)


def search(folder: Path, space: Mapping[str, Any] = PLANE, code: str = SCORE, jobs: int = 1, **options: Any) -> Any:
    """A search whose jobs run Python code: ``given`` holds their parameters, ``values`` becomes their report."""

    def plan(number: int, words: Sequence[str]) -> Job:
        given = {key: value(text) for key, text in (word.split("=", 1) for word in words)}
        own = folder / str(number)
        text = (
            f"import json, os, time\nos.chdir({str(own)!r})\nopen('starts', 'a').write('x')\ngiven = {given!r}\n{code}"
        )
        text += "json.dump(values, open('report.json', 'w'))\n"
        tree = {**TREE, "output_dir": str(own), "given": given}
        return Job(number, own, list(words), [sys.executable, "-c", text], tree)

    lines: list[str] = []
    wanted = SearchOptions(**{"objectives": {"score": "minimize"}, "trials": 8, **options})
    found = Search(folder, space, dict(TREE), wanted, Options(jobs=jobs), plan, Call("train"), lines.append)
    found.lines = lines
    return found


def record(folder: Path) -> dict[str, Any]:
    file = folder / "job.json"
    return json.loads(file.read_text()) if file.exists() else {}


def folders(sweep: Path) -> list[Path]:
    return sorted((path.parent for path in sweep.glob("*/job.json")), key=lambda path: int(path.name))


def states(study: Any) -> list[str]:
    return [trial.state.name for trial in study.trials]


# ---------------------------------------------------------------- what is searched


def test_a_space_is_read_from_hydras_grammar() -> None:
    words = {
        "a=1,2": Choice(("1", "2")),
        "tuning=lora,mores": Choice(("lora", "mores")),
        "b=choice(x,'y z')": Choice(("x", "y\\ z")),
        "c=range(1,8,3)": Numbers(1, 7, 3, False),
        "d=range(8,1,-3)": Numbers(2, 8, 3, False),
        "e=interval(1,2)": Numbers(1.0, 2.0, None, False),
        "f=int(interval(2,64))": Numbers(2, 64, None, False),
        "g=tag(log,interval(1e-4,1e-2))": Numbers(1e-4, 1e-2, None, True),
        "+h=tag(log,int(interval(1,8)))": Numbers(1, 8, None, True),
    }
    parsed = OverridesParser.create().parse_overrides([*words, "fixed=3"])
    assert list(space_of(parsed).values()) == list(words.values())
    assert list(space_of(parsed))[-1] == "+h"
    assert Numbers(2, 64, None, False).whole and not Numbers(1.0, 2.0, None, False).whole


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a=1"], "nothing to search"),
        (["a=interval(2,1)"], "a: expected a start below the end, got 2.0 and 1.0"),
        (["a=tag(log,interval(0,1))"], "on a logarithmic scale values start above 0, got 0.0"),
        (["a=tag(log,range(1,9,2))"], "a logarithmic scale has no steps, got 2"),
        (["a=range(3,1)"], "the range is empty"),
    ],
)
def test_a_space_that_cannot_be(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        space_of(OverridesParser.create().parse_overrides(words))


def test_every_value_is_checked_once_before_the_start() -> None:
    parsed = OverridesParser.create().parse_overrides(["a=1,2,3", "s=0", "b=interval(0,1)"])
    assert one_by_one(parsed) == [
        ["s=0", "a=1", "b=0.0"],
        ["s=0", "a=2", "b=0.0"],
        ["s=0", "a=3", "b=0.0"],
        ["s=0", "a=1", "b=1.0"],
    ]


# ---------------------------------------------------------------- asking and telling


def test_it_asks_what_optuna_alone_asks(tmp_path: Path) -> None:
    """The reference is Optuna's own loop with the same sampler on the same function."""
    study = search(tmp_path, trials=14, seed=5).run()

    def objective(trial: Any) -> float:
        x, n = trial.suggest_float("x", -1.0, 1.0), trial.suggest_int("n", 1, 9)
        return (x - 0.3) ** 2 + (n - 4) ** 2 / 100

    reference = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=5))
    reference.optimize(objective, n_trials=14)
    assert [t.params for t in study.trials] == [t.params for t in reference.trials]
    assert [t.value for t in study.trials] == pytest.approx([t.value for t in reference.trials], rel=1e-12)
    results = yaml.safe_load((tmp_path / RESULTS).read_text())
    assert results["best_evaluated_params"] == reference.best_params
    assert results["best_evaluated_result"] == pytest.approx(reference.best_value)
    assert record(tmp_path / str(results["job"]))["config"]["given"] == reference.best_params


def test_several_objectives_give_a_front(tmp_path: Path) -> None:
    code = "values = {'gain': given['x'], 'cost': given['x'] ** 2 if given['n'] < 5 else given['x'] ** 2 + 1}\n"
    aims = {"gain": "maximize", "cost": "minimize"}
    study = search(tmp_path, code=code, objectives=aims, trials=12, jobs=2).run()
    points = [tuple(t.values) for t in study.trials]
    assert len(points) == 12
    front = {p for p in points if not any(q[0] >= p[0] and q[1] <= p[1] and q != p for q in points)}
    found = yaml.safe_load((tmp_path / RESULTS).read_text())["solutions"]
    assert {tuple(s["values"]) for s in found} == front
    with pytest.raises(ConfigError, match=r"search.pruner: cannot judge several objectives"):
        search(tmp_path / "b", objectives=aims, pruner="median").run()


def test_what_was_done_is_not_done_again(tmp_path: Path) -> None:
    few = {"a": Choice(("1", "2")), "b": Choice(("3", "4"))}
    study = search(tmp_path, few, "values = {'score': given['a'] * given['b']}\n", trials=15, jobs=2).run()
    assert states(study) == ["COMPLETE"] * 15
    assert 1 <= len(folders(tmp_path)) <= 4
    assert all((folder / "starts").read_text() == "x" for folder in folders(tmp_path))
    for trial in study.trials:
        assert trial.value == int(trial.params["a"]) * int(trial.params["b"])


def test_jobs_at_a_time(tmp_path: Path) -> None:
    code = "begin = time.time(); time.sleep(0.3); values = {'score': 0.0, 'begin': begin, 'end': time.time()}\n"
    search(tmp_path, code=code, trials=6, jobs=2).run()
    ran = [json.loads((folder / "report.json").read_text()) for folder in folders(tmp_path)]
    overlaps = [sum(b["begin"] <= a["begin"] < b["end"] for b in ran) for a in ran]
    assert len(ran) == 6 and max(overlaps) == 2


def test_bad_trials_are_pruned(tmp_path: Path) -> None:
    """Optuna's rule: worse at a step than the median of the earlier trials, here 1, 2 and 3."""
    code = (
        "for step in range(1, 6):\n"
        "    print(json.dumps({'step': step, 'loss': given['n'] + 1 / step}), file=open('metrics.jsonl', 'a'))\n"
        "if given['n'] > 5: time.sleep(600)\n"
        "values = {'score': -given['n']}\n"
    )
    few = {"n": Choice(("1", "2", "3", "8", "9"))}
    given: dict[str, Any] = {"objectives": {"score": "maximize"}, "watch": {"loss": "minimize"}, "pruner": "median"}
    given |= {"pruner_options": {"n_startup_trials": 3}, "trials": 3, "sampler": "random"}
    first = search(
        tmp_path, {"n": Choice(("1", "2", "3"))}, code, **{**given, "pruner": None, "watch": {}, "trials": 9}
    )
    first.run()
    assert len(folders(tmp_path)) == 3
    (tmp_path / JOURNAL).unlink()  # what is done is read from the folders, so that bad ones certainly come later
    bad = search(tmp_path, few, code, **{**given, "trials": 14})
    study = bad.run()
    pruned = [t for t in study.trials if t.state.name == "PRUNED"]
    assert pruned and {t.params["n"] for t in pruned} <= {"8", "9"}
    for trial in pruned:
        if "same_as" not in trial.user_attrs:
            told = record(tmp_path / str(trial.user_attrs["job"]))
            assert told["status"] == "pruned" and told["cause"].startswith("pruned at step ")
    assert any(" pruned (" in line for line in bad.lines)


# ---------------------------------------------------------------- failures


def test_failed_trials_do_not_stop_a_search_until_there_are_too_many(tmp_path: Path) -> None:
    code = "if given['n'] % 2: raise ValueError('odd')\n" + SCORE
    study = search(tmp_path / "a", code=code, trials=5, failures=50).run()
    assert states(study).count("COMPLETE") == 5 and states(study).count("FAIL") >= 1
    assert all(t.params["n"] % 2 for t in study.trials if t.state.name == "FAIL")
    with pytest.raises(UserError, match=r"2 trials failed, the last one: ValueError: odd; .*sweep.resume="):
        search(tmp_path / "b", code="raise ValueError('odd')\n", failures=1).run()


def test_an_objective_that_no_report_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search.objectives: .*report.json has no 'scor'; did you mean 'score'"):
        search(tmp_path, objectives={"scor": "minimize"}).run()
    nan = search(tmp_path / "nan", code="values = {'score': None}\n", failures=0)
    with pytest.raises(UserError, match="score is no number"):
        nan.run()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"trials": 0}, "search.trials: expected 1 or more, got 0"),
        ({"sampler": "tpee"}, "search.sampler: there is no sampler 'tpee'; did you mean 'tpe'?"),
        ({"pruner": "med"}, "search.pruner: there is no pruner 'med'"),
        ({"objectives": {"score": "min"}}, "search.objectives.score: 'min' is no way; did you mean 'minimize'?"),
        ({"watch": {"loss": "minimize"}}, "search.watch: is for a pruner"),
        ({"objectives": {}}, "search.objectives: 'score' does not say which way is better"),
        ({"sampler_options": {"gama": 1}}, "search.sampler_options: TPESampler: .*gama"),
        ({"pruner": "median", "pruner_options": {"n_warmup": 1}}, "search.pruner_options: MedianPruner: .*n_warmup"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        search(tmp_path, **options).run()
    assert not folders(tmp_path)


def test_a_folder_of_another_search_is_refused(tmp_path: Path) -> None:
    search(tmp_path, trials=1).run()
    with pytest.raises(ConfigError, match=r"holds another search: space.x.high: 1.0 -> 2.0; give the overrides"):
        search(tmp_path, {**PLANE, "x": Numbers(-1.0, 2.0, None, False)}, trials=2).run()
    with pytest.raises(ConfigError, match=r"holds another search: objectives.score: 'minimize' -> 'maximize'"):
        search(tmp_path, objectives={"score": "maximize"}).run()
    more = search(tmp_path, trials=3)
    assert states(more.run()) == ["COMPLETE"] * 3
    assert more.lines[0] == "1 of 3 trials are done already"


# ---------------------------------------------------------------- again


def test_a_damaged_journal(tmp_path: Path) -> None:
    params = [t.params for t in search(tmp_path, trials=4).run().trials]
    journal = tmp_path / JOURNAL
    with journal.open("ab") as file:
        file.write(b'{"op_code":5,"wor')
    (tmp_path / f"{JOURNAL}.lock").symlink_to(journal)
    began = time.monotonic()
    assert len(search(tmp_path, trials=5).run().trials) == 5, "a cut last line and a left lock are taken off"
    assert time.monotonic() - began < 20

    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b"no json\n", *lines[3:]]))
    with pytest.raises(ConfigError, match=r"study.journal is damaged: line 4 is no JSON; move it away"):
        search(tmp_path, trials=6).run()
    journal.write_bytes(b"".join(lines[2:]))
    study = search(tmp_path, trials=5).run()
    assert states(study).count("COMPLETE") == 5
    assert {t.user_attrs.get("job") for t in study.trials} >= {0, 1, 2, 3}, (
        "a lost beginning is made good from the folders"
    )
    journal.unlink()
    again = search(tmp_path, trials=6).run()
    assert [t.params for t in again.trials][:4] == params
    assert states(again) == ["COMPLETE"] * 6
    assert [(folder / "starts").read_text() for folder in folders(tmp_path)] == ["x"] * 6


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_sweep_search import search
search(Path({folder!r}), code={code!r}, jobs=2, trials=6).run()
"""


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_kill_9_of_a_search_and_resume(tmp_path: Path) -> None:
    """Three trials end; of the two that run then one is asked again, and one ends between the kill and the resume."""
    sweep = tmp_path / "sweep"
    code = "if int(os.path.basename(os.getcwd())) > 2 and not os.path.exists('../../go'): time.sleep(600)\n" + SCORE
    text = DRIVER.format(tests=str(Path(__file__).parent), folder=str(sweep), code=code)
    driver = subprocess.Popen([sys.executable, "-c", text])
    until(lambda: all((sweep / n / "starts").exists() for n in "34"))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    until(lambda: all(record(sweep / n)["status"] == "interrupted" for n in "34"))
    before = {n: record(sweep / n)["config"]["given"] for n in "34"}
    assert [record(sweep / n)["status"] for n in "012"] == ["done"] * 3

    (tmp_path / "go").touch()
    done = json.loads((sweep / "0" / "report.json").read_text())
    (sweep / "4" / "report.json").write_text(json.dumps(done))
    told = record(sweep / "4") | {"status": "done", "exit_code": 0}
    (sweep / "4" / "job.json").write_text(json.dumps(told))

    study = search(sweep, code=code, jobs=2, trials=6).run()
    assert sorted(states(study)) == ["COMPLETE"] * 6 + ["FAIL"] * 2
    assert {n: record(sweep / n)["config"]["given"] for n in "34"} == before
    again = {t.user_attrs["job"]: t for t in study.trials if "again" in t.user_attrs}
    assert {str(n): t.params for n, t in again.items()} == before
    assert [study.trials[t.user_attrs["again"]].state.name for t in again.values()] == ["FAIL"] * 2
    assert [(sweep / n / "starts").read_text() for n in "0345"] == ["x"] * 4, "a folder without a checkpoint is emptied"
    assert record(sweep / "0")["attempts"] == record(sweep / "4")["attempts"] == 1
    assert record(sweep / "3")["attempts"] == 2 and len(folders(sweep)) == 6
    assert again[4].value == done["score"]


# ---------------------------------------------------------------- the command line


def test_options_of_a_search_choose_the_sweeper() -> None:
    given = [
        "schedule.lr=interval(1e-4,1e-2)",
        "search.trials=3",
        "+search.pruner_options.n=1",
        "search.watch={a: minimize}",
    ]
    overrides, _ = sweep_command.split(given, True)
    assert overrides[:2] == ["hydra/sweeper=search", "schedule.lr=interval(1e-4,1e-2)"]
    assert overrides[2:] == [
        "hydra.sweeper.trials=3",
        "+hydra.sweeper.pruner_options.n=1",
        "++hydra.sweeper.watch={a: minimize}",
    ]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["search.trials=2"], "search.trials: is an option of sweeps; add -m"),
        (["-m", "seed=1,2", "search.trails=2"], "hydra.sweeper.trails: "),
        (["-m", "seed=1,2", "search.trials=0"], "search.trials: expected 1 or more, got 0"),
        (["-m", "projector.dpth=1,2", "search.trials=2"], "no key 'dpth' in projector; did you mean 'depth'?"),
        (["-m", "projector.depth=interval(1,2)", "search.trials=2"], "projector.depth: expected a whole number"),
        (["-m", "projector=mlp,mpl", "search.trials=2"], "no projector preset is named 'mpl'"),
        (["-m", "search.trials=2"], "there is nothing to search"),
        (["-m", "seed=1,2", "search.trials=2", "metrics=null"], "search.objectives: there are no metrics"),
        (["-m", "seed=1,2", "search.trials=2", "hydra/launcher=basic"], "use hydra/launcher=processes"),
    ],
)
def test_mistakes(argv: list[str], says: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mllm-factory"])
    assert cli.main(["train", "experiment=smoke", *argv]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.rglob("job.json")), "nothing was started"


@pytest.mark.slow
def test_a_real_search(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mllm_factory", "train", "-m", "experiment=smoke", "trainer.max_steps=4"]
    command += ["metrics=[answer_loss]", "schedule.lr=tag(log,interval(1e-4,1e-1))", "search.trials=3", "sweep.jobs=2"]
    command += [
        "search.objectives={answer_loss: minimize, parameters/trainable: minimize}",
        "tuning=full,projector_only",
    ]
    done = subprocess.run(
        [*command, "hydra.sweep.dir=sweep"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load((tmp_path / "sweep" / RESULTS).read_text())
    for solution in found["solutions"]:
        report = json.loads((tmp_path / "sweep" / str(solution["job"]) / "report.json").read_text())
        assert solution["values"] == [report["answer_loss"], report["parameters/trainable"]]
    assert os.path.exists(tmp_path / "sweep" / "multirun.yaml")
    again = [sys.executable, "-m", "mllm_factory", "train", "-m", "sweep.resume=sweep", "search.trials=4"]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "3 of 4 trials are done already" in done.stdout, done.stderr
    assert (tmp_path / "sweep" / "3" / "report.json").exists()
