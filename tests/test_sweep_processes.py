"""Jobs of a sweep that are several processes: how torchrun starts them, how they end, and that none is left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs as processes
import pytest
from hydra_plugins.mllm_factory.processes import ProcessesLauncher
from omegaconf import OmegaConf
from test_distributed import together
from test_sweep import REPORT, TREE, alive, drive, job, record, run, running, until

from mllm_factory import cli, runs, sweep, sweep_command, sweep_job, torchrun
from mllm_factory.errors import ConfigError
from mllm_factory.sweep_backends import Options
from mllm_factory.sweep_command import Call

# ---------------------------------------------------------------- options


def test_threads_are_shared_by_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Options(processes=1).cores == Options().cores == cores
    assert Options(processes=cores).cores == 1
    assert Options(processes=2).cores == max(1, cores // 2)
    assert Options(processes=2, jobs=2).env["OMP_NUM_THREADS"] == str(max(1, cores // 4))
    assert (Options(threads=1).width, Options(threads=1, processes=cores).width) == (cores, 1)


@pytest.mark.parametrize("devices", [["0,1", "2,3,4"], [[0, 1], [2, 3, 4]]])
def test_a_job_takes_a_group_of_devices(devices: list[Any]) -> None:
    given = OmegaConf.create({"devices": devices, "options": {}})
    launcher = ProcessesLauncher("threads", 2, 2, None, given.devices, False, given.options)
    launcher.options().check()
    assert launcher.options().groups == ["0,1", "2,3,4"]
    with pytest.raises(ConfigError, match=r"a job of 3 processes takes 3 devices, got '0,1'; name them together"):
        Options(processes=3, devices=launcher.options().devices).check()


def test_how_many_processes_is_no_part_of_what_a_job_is(tmp_path: Path) -> None:
    one = job(0, tmp_path)
    two = dataclasses.replace(one, processes=2)
    assert one.key == two.key
    assert (one.record()["processes"], two.record()["processes"]) == (1, 2)
    call, overrides = Call("train", ["--config-name", "a"], [], []), ["seed=1"]
    assert sweep_command.command(call, overrides)[1:] == ["-m", "mllm_factory", "train", "--config-name", "a", "seed=1"]
    several = sweep_command.command(call, overrides, 2)
    assert several[:3] == [sys.executable, "-m", "torch.distributed.run"] and "--nproc_per_node=2" in several
    assert several[-6:] == sweep_command.command(call, overrides)[1:]

    told: list[str] = []
    for given in (one, two):
        told.append(">")
        assert sweep.run(tmp_path, [given], Options(processes=given.processes), call, told.append)[0].status == "done"
    assert [text.partition(": ")[0] for text in told if "threads each" not in text] == [
        *(">", "job 0 done 0.5 (1/1)"),
        *(">", "2 processes a job from now on; jobs so far of another number", "1 of 1 jobs are done already"),
    ]
    assert told[-2].endswith(": 0 (1)")


@pytest.mark.parametrize(
    ("verb", "argv", "env", "says"),
    [
        ("train", ["sweep.processes=0"], {}, "sweep.processes: expected 1 or more, got 0"),
        (
            "train",
            ["sweep.processes=2", "sweep.devices=[0,1]"],
            {},
            "sweep.devices: a job of 2 processes takes 2 devices",
        ),
        ("train", [], {"WORLD_SIZE": "2"}, "-m cannot run under torchrun; sweep.processes starts it for each job"),
        (
            "evaluate",
            ["sweep.processes=2"],
            {},
            "sweep.processes: every process would evaluate everything; leave it out",
        ),
        ("train", ["sweep.processes=2", "hydra/launcher=basic"], {}, "hydra.launcher.processes: "),
    ],
)
def test_mistakes(
    verb: str,
    argv: list[str],
    env: dict[str, str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mllm-factory"])
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    assert cli.main([verb, "-m", "experiment=smoke", "seed=1,2", *argv]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and told[0].startswith(f"error: {says}")
    assert not list(tmp_path.rglob("job.json")), "nothing was started"


# ---------------------------------------------------------------- nothing is left behind

WORKERS = (
    "import subprocess, sys, time\n"
    'child = "import os, subprocess, sys, time; '
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', *sys.argv[1:]], start_new_session=True); "
    "open(sys.argv[2], 'w').close(); time.sleep(600)\"\n"
    "if not os.path.exists('../go'):\n"
    "    for n in '01':\n"
    "        subprocess.Popen([sys.executable, '-c', child, os.getcwd(), f'worker_{n}'], start_new_session=True)\n"
    "    while not (os.path.exists('worker_0') and os.path.exists('worker_1')): time.sleep(0.02)\n"
    "    open('up', 'w').write(str(os.getpid()))\n"
    "    if not os.path.exists('../leave'): time.sleep(600)\n" + REPORT
)
"""Two processes in sessions of their own, as torchrun starts them, each with a child in another one."""


@pytest.mark.parametrize("victim", ["driver", "job", "nobody"])
def test_what_a_job_starts_in_other_sessions_ends_with_it(victim: str, tmp_path: Path) -> None:
    if victim == "nobody":
        (tmp_path / "leave").touch()
    driver = drive(tmp_path, WORKERS)
    until(lambda: all((tmp_path / n / "up").exists() for n in "01"))
    if victim == "nobody":
        assert driver.wait(60) == 0
        assert [record(tmp_path / str(n))["status"] for n in range(3)] == ["done"] * 3
    else:
        assert len(alive(tmp_path)) == 12, "two keepers, two jobs, four workers, four children of these"
        (tmp_path / "go").touch()
        (driver.kill if victim == "driver" else lambda: os.kill(int((tmp_path / "0" / "up").read_text()), 9))()
        until(lambda: record(tmp_path / "0")["status"] == "interrupted", 15)
        keeper = record(tmp_path / "0")["pid"]
        assert running(str(tmp_path / "0")) in ([], [keeper]), "job.json says so when all of it has ended"
    if victim == "job":
        assert record(tmp_path / "0")["cause"] == "ended by SIGKILL; was memory short?"
        assert len(running(str(tmp_path / "1"))) == 6, "no other job ends with it"
        driver.kill()
    driver.wait()
    until(lambda: not alive(tmp_path), 15)


JOINED = "import sys, time; from mllm_factory import distributed\nwith distributed.joined('cpu', 5): open(sys.argv[1], 'w').close(); time.sleep(600)"
TRAIN = ["train", "experiment=smoke", "trainer.max_steps=100000", "metrics=null", "trainer.workers=0"]


@pytest.mark.slow
def test_a_process_ends_with_torchrun_even_after_kill_9(tmp_path: Path) -> None:
    """Its environment says that torchrun started it; the same process without goes on."""
    workers = {
        "own": [sys.executable, "-c", JOINED, str(tmp_path / "own")],
        "cli": [sys.executable, "-m", "mllm_factory", *TRAIN, f"hydra.run.dir={tmp_path / 'cli'}"],
        "bare": [sys.executable, "-c", JOINED, str(tmp_path / "bare")],
    }
    code = (
        "import os, subprocess, sys, time\n"
        f"for name, command in {workers!r}.items():\n"
        "    env = {} if name == 'bare' else {'TORCHELASTIC_RUN_ID': 'x'}\n"
        "    subprocess.Popen(command, start_new_session=True, env={**os.environ, **env})\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as parent:
        own = (str(tmp_path / "own"), str(tmp_path / "bare"), f"hydra.run.dir={tmp_path / 'cli'}")
        until(lambda: all((tmp_path / name).exists() for name in workers), 120)
        (bare,) = [n for n in running(own[1]) if n != parent.pid]
        parent.kill()
    until(lambda: not running(own[0]) and not running(own[2]), 5)
    assert running(own[1]) == [bare]
    os.kill(bare, signal.SIGKILL)


# ---------------------------------------------------------------- how several processes end

OTHER = (
    "error: process 0 stopped because another one did; the cause is in that one's output (Connection closed by peer)"
)
ENDS = {
    "raises": ("raise ValueError('broken')", "time.sleep(60)", "failed", 1, "ValueError: broken"),
    "is refused": (
        "print('error: projector: no', flush=True); sys.exit(2)",
        f"time.sleep(0.2); print({OTHER!r}, flush=True); sys.exit(2)",
        *("failed", 2, "projector: no"),
    ),
    "is killed": (
        "os.kill(os.getpid(), 9)",
        "time.sleep(60)",
        "interrupted",
        -9,
        "ended by SIGKILL; was memory short?",
    ),
    "crashes": ("os.kill(os.getpid(), 11)", "time.sleep(60)", "failed", -11, "ended by SIGSEGV"),
    "is silent": ("print('last words', flush=True); os._exit(9)", "time.sleep(60)", "failed", 9, "last words"),
    "torchrun is asked to end": ("os.kill(os.getppid(), 15)", "time.sleep(60)", "interrupted", 143, "ended by SIGTERM"),
    "ends as announced": ("sys.exit(143)", "sys.exit(143)", "interrupted", 143, "ended by SIGTERM"),
    "does it": (f"os.chdir(FOLDER); {REPORT}", "pass", "done", 0, None),
}


@pytest.mark.slow
def test_the_cause_is_that_of_the_process_that_ended_first(tmp_path: Path) -> None:
    start = [*torchrun.command(2, 5), "--no_python", sys.executable, "-c"]
    jobs = []
    for number, (second, first, *_) in enumerate(ENDS.values()):
        own = tmp_path / str(number)
        code = f"import os, sys, time\nFOLDER = {str(own)!r}\nif os.environ['RANK'] == '1': {second}\nelse: {first}"
        tree = {**TREE, "seed": number, "output_dir": str(own)}
        jobs.append(sweep.Job(number, own, [f"seed={number}"], [*start, code], tree, processes=2))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(temporary)
    try:
        results = run(tmp_path, jobs, jobs=2, processes=2)
    finally:
        os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)
    told = [record(tmp_path / str(n)) for n in range(len(ENDS))]
    ended = [(t["status"], t["exit_code"], t["cause"]) for t in told]
    assert dict(zip(ENDS, ended, strict=True)) == {name: end[2:] for name, end in ENDS.items()}
    assert [r.value for r in results] == [None] * 7 + [0.5]
    assert {t["processes"] for t in told} == {2}
    assert not list(temporary.iterdir()), "torchrun leaves nothing behind"
    logs = [(tmp_path / str(n) / "job.log").read_text() for n in range(len(ENDS))]
    assert not [text for text in logs if "OMP_NUM_THREADS" in text], "torchrun has no threads to warn of"


def test_of_two_that_ended_at_once_the_killed_one_was_first(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    report = "".join(f"\n  exitcode  : {code} (pid: 7{n}) " for n, code in enumerate((2, -9, -15)))
    first = "E1122 17:10:08.650000 10640 torch/distributed/api.py:1] failed (exitcode: 2) local_rank: 0 (pid: 70) of binary: p"
    log.write_text(f"step 1\n{OTHER}\n{first}\nChildFailedError:{report}")
    assert (sweep_job.first_end(log), sweep_job.last_error(log)) == (-9, "step 1")
    log.write_text(f"error: no\n{OTHER}\n{first}\nChildFailedError:{report}")
    assert (sweep_job.first_end(log), sweep_job.last_error(log)) == (2, "no")
    log.write_text("RuntimeError: no address")
    assert (sweep_job.first_end(log), sweep_job.last_error(log)) == (None, "RuntimeError: no address")


# ---------------------------------------------------------------- training

STEPS = 60
SWEEP = ["experiment=smoke", "seed=1", f"trainer.max_steps={STEPS}", "trainer.save_every=1000", "trainer.log_every=1"]
SWEEP += ["trainer.workers=1", "metrics=[answer_loss]"]


@pytest.mark.slow
def test_ctrl_c_saves_and_two_processes_go_on_bit_for_bit(tmp_path: Path, tree: Callable[..., dict[str, Any]]) -> None:
    own, lines = tmp_path / "sweep" / "0", tmp_path / "sweep" / "0" / "metrics.jsonl"

    def start(*argv: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "mllm_factory", "train", "-m", *argv]
        return subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    driver = start(*SWEEP, "hydra.sweep.dir=sweep", "sweep.processes=2", "sweep.threads=1")
    end = time.monotonic() + 200
    while not lines.exists() or lines.read_text().count("\n") < 3:
        assert driver.poll() is None and time.monotonic() < end, driver.communicate()
        time.sleep(0.005)
    driver.send_signal(signal.SIGINT)
    out, _ = driver.communicate(timeout=60)
    assert "1 jobs, 1 at a time, 2 processes of 1 threads each (threads)" in out
    told = record(own)
    assert (told["status"], told["exit_code"], told["cause"]) == ("interrupted", 143, "the sweep was stopped")
    assert not running(str(own))
    (step,) = runs.steps(own)
    assert 3 <= step < STEPS and f"step {step} of {STEPS} is saved" in (own / "job.log").read_text()

    driver = start("sweep.resume=sweep")
    _, errors = driver.communicate(timeout=200)
    assert driver.returncode == 0, errors
    told = record(own)
    assert (told["status"], told["attempts"], told["processes"]) == ("done", 2, 2)
    assert told["resumed_from"] == str(runs.folder_of(own, step))

    whole = tree(*SWEEP[1:]) | {"output_dir": str(tmp_path / "whole")}
    together(whole, tmp_path / "log")
    processes.assert_same_end(own, tmp_path / "whole", STEPS)
    assert json.loads((own / "report.json").read_text())["train/steps"] == STEPS
