"""The command line as a user meets it: verbs, exit codes, one line an error, machine-readable output, Hydra's own flags."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_factory import cli, names, presets, runs
from mllm_factory.errors import ConfigError, Problem, UserError
from mllm_factory.interfaces import KINDS
from mllm_factory.launch import of_checkpoint

Run = Callable[..., "subprocess.CompletedProcess[str]"]
CONF = Path(__file__).parent.parent / "conf"
BIN = Path(sys.executable).parent
SHORT = ["experiment=smoke", "trainer.max_steps=2", "data.eval.limit=4", "metrics=[answer_loss]"]


def errors(done: subprocess.CompletedProcess[str], code: int = 2) -> list[str]:
    """The error lines of a failed command, which are all that it printed on stderr."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines), done.stderr
    return [line.removeprefix("error: ") for line in lines]


# ---------------------------------------------------------------- help and mistakes


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {verb} ", shown, re.MULTILINE) for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: mllm-factory {verb} ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"mllm-factory \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["trian"], "there is no verb 'trian'; did you mean 'train'? known: check, "),
        (["train", "--confg-dir", "x"], "unrecognized arguments: --confg-dir"),
        (["train", "--cfg", "jobs"], "invalid choice: 'jobs'"),
        (["train", "--config-dir"], "expected one argument"),
        (["list", "visoin"], "there is no group or kind 'visoin'; did you mean 'vision'? known: "),
        (["list", "--config-dir", "nowhere"], "there is no folder 'nowhere'"),
        (["describe", "projector"], "describe takes a group or kind and a name"),
        (["describe", "projectr", "mlp"], "there is no group or kind 'projectr'; did you mean 'projector'?"),
        (["describe", "projector", "mpl"], "no projector preset is named 'mpl'; did you mean 'mlp'?"),
        (["describe", "Projector", "mpl"], "no Projector is named 'mpl'; did you mean 'mlp'?"),
        (["completion", "basch"], "completion takes a shell; did you mean 'bash'? known: bash, fish, zsh"),
        (["evaluate", "checkpoint=nowhere"], "there is no checkpoint at "),
        (["evaluate", "checkpoint=a,b"], "checkpoint: several checkpoints; add -m"),
        (["evaluate", "metrics=null", "data.eval=null"], "data.eval: a Source is a mapping with a 'name', got None"),
        (["train", "-m", "resume=auto", "seed=1,2"], "resume: continues one run, so it does not go with -m"),
        (["train", "-m", "vision=timm,null"], "vision: null cannot be one of several presets"),
        (
            ["train", "-m", "trainer.max_steps=1,x,y,2"],
            "trainer.max_steps: expected a whole number, got 'x' (from override",
        ),
        (["train", "-m", "projector=mlp,mpl"], "no projector preset is named 'mpl'"),
        (["train", "-m", "projctor=a,b"], "no key 'projctor'"),
        (["train", "resume=nowhere"], "there is no "),
    ],
)
def test_mistake(argv: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mllm-factory"])
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert all(line.startswith("error: ") for line in shown.err.splitlines())
    assert says in shown.err
    assert not list(tmp_path.iterdir()), "nothing was started"


def test_a_sweep_is_checked_before_it_starts(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ["-m", "trainer.max_steps=1,x", "projector.depth=1,y", "projector.hidden=3", "schedule.lr=1e-3,1e-2"]
    assert cli.main(["train", *sweep]) == 2
    keys = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()]
    assert sorted(keys) == ["projector.depth", "projector.hidden", "trainer.max_steps"]


def test_every_mistake_at_once_by_command(run_cli: Run, tmp_path: Path) -> None:
    done = run_cli("train", "tuning=lora", "tuning.backbone.rnk=4", "projctor=mlp", "trainer.max_steps=ten")
    found = errors(done)
    assert [line.partition(":")[0] for line in found] == ["tuning.backbone.rnk", "projctor", "trainer.max_steps"]
    assert "did you mean 'rank'?" in found[0]
    assert "did you mean 'projector'?" in found[1]
    assert found[2].endswith("(from override 'trainer.max_steps=ten')")
    assert (done.stdout, list(tmp_path.iterdir())) == ("", [])


def test_multi_line_messages_become_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    cli.show(UserError("two\n  lines"))
    cli.show(ConfigError([Problem("a\nb", "x"), Problem("c")]), "job 3: ")
    assert capsys.readouterr().err == "error: two lines\nerror: job 3: x: a b\nerror: job 3: c\n"


# ---------------------------------------------------------------- torch stays out, Hydra where it can


@pytest.mark.parametrize(
    ("argv", "hydra"),
    [
        (["--help"], False),
        (["train", "--help"], False),
        (["list"], False),
        (["list", "--components"], False),
        (["describe", "Tuning", "lora"], False),
        (["describe", "tuning", "lora"], False),
        (["completion", "bash"], False),
        (["completion", "--query", "mllm-factory describe Tu"], False),
        (["completion", "--query", "mllm-factory train visi"], True),
        (["train", "projctor=mlp"], True),
        (["evaluate", "checkpoint=nowhere"], True),
        (["check", "backbone=hf", "--json"], True),
    ],
)
def test_quick_verbs_do_not_import_torch(argv: list[str], hydra: bool, tmp_path: Path) -> None:
    code = (
        "import sys; from mllm_factory.cli import main; main(sys.argv[1:])\n"
        "print('loaded:', [name for name in ('torch', 'hydra') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == f"loaded: {['hydra'] if hydra else []}", done.stderr


# ---------------------------------------------------------------- list, describe, env


def test_list_json_has_the_files_on_disk(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == [
        "vision",
        "audio",
        "projector",
        "backbone",
        "tuning",
        "schedule",
        "data",
        "metrics",
        "experiment",
    ]
    assert shown == {group: sorted(f.stem for f in (CONF / group).glob("*.yaml")) for group in shown}
    assert shown["projector"]


def test_list_json_with_components(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--components", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["components"] == {kind: names(cls) for kind, cls in KINDS.items()}
    assert cli.main(["list", "Tuning", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"components": {"Tuning": names("Tuning")}}


def test_list_shows_the_first_comment(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "projector").mkdir()
    (tmp_path / "projector" / "mine.yaml").write_text("# @package projector\n# My own.\nname: mlp\n")
    assert cli.main(["list", "projector", "-cd", str(tmp_path)]) == 0
    assert re.search(r"^  mine +My own\.$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("group", [*presets.GROUPS, "trainer"])
def test_every_preset_can_be_described(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (CONF / group).glob("*.yaml"):
        assert cli.main(["describe", group, file.stem, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["yaml"] == file.read_text()
        assert cli.main(["describe", group, file.stem]) == 0
        assert file.read_text().rstrip() in capsys.readouterr().out


def test_every_component_can_be_described(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        for name in names(kind):
            assert cli.main(["describe", kind, name, "--json"]) == 0
            shown = json.loads(capsys.readouterr().out)
            assert (shown["kind"], shown["name"], shown["pack"]) == (kind, name, "builtin")
            assert shown["doc"]
            assert cli.main(["describe", kind, name]) == 0
            assert capsys.readouterr().out.startswith(f"{kind} {name}  ({shown['class']}, pack builtin)")


def test_description_of_a_component(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["describe", "Projector", "mlp", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["given"] == ["in_dim", "out_dim", "in_tokens"]
    assert "projector=mlp" in shown["presets"]
    depth = next(option for option in shown["options"] if option["name"] == "depth")
    comment = re.search(r"^depth: .*# (.*)$", (CONF / "projector" / "mlp.yaml").read_text(), re.MULTILINE)
    assert comment
    assert (depth["type"], depth["required"], depth["about"]) == ("int", False, comment[1])


@pytest.mark.slow
def test_env(run_cli: Run) -> None:
    import torch

    shown = json.loads(run_cli("env", "--json").stdout)
    assert shown["libraries"]["torch"] == torch.__version__.partition("+")[0]
    assert (shown["cuda"], shown["python"]) == (torch.cuda.is_available(), sys.version.split()[0])


# ---------------------------------------------------------------- check


def test_check_json_of_a_bad_tree(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "tuning.backbone.rnk=4", "backbone=hf", "--json"]) == 2
    shown = json.loads(capsys.readouterr().out)
    assert {key: shown[key] for key in ("ok", "parts", "total", "trainable", "tokens")} == {
        **{"ok": False, "parts": {}, "total": 0, "trainable": 0, "tokens": {}}
    }
    assert [(e["key"], e["origin"]) for e in shown["errors"]] == [
        ("tuning.backbone.rnk", "override 'tuning.backbone.rnk=4'"),
        ("backbone.pretrained", "conf/backbone/hf.yaml:5"),
    ]


@pytest.mark.slow
def test_check_json_counts_what_a_hand_count_gives(run_cli: Run) -> None:
    done = run_cli("check", "experiment=smoke", "projector.hidden_dim=8", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert list(shown)[:6] == ["ok", "errors", "parts", "total", "trainable", "tokens"]
    mlp = 64 * 8 + 8 + 8 * 32 + 32  # test_vit is 64 wide, the small decoder 32
    assert shown["parts"]["projector"] == {"name": "mlp", "total": mlp, "trainable": mlp}
    assert shown["parts"]["vision"]["trainable"] == 0
    assert shown["total"] == sum(part["total"] for part in shown["parts"].values())
    assert shown["tokens"] == {"vision": (32 // 16) ** 2}


@pytest.mark.slow
def test_what_only_building_shows_has_an_origin_too(run_cli: Run) -> None:
    done = run_cli("check", "experiment=smoke", "projector.depth=0", "vision.layer=77", "--json")
    shown = json.loads(done.stdout)
    assert done.returncode == 2
    assert shown["errors"]
    assert all(error["key"] and error["origin"] for error in shown["errors"])


# ---------------------------------------------------------------- a checkpoint's config


@pytest.fixture
def saved(tmp_path: Path, tree: Callable[..., dict[str, Any]]) -> Callable[..., str]:
    """``saved(metrics={})``: the folder of a checkpoint whose config is the smoke tree with changes; it has no weights."""

    def write(**changes: Any) -> str:
        folder = tmp_path / "checkpoints" / "step_000001"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({**tree(), **changes}))
        for name in ("model.safetensors", "trainer.pt", "README.md"):
            (folder / name).write_bytes(b"")
        (folder / "manifest.json").write_text(json.dumps(runs.manifest(folder)))
        return str(folder)

    return write


def of(folder: str, *overrides: str) -> tuple[dict[str, Any], list[str]]:
    """The tree of ``evaluate checkpoint=folder`` and its problems."""
    flags = argparse.Namespace(
        overrides=list(overrides), config_name=None, config_path=None, config_dir=None, multirun=False
    )
    composer, problems, trusted = of_checkpoint(folder, flags)
    composed = composer.compose(flags.overrides)
    return composed.tree or {}, [str(p) for p in [*problems, *composed.check(not trusted, evaluate=True)]]


def test_a_checkpoints_config_is_the_tree(saved: Callable[..., str], tree: Callable[..., dict[str, Any]]) -> None:
    folder, before = saved(seed=5), tree()
    now, problems = of(folder, "data.eval.limit=3", "trainer.eval_batch_size=2")
    assert problems == []
    assert (now["seed"], now["data"]["eval"]["limit"], now["trainer"]["eval_batch_size"]) == (5, 3, 2)
    assert (now["checkpoint"], now["resume"], now["init_from"]) == (folder, None, None)
    assert now["output_dir"].startswith("outputs/smoke/evaluate_20")
    same = ("vision", "audio", "projector", "backbone", "tuning", "schedule", "metrics")
    assert {key: now[key] for key in same} == {key: before[key] for key in same}


def test_data_metrics_and_trainer_can_be_chosen_anew(saved: Callable[..., str]) -> None:
    now, problems = of(saved(), "data=llava_json", "data.eval.path=x.json", "metrics=[answer_loss]", "trainer=default")
    assert problems == [], "the path of data.train does not matter"
    assert (now["data"]["eval"]["name"], list(now["metrics"])) == ("llava_json", ["answer_loss"])
    assert now["trainer"]["max_steps"] == 1000


def test_a_checkpoint_fixes_the_architecture(saved: Callable[..., str]) -> None:
    _, problems = of(
        saved(), "backbone=hf", "experiment=smoke", "vision=null", "projector.dpth=1", "seed=x", "tuning=lora"
    )
    assert [line.partition(":")[0] for line in problems] == [
        *("backbone", "experiment", "vision", "tuning", "projector.dpth", "seed")
    ]
    assert all("the checkpoint fixes this" in line for line in problems[:4])


def test_a_faulty_config_of_a_checkpoint_is_named_with_its_line(saved: Callable[..., str]) -> None:
    folder = saved(projector={"name": "mlp", "depht": 2})
    (problem,) = of(folder)[1]
    line = (Path(folder) / "config.yaml").read_text().splitlines().index("  depht: 2") + 1
    assert problem.startswith("projector.depht: mlp has no option 'depht'; did you mean 'depth'?")
    assert problem.endswith(f"config.yaml:{line})")


def test_a_checkpoint_cannot_trust_itself(saved: Callable[..., str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text("open('touched', 'w')\n")
    metric = {"name": "ablation", "score": {"name": "evil:Metric"}}
    folder = saved(trust_components=True, projector={"name": "evil:Projector"}, metrics={"a": metric})
    for verb in ("evaluate", "check"):
        assert cli.main([verb, f"checkpoint={folder}"]) == 2
        shown = capsys.readouterr().err.splitlines()
        assert [line.split(": ")[1] for line in shown] == ["projector.name", "metrics.a.score.name"]
        assert all("is a class outside the registry; add trust_components=true to allow" in line for line in shown)
    assert not (tmp_path / "touched").exists()
    assert cli.main(["check", f"checkpoint={folder}", "trust_components=true"]) == 2
    assert "module 'evil' has no class" in capsys.readouterr().err
    assert (tmp_path / "touched").exists(), "trusted, so it was imported"


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a\\${name}", "\\\\${x} ${", "${now:%Y}"])
def test_text_of_a_checkpoint_stays_text(saved: Callable[..., str], text: str) -> None:
    now, _ = of(saved(init_from=text, backbone={"name": "hf", "architecture": text}))
    assert now["backbone"]["architecture"] == text


# ---------------------------------------------------------------- Hydra's own flags


def test_cfg_prints_the_tree(run_cli: Run, tmp_path: Path) -> None:
    done = run_cli("train", "trainer.max_steps=3", "--cfg", "job", "projector=null", "--resolve")
    tree = yaml.safe_load(done.stdout)
    assert done.returncode == 0, done.stderr
    assert (tree["trainer"]["max_steps"], tree["name"], "projector" in tree) == (3, "mllm", False)
    assert run_cli("train", "--cfg", "job", "--package", "projector").stdout.startswith(
        "# @package projector\nname: mlp\n"
    )
    assert errors(run_cli("train", "--cfg", "job", "projctor=3"))[0].startswith("projctor: no key")
    assert list(tmp_path.iterdir()) == []


def test_info_and_hydra_help(run_cli: Run) -> None:
    assert "conf" in run_cli("train", "--info", "searchpath").stdout
    assert "Hydra" in run_cli("train", "--hydra-help").stdout


# ---------------------------------------------------------------- completion


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mllm-factory tr", ["train "]),
        ("mllm-factory train visi", ["vision.", "vision="]),
        ("mllm-factory train projector=r", ["projector=resampler"]),
        ("mllm-factory train tuning=lora tuning.backbone.ra", ["tuning.backbone.rank="]),
        ("mllm-factory evaluate check", ["checkpoint="]),
        ("mllm-factory describe Tuning fu", ["full "]),
        ("mllm-factory list sch", ["schedule "]),
        ("mllm-factory completion z", ["zsh"]),
        ("mllm-factory nonsense x", []),
    ],
)
def test_candidates(line: str, words: list[str]) -> None:
    from mllm_factory.completion import candidates

    assert candidates(line) == words


def test_candidates_of_a_folder_of_ones_own(tmp_path: Path) -> None:
    from mllm_factory.completion import candidates

    (tmp_path / "projector").mkdir()
    (tmp_path / "projector" / "mine.yaml").write_text("name: mlp\n")
    assert candidates(f"mllm-factory train --config-dir {tmp_path} projector=mi") == ["projector=mine"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("breaks", "words", "reply"),
    [
        (" ", ["mllm-factory", "train", "visi"], "vision. vision="),
        (" =", ["mllm-factory", "train", "projector", "=", "r"], "resampler"),
        (" ", ["mllm-factory", "train", "projector=r"], "projector=resampler"),
        (" ", ["mllm-factory", "desc"], "describe"),
    ],
)
def test_completion_in_bash(breaks: str, words: list[str], reply: str) -> None:
    line = " ".join(words).replace(" = ", "=").replace(" =", "=")
    quoted = " ".join(f"'{word}'" for word in words)
    script = f"""
        eval "$(mllm-factory completion bash)"
        COMP_WORDBREAKS='{breaks}' COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1}
        COMP_LINE='{line}' COMP_POINT={len(line)}
        "$(complete -p mllm-factory | sed 's/.*-F \\([^ ]*\\).*/\\1/')"
        echo "${{COMPREPLY[@]}}"
        """
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == reply, done.stderr


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in its own folder."""
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-m", "mllm_factory", "train", *SHORT, "output_dir=run"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
    return folder / "run"


@pytest.mark.slow
def test_train_writes_into_its_folder(trained: Path) -> None:
    assert json.loads((trained / "report.json").read_text())["train/steps"] == 2
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    assert Path(saved["output_dir"]) == trained
    assert (trained / ".hydra" / "overrides.yaml").read_text().splitlines() == [
        f"- {o}" for o in [*SHORT, "output_dir=run"]
    ]
    assert (trained / "train.log").exists()


@pytest.mark.slow
def test_evaluate_a_checkpoint_with_other_metrics_and_data(trained: Path, run_cli: Run, tmp_path: Path) -> None:
    plain = run_cli("evaluate", f"checkpoint={trained}", "output_dir=again")
    assert plain.returncode == 0, plain.stderr
    before = json.loads((trained / "report.json").read_text())
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert again["answer_loss"] == pytest.approx(before["answer_loss"], abs=1e-6)

    changed = run_cli(
        "evaluate", f"checkpoint={trained}", "data=easy_vqa", "data.eval.limit=3", "metrics=[exact_match]"
    )
    assert changed.returncode == 0, changed.stderr
    (report,) = (tmp_path / "outputs" / "smoke").glob("evaluate_*/report.json")
    shown = json.loads(report.read_text())
    assert shown["samples"] == 3
    assert "exact_match" in shown
    assert "answer_loss" not in shown


@pytest.mark.slow
def test_several_checkpoints(trained: Path, run_cli: Run, tmp_path: Path) -> None:
    step = next(trained.glob("checkpoints/step_*"))
    done = run_cli("evaluate", "-m", f"checkpoint={trained},{step}")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "outputs" / "smoke").glob("evaluate_*/report.json"))) == 2


@pytest.mark.slow
def test_in_a_sweep_a_failing_job_does_not_stop_the_others(run_cli: Run, tmp_path: Path) -> None:
    sweep = ["vision.architecture=no_such_model,test_vit", "hydra.sweep.dir=sweep"]
    done = run_cli("train", "-m", *SHORT, *sweep)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: job 0: ")]
    assert not (tmp_path / "sweep" / "0" / "report.json").exists()
    report = json.loads((tmp_path / "sweep" / "1" / "report.json").read_text())
    assert report["train/steps"] == 2
    assert yaml.safe_load((tmp_path / "sweep" / "1" / "config.yaml").read_text())["output_dir"] == str(
        tmp_path / "sweep" / "1"
    )


@pytest.mark.slow
def test_an_error_in_a_run_is_one_line_with_its_origin(run_cli: Run) -> None:
    (found,) = errors(run_cli("train", *SHORT, "vision.architecture=no_such_model"))
    assert found.startswith("vision")
    assert "(from override 'vision.architecture=no_such_model')" in found or "(from conf/" in found


@pytest.mark.slow
def test_resume_goes_on_in_the_same_folder(trained: Path, run_cli: Run, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    done = run_cli("train", *SHORT, "resume=run", "trainer.max_steps=3")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "report.json").read_text())["train/steps"] == 3
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_interrupt_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mllm_factory", "train", *SHORT, "trainer.max_steps=100000", "output_dir=run"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in a shell's background ignore it
    )
    file = tmp_path / "run" / "metrics.jsonl"
    for _ in range(1200):
        if file.exists() and file.read_text().count("\n") > 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr


# ---------------------------------------------------------------- cost


def cpu(*command: str, cwd: Path) -> float:
    """CPU seconds of a process, the best of three."""

    def once() -> float:
        before = os.times()
        subprocess.run(command, cwd=cwd, capture_output=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    return min(once() for _ in range(3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "mark"),
    [
        (["--help"], 0.4),
        (["list"], 0.6),
        (["completion", "--query", "mllm-factory train projector="], 1.3),
        (["train", "tuning.backbone.rnk=4", "projctor=mlp", "trainer.max_steps=ten"], 1.4),
    ],
)
def test_quick_verbs_cost_little_more_than_hydra(argv: list[str], mark: float, tmp_path: Path) -> None:
    """Relative to a process in which Hydra composes the same tree and nothing else, as machines differ."""
    code = (
        "from hydra import compose, initialize_config_module\n"
        "with initialize_config_module('mllm_factory.conf', version_base='1.3'): compose('train', ['projector=mlp'])"
    )
    bare = cpu(sys.executable, "-c", code, cwd=tmp_path)
    assert cpu(sys.executable, "-m", "mllm_factory", *argv, cwd=tmp_path) < mark * bare
