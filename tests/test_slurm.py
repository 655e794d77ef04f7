"""Slurm, run on a cluster of two nodes on this machine: jobs of sweeps in its queue, and training over its nodes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jobs as processes
import pytest
import slurm_cluster as slurm
from slurm_cluster import until
from test_sweep import ENDS, REPORT, counted, job, record, run

from mllm_factory import runs, sweep, sweep_jobs
from mllm_factory.errors import ConfigError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm.MISSING), reason=f"Slurm is not installed ({', '.join(slurm.MISSING)})"),
]
ROOT = Path(__file__).parent.parent
QUEUE = {"backend": "submitit", "options": {"cluster": "slurm", "timeout_min": 10}}

GENTLE = """
import json, pathlib, signal, sys, time
def told(number, frame):
    open('told', 'a').write('x')
    time.sleep(1)  # saves
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, told)
open('up', 'a').write('x')
while not os.path.exists('../go'):
    time.sleep(0.1)
"""
"""A job that ends by itself when it is asked to, as training does."""

DRIVER = """
import os, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {tests!r})
from test_slurm import GENTLE, QUEUE
from test_sweep import REPORT, counted, job, run
folder = Path({folder!r})
try:
    run(folder, [job(n, folder, counted(GENTLE + REPORT)) for n in range({count})], jobs={count}, **QUEUE)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture(scope="module", autouse=True)
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with slurm.cluster(tmp_path_factory.mktemp("slurm") / "cluster"):
        yield


def drive(folder: Path, count: int) -> subprocess.Popen[str]:
    """A sweep of so many jobs in a process of its own; all are in the queue at once."""
    text = DRIVER.format(tests=str(Path(__file__).parent), folder=str(folder), count=count)
    return subprocess.Popen([sys.executable, "-c", text], text=True)


def begun(folder: Path) -> list[int]:
    """The jobs that run; which of a sweep's jobs Slurm got first is left to chance."""
    return sorted(int(file.parent.name) for file in folder.glob("*/up"))


def work(folder: Path, count: int) -> list[sweep.Job]:
    return [job(n, folder, counted(GENTLE + REPORT)) for n in range(count)]


def at(folder: Path, number: int) -> str:
    """The id that Slurm gave a job which has begun."""
    return str(record(folder / str(number))["slurm_job"])


def test_jobs_end_as_on_one_machine_with_the_cores_that_slurm_gives(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    threads = "import json, pathlib; pathlib.Path('report.json').write_text(json.dumps({'exact_match': int(os.environ['OMP_NUM_THREADS'])}))"
    jobs = [job(n, tmp_path, ENDS[n][0]) for n in (0, 3, 4)] + [job(9, tmp_path, threads)]
    given = {**QUEUE["options"], "cpus_per_task": 2}  # type: ignore[dict-item]
    results = run(tmp_path, jobs, jobs=4, backend="submitit", options=given)
    assert [r.status for r in results] == ["done", "failed", "interrupted", "done"]
    assert [r.value for r in results] == [0.5, None, None, 2.0]
    assert {record(tmp_path / str(n))["cause"] for n in (3, 4)} == {ENDS[3][3], ENDS[4][3]}
    assert "sacct" not in capfd.readouterr().err, "a cluster need not count what jobs used"


def test_what_slurm_starts_again_goes_on_and_what_a_user_cancels_does_not(tmp_path: Path) -> None:
    driver = drive(tmp_path, 5)
    until(lambda: len(begun(tmp_path)) == 4 and len(slurm.jobs("PENDING")) == 1)
    cancelled, requeued, limited, other = begun(tmp_path)
    (queued,) = set(range(5)) - set(begun(tmp_path))
    slurm.do("scancel", *slurm.jobs("PENDING"))
    slurm.do("scancel", at(tmp_path, cancelled))
    slurm.do("scontrol", "requeue", at(tmp_path, requeued))  # as after preemption
    slurm.do("scancel", "--signal=USR2", at(tmp_path, limited))  # as before its time limit
    for number in (requeued, limited):
        slurm.soon(at(tmp_path, number))
    until(lambda: all(record(tmp_path / str(n)).get("attempts") == 2 for n in (requeued, limited)))
    (tmp_path / "go").touch()
    assert driver.wait(60) == 0
    told = [record(tmp_path / str(n)) for n in range(5)]
    assert {n for n in range(5) if told[n]["status"] == "done"} == {requeued, limited, other}
    assert {n for n in range(5) if told[n]["status"] == "interrupted"} == {cancelled, queued}
    assert told[cancelled]["cause"] == "ended by SIGTERM" and "CANCELLED" in told[queued]["cause"]
    assert [r.value for r in run(tmp_path, work(tmp_path, 5), jobs=5, **QUEUE)] == [0.5] * 5
    ran = {n: len((tmp_path / f"ran_{n}").read_text()) for n in range(5)}
    assert ran == {cancelled: 2, requeued: 2, limited: 2, other: 1, queued: 1}


def test_jobs_outlive_their_driver_and_none_runs_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_jobs, "_PATIENCE", 0.5)
    driver = drive(tmp_path, 6)
    until(lambda: len(begun(tmp_path)) == 4 and len(slurm.jobs("PENDING")) == 2)
    waiting = slurm.jobs("PENDING")
    slurm.do("scontrol", "hold", ",".join(waiting))
    driver.kill()
    driver.wait()
    with pytest.raises(ConfigError, match=r"job \d is still running in"):
        run(tmp_path, work(tmp_path, 6), jobs=6, **QUEUE)
    (tmp_path / "go").touch()
    until(lambda: slurm.jobs() == waiting)
    done = begun(tmp_path)
    assert {n: record(tmp_path / str(n))["status"] for n in done} == dict.fromkeys(done, "done")
    assert [r.status for r in run(tmp_path, work(tmp_path, 6), jobs=6, **QUEUE)] == ["done"] * 6
    slurm.do("scontrol", "release", ",".join(waiting))
    until(lambda: not slurm.jobs())
    assert [(tmp_path / f"ran_{n}").read_text() for n in range(6)] == ["x"] * 6, "what was queued before found it done"


def test_ctrl_c_empties_the_queue(tmp_path: Path) -> None:
    driver = drive(tmp_path, 6)
    until(lambda: len(begun(tmp_path)) == 4 and len(slurm.jobs("PENDING")) == 2)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(40) == 130
    until(lambda: not slurm.jobs())
    told = [record(tmp_path / str(n)) for n in range(6)]
    assert sorted(t["status"] for t in told) == ["interrupted"] * 4 + ["waiting"] * 2
    assert {t["cause"] for t in told} == {"the sweep was stopped", None}


def test_a_queue_that_refuses_a_job_says_why(tmp_path: Path) -> None:
    options: dict[str, Any] = {"cluster": "slurm", "slurm_partition": "none"}
    (result,) = run(tmp_path, [job(0, tmp_path)], backend="submitit", options=options)
    assert result.status == "interrupted" and "invalid partition" in result.cause


def test_training_on_two_nodes_that_slurm_queues_again_ends_like_one_that_was_left_alone(
    tmp_path: Path, tree: Callable[..., dict[str, Any]]
) -> None:
    given = ["metrics=null", "trainer.max_steps=150", "trainer.save_every=10000"]
    given += ["trainer.workers=1", "trainer.log_every=5"]
    run_, log = tmp_path / "run", tmp_path / "run.log"
    options = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10", f"--output={log}"]
    script = [str(ROOT / "scripts" / "train.sbatch"), "experiment=smoke", *given, f"output_dir={run_}"]
    number = slurm.do("sbatch", "--parsable", *options, *script).strip()
    lines = run_ / "metrics.jsonl"
    until(lambda: lines.exists() and len(lines.read_text().splitlines()) > 3, 120)
    slurm.do("scancel", "--batch", "--signal=USR1", number)  # as before its time limit
    slurm.soon(number)
    whole, address = tree(*given) | {"output_dir": str(tmp_path / "whole")}, {"MASTER_ADDR": "127.0.0.1"}
    address |= {"MASTER_PORT": str(slurm.free_ports(1)[0]), "WORLD_SIZE": "2"}
    ranks = [
        processes.start(processes.train, whole, log=tmp_path / rank, env={**address, "RANK": rank})
        for rank in ("0", "1")
    ]
    assert [processes.finish(rank) for rank in ranks] == [0, 0]
    until(lambda: not slurm.jobs(), 180)
    said = log.read_text()
    saved = re.search(r"SIGTERM: step (\d+) of 150 is saved", said)
    assert saved is not None, said
    step = int(saved[1])
    assert 20 <= step < 150, "it ended before it was told to"
    assert f"resuming from {runs.folder_of(run_, step)}" in said
    processes.assert_same_end(run_, tmp_path / "whole", 150)
