"""Sweeps of real training runs: killed at any moment and continued, they end as if nothing had happened."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs as processes
import pytest

from mllm_factory import report_runs, runs

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
STEPS = 400
SWEEP = ["experiment=smoke", "seed=1,2", f"trainer.max_steps={STEPS}", "trainer.save_every=20", "trainer.workers=1"]
SWEEP += ["metrics=[answer_loss]", "hydra.sweep.dir=sweep"]


def start(folder: Path, *argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mllm_factory", "train", "-m", *argv]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def record(folder: Path) -> dict[str, Any]:
    file = folder / "job.json"
    return json.loads(file.read_text()) if file.exists() else {}


def until(condition: Callable[[], Any], driver: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def children(process: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def lives(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_killed_worker_killed_driver_and_resume(tmp_path: Path, tree: Callable[..., dict[str, Any]]) -> None:
    sweep = tmp_path / "sweep"
    driver = start(tmp_path, *SWEEP, "sweep.jobs=2")
    until(lambda: all(runs.steps(sweep / n) for n in "01"), driver)
    (worker,) = children(record(sweep / "0")["pid"])
    (other,) = children(record(sweep / "1")["pid"])
    family = [other, *children(other)]
    os.kill(worker, signal.SIGKILL)
    until(lambda: record(sweep / "0")["status"] == "interrupted", driver)
    assert record(sweep / "1")["status"] == "running"
    seen = {run.label: (run.state, run.cause, bool(run.lines)) for run in report_runs.read_runs([str(sweep)])}
    assert seen == {"0": ("interrupted", "ended by SIGKILL; was memory short?", True), "1": ("running", "", True)}
    driver.kill()
    driver.communicate()
    end = time.monotonic() + 15
    while any(map(lives, family)) or record(sweep / "1")["status"] == "running":
        assert time.monotonic() < end, "a job outlived the sweep"
        time.sleep(0.1)
    reached = [max(runs.steps(sweep / n)) for n in "01"]
    assert all(0 < step < STEPS for step in reached)

    driver = start(tmp_path, "sweep.resume=sweep", "sweep.jobs=2")
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err
    for n in "01":
        told = record(sweep / n)
        assert (told["status"], told["attempts"]) == ("done", 2)
        assert told["resumed_from"].startswith(str(sweep / n / "checkpoints" / "step_"))
        assert f"resuming from {told['resumed_from']}" in (sweep / n / "job.log").read_text()
    assert "2 jobs, 2 at a time" in out

    whole = tree(*SWEEP[2:-1], "seed=1") | {"output_dir": str(tmp_path / "whole")}
    processes.run(whole, tmp_path / "whole.log")
    processes.assert_same_end(sweep / "0", tmp_path / "whole", STEPS)

    before = {file: file.read_bytes() for file in sweep.glob("*/report.json")}
    done = start(tmp_path, *SWEEP, "sweep.resume=true", "sweep.jobs=2")
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert "2 of 2 jobs are done already" in out
    assert before == {file: file.read_bytes() for file in sweep.glob("*/report.json")}


def test_an_evaluation_of_a_checkpoint_can_be_swept(tmp_path: Path, tree: Callable[..., dict[str, Any]]) -> None:
    processes.run(tree("trainer.max_steps=1", "metrics=null") | {"output_dir": str(tmp_path / "run")}, tmp_path / "log")
    command = [sys.executable, "-m", "mllm_factory", "evaluate", "-m", "checkpoint=run", "data.eval.limit=3,5"]
    command += ["metrics=[answer_loss]", "hydra.sweep.dir=sweep", "sweep.jobs=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    values = [json.loads((tmp_path / "sweep" / n / "report.json").read_text())["answer_loss"] for n in "01"]
    assert values[0] != values[1]
    assert [record(tmp_path / "sweep" / n)["config"]["data"]["eval"]["limit"] for n in "01"] == [3, 5]


def test_hydras_basic_launcher_still_runs_jobs(tmp_path: Path) -> None:
    sweep = [
        "hydra/launcher=basic",
        "experiment=smoke",
        "trainer.max_steps=1,2",
        "metrics=null",
        "hydra.sweep.dir=sweep",
    ]
    driver = start(tmp_path, *sweep)
    _, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err
    steps = [json.loads((tmp_path / "sweep" / n / "report.json").read_text())["train/steps"] for n in "01"]
    assert steps == [1, 2]
    assert not list(tmp_path.rglob("job.json"))


def test_the_wheel_has_the_launcher_where_hydra_looks(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        packed.extractall(tmp_path / "site")
    assert "hydra_plugins/mllm_factory/processes.py" in names
    assert not [n for n in names if n == "hydra_plugins/__init__.py" or n.startswith("mllm_factory/hydra_plugins")]
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "import mllm_factory; from mllm_factory.config import compose; from hydra.core.plugins import Plugins\n"
        "from hydra.plugins.launcher import Launcher\n"
        "print(mllm_factory.__file__, compose('train', []).choices['hydra/launcher'], *Plugins.instance().discover(Launcher))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert str(tmp_path / "site") in done.stdout, done.stderr
    assert "ProcessesLauncher" in done.stdout and " processes " in done.stdout


@pytest.mark.parametrize("most", [10, 5000])
def test_a_sweep_whose_folder_takes_no_more_bytes_ends_with_one_line(tmp_path: Path, most: int) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    command = [sys.executable, "-m", "mllm_factory", "train", "-m", *SWEEP]
    with subprocess.Popen(
        command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=small_files
    ) as driver:
        _, errors = driver.communicate(timeout=300)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert driver.returncode == 2, errors
    assert lines and all("File too large" in line for line in lines), errors
    assert "Traceback" not in errors and not list(tmp_path.glob("sweep/*/checkpoints/*"))
