"""Sweeps: planning, processes and their ends, with real processes that cost milliseconds instead of training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mllm_factory import cli, report_runs, runs, sweep, sweep_command, sweep_job
from mllm_factory.errors import ConfigError
from mllm_factory.sweep_backends import Options
from mllm_factory.sweep_command import Call
from mllm_factory.sweep_jobs import key_of

CALL = Call("train", [], [], ["seed=0,1"])
TREE = {"seed": 0, "metrics": {"exact_match": {}}, "projector": {"name": "mlp", "depth": 2}}
REPORT = "import json, pathlib; pathlib.Path('report.json').write_text(json.dumps({'exact_match': 0.5}))"


def job(number: int, sweep_folder: Path, code: str = REPORT, **values: Any) -> sweep.Job:
    """A job that runs Python code in its own folder."""
    own = sweep_folder / str(number)
    code = f"import os; os.chdir({str(own)!r})\n{code}"
    tree = {**TREE, "seed": number, "output_dir": str(own), **values}
    return sweep.Job(number, own, [f"seed={number}"], [sys.executable, "-c", code], tree)


def run(folder: Path, work: Sequence[sweep.Job], **options: Any) -> list[sweep.Result]:
    return sweep.run(folder, work, Options(**options), CALL, lambda line: None)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "job.json").read_text())


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def running(text: str) -> list[int]:
    """Processes whose command line has a text."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line, state = (place / "cmdline").read_text(), (place / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if text in line and state != "Z":
            found.append(int(place.name))
    return found


# ---------------------------------------------------------------- which job is which


def test_a_key_is_what_a_job_does_not_where_it_writes() -> None:
    same = key_of({**TREE, "output_dir": "a", "resume": "auto"}, "train")
    assert same == key_of({**dict(reversed(TREE.items())), "output_dir": "b", "resume": None}, "train")
    others = [
        ({**TREE, "seed": 1}, "train"),
        ({**TREE, "projector": {"name": "mlp", "depth": 3}}, "train"),
        (TREE, "evaluate"),
    ]
    assert len({same, *(key_of(*other) for other in others)}) == 4


def test_the_same_job_twice_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="jobs 0 and 1 are the same run .*leave one out"):
        run(tmp_path, [job(0, tmp_path), job(1, tmp_path, seed=0)])
    twice = [job(0, tmp_path), sweep.Job(1, tmp_path / "0", [], ["true"], {**TREE, "seed": 9})]
    with pytest.raises(ConfigError, match="jobs 0 and 1 write into .*hydra.sweep.subdir"):
        run(tmp_path, twice)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- how jobs end

ENDS = {
    0: (REPORT, "done", 0, None),
    1: ("print('error: first'); print('error: projector: no'); raise SystemExit(2)", "failed", 2, "projector: no"),
    2: ("raise MemoryError('12 GB')", "failed", 1, "MemoryError: 12 GB"),
    3: ("import os; print('last words', flush=True); os._exit(9)", "failed", 9, "last words"),
    4: (
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "interrupted",
        -9,
        "ended by SIGKILL; was memory short?",
    ),
    5: ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "failed", -11, "ended by SIGSEGV"),
    6: (REPORT, "done", 0, None),
    7: ("raise OSError(28, os.strerror(28))", "interrupted", 1, f"OSError: [Errno 28] {os.strerror(28)}"),
    8: ("raise SystemExit(75)", "failed", 75, "exit code 75"),
}


def test_every_end_is_told_and_stops_no_other_job(tmp_path: Path) -> None:
    results = run(tmp_path, [job(n, tmp_path, end[0]) for n, end in ENDS.items()], jobs=3)
    assert [r.status for r in results] == [end[1] for end in ENDS.values()]
    assert [r.value for r in results] == [0.5, *[None] * 5, 0.5, None, None]
    for number, (_, status, code, cause) in ENDS.items():
        told = record(tmp_path / str(number))
        assert (told["status"], told["exit_code"], told["cause"]) == (status, code, cause)
        assert told["start"] <= told["end"] and told["overrides"] == [f"seed={number}"]
        assert told["config"]["seed"] == number and "output_dir" not in told["config"]
    assert "last words" in (tmp_path / "3" / "job.log").read_text()
    lines = list(map(str, sweep.failures(tmp_path, [job(n, tmp_path) for n in ENDS], results)))
    assert lines[0].startswith("job 1: projector: no (failed; ") and len(lines) == 8
    assert f"7 of 9 jobs are not done; sweep.resume={tmp_path}" in lines[-1]
    reported = {run.label: (run.state, run.cause or None) for run in report_runs.read_runs([str(tmp_path)])}
    assert reported == {str(n): (end[1], end[3]) for n, end in ENDS.items()}


def test_jobs_at_a_time_their_threads_and_devices(tmp_path: Path) -> None:
    code = (
        "import time; begin = time.time(); time.sleep(0.4); import json, os, pathlib\n"
        "values = {'exact_match': 0.0, 'begin': begin, 'end': time.time(), 'threads': int(os.environ['OMP_NUM_THREADS'])}\n"
        "values['device'] = os.environ.get('CUDA_VISIBLE_DEVICES')\n"
        "pathlib.Path('report.json').write_text(json.dumps(values))"
    )
    run(tmp_path, [job(n, tmp_path, code) for n in range(5)], jobs=2, threads=3, devices=[4, "5,6"])
    ran = [json.loads((tmp_path / str(n) / "report.json").read_text()) for n in range(5)]
    overlaps = [sum(b["begin"] <= a["begin"] < b["end"] for b in ran) for a in ran]
    assert max(overlaps) == 2
    assert {r["threads"] for r in ran} == {3}
    assert {r["device"] for r in ran} == {"4", "5,6"}
    for a in ran:
        others = [b for b in ran if b is not a and b["begin"] <= a["begin"] < b["end"]]
        assert all(b["device"] != a["device"] for b in others), "a device serves one job at a time"
    assert record(tmp_path / "0")["device"] in ("4", "5,6")


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (Options().width, Options().cores) == (1, cores)
    assert (Options(jobs=2 * cores).cores, Options(jobs=cores).cores) == (1, 1)
    assert Options(threads=1).width == cores
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert (Options().cores, Options(threads=2).cores) == (1, 2)


@pytest.mark.parametrize("backend", ["joblib", "submitit", "ray"])
@pytest.mark.slow
def test_other_back_ends_end_alike(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(backend)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "sweep"
    results = run(folder, [job(n, folder, ENDS[n][0]) for n in (0, 3, 4, 6)], jobs=2, backend=backend)
    assert [r.status for r in results] == ["done", "failed", "interrupted", "done"]
    assert [r.value for r in results] == [0.5, None, None, 0.5]
    assert record(folder / "3")["attempts"] == 1
    assert {record(folder / str(n))["cause"] for n in (3, 4)} == {ENDS[3][3], ENDS[4][3]}


@pytest.mark.slow
def test_ray_jobs_keep_their_priority_and_run_in_a_cluster_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    code = "import os; print(os.nice(0))"

    def niceness(folder: Path, **given: Any) -> str:
        jobs = [sweep.Job(0, folder / "0", [], [sys.executable, "-c", code], {"seed": 0})]
        assert [r.status for r in run(folder, jobs, backend="ray", **given)] == ["done"]
        return (folder / "0" / "job.log").read_text().split()[0]

    assert niceness(tmp_path / "own") == str(os.nice(0))
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        assert niceness(tmp_path / "there", options={"address": cluster.address}) == str(min(19, os.nice(0) + 15))
    finally:
        cluster.shutdown()


def test_a_job_runs_where_the_sweep_was_started(tmp_path: Path) -> None:
    here = sweep.Job(0, tmp_path / "0", [], [sys.executable, "-c", "import os; print(os.getcwd())"], {"seed": 0})
    nowhere = sweep.Job(1, tmp_path / "1", [], ["no_such_program"], {"seed": 1})
    assert [r.status for r in run(tmp_path, [here, nowhere])] == ["done", "failed"]
    assert (tmp_path / "0" / "job.log").read_text().strip() == os.getcwd()
    assert "no_such_program" in record(tmp_path / "1")["cause"]
    assert "cannot be started: No such file" in record(tmp_path / "1")["cause"]


def test_a_keeper_that_cannot_write_starts_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    one = job(0, tmp_path, counted(REPORT))
    assert sweep.prepare(one)
    keeper = [sys.executable, "-I", sweep_job.__file__, str(one.folder), str(os.getpid()), "0", str(tmp_path / "s")]
    limited = (
        f"import os, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50)); os.execv({keeper[0]!r}, {keeper!r})"
    )
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True)
    assert done.returncode != 0 and "File too large" in done.stderr
    assert not (tmp_path / "ran_0").exists()
    assert sweep.result(one, done.returncode).status == "interrupted"
    assert [r.status for r in run(tmp_path, [one])] == ["done"]


# ---------------------------------------------------------------- again


def counted(code: str) -> str:
    """Code that leaves a line beside its folder each time it runs."""
    return f"open('../ran_' + os.path.basename(os.getcwd()), 'a').write('x')\n{code}"


def test_done_jobs_are_skipped_and_failed_ones_repeated_in_a_clean_folder(tmp_path: Path) -> None:
    trap = counted(
        f"open('half', 'w').close()\nif not os.path.exists('../mended'): raise ValueError('broken')\n{REPORT}"
    )
    jobs = [job(0, tmp_path, counted(REPORT)), job(1, tmp_path, trap)]
    assert [r.status for r in run(tmp_path, jobs)] == ["done", "failed"]
    (tmp_path / "1" / "more").mkdir()
    (tmp_path / "1" / "more" / "rest").touch()
    (tmp_path / "mended").touch()
    again = run(tmp_path, [*jobs, job(2, tmp_path, counted(REPORT))])
    assert [(r.status, r.value) for r in again] == [("done", 0.5)] * 3
    assert [(tmp_path / f"ran_{n}").read_text() for n in range(3)] == ["x", "xx", "x"]
    assert not (tmp_path / "1" / "more").exists()
    assert "broken" in (tmp_path / "1" / "job_1.log").read_text()
    assert "broken" not in (tmp_path / "1" / "job.log").read_text()
    assert record(tmp_path / "1")["attempts"] == 2


def test_an_interrupted_job_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    one = job(0, tmp_path, ENDS[4][0])
    run(tmp_path, [one])
    for step in (3, 6):
        folder = runs.folder_of(one.folder, step)
        folder.mkdir(parents=True)
        for name in ("config.yaml", "model.safetensors", "trainer.pt"):
            (folder / name).write_text(name)
        (folder / "manifest.json").write_text(json.dumps(runs.manifest(folder)))
    (runs.folder_of(one.folder, 6) / "model.safetensors").write_text("torn")
    assert sweep.prepare(one)
    told = record(one.folder)
    assert told["command"] == [*one.command, f"resume='{one.folder}'"]
    assert told["resumed_from"] == str(runs.folder_of(one.folder, 3))
    assert (one.folder / "job_1.log").exists() and runs.folder_of(one.folder, 3).exists()

    (runs.folder_of(one.folder, 3) / "trainer.pt").unlink()
    assert sweep.prepare(one)
    assert record(one.folder)["command"] == list(one.command), "nothing to go on from: from the beginning"
    assert not (one.folder / "checkpoints").exists()


def test_a_folder_of_another_sweep_is_refused(tmp_path: Path) -> None:
    run(tmp_path, [job(0, tmp_path)])
    before = record(tmp_path / "0")
    with pytest.raises(
        ConfigError, match=r"holds another job: projector.depth: 2 -> 3; give the overrides of that sweep"
    ):
        run(tmp_path, [job(0, tmp_path, projector={"name": "mlp", "depth": 3}), job(1, tmp_path)])
    assert record(tmp_path / "0") == before and not (tmp_path / "1").exists()
    with pytest.raises(ConfigError, match=r"holds a sweep already \(sweep.json\); continue it with sweep.resume="):
        sweep.refuse_used_folder(tmp_path)
    (tmp_path / "other" / "7" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds a sweep already \(7/checkpoints\)"):
        sweep.refuse_used_folder(tmp_path / "other")
    with pytest.raises(ConfigError, match="holds a run that no sweep made"):
        run(tmp_path / "other", [job(7, tmp_path / "other")])
    (tmp_path / "0" / "job.json").write_text("{")
    with pytest.raises(ConfigError, match=r"job.json cannot be read: .*remove"):
        run(tmp_path, [job(0, tmp_path)])


def test_a_result_that_is_gone_is_made_again(tmp_path: Path) -> None:
    jobs = [job(0, tmp_path, counted(REPORT))]
    run(tmp_path, jobs)
    (tmp_path / "0" / "report.json").unlink()
    assert run(tmp_path, jobs)[0].value == 0.5
    assert (tmp_path / "ran_0").read_text() == "xx"


# ---------------------------------------------------------------- ends from outside

DRIVER = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
sys.path.insert(0, {tests!r})
from test_sweep import job, run
folder = Path({folder!r})
try:
    run(folder, [job(n, folder, {code!r}) for n in range(3)], jobs=2, backend={backend!r})
except KeyboardInterrupt:
    sys.exit(130)
"""


def drive(folder: Path, code: str, backend: str = "threads") -> subprocess.Popen[str]:
    text = DRIVER.format(tests=str(Path(__file__).parent), folder=str(folder), code=code, backend=backend)
    return subprocess.Popen([sys.executable, "-c", text], text=True, stderr=subprocess.PIPE)


def both_run(folder: Path) -> bool:
    return all((folder / str(n) / "up").exists() for n in (0, 1))


def alive(folder: Path) -> list[int]:
    """Every process of a sweep's jobs: keepers, jobs and what these started."""
    return running(str(folder / "0")) + running(str(folder / "1"))


WITH_CHILD = (
    "import subprocess, sys, time\n"
    "if not os.path.exists('../go'):\n"
    "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', os.getcwd()])\n"
    "    open('up', 'w').write(f'{os.getpid()} {child.pid}'); time.sleep(600)\n" + REPORT
)


@pytest.mark.parametrize("backend", ["threads", pytest.param("submitit", marks=pytest.mark.slow)])
def test_kill_9_of_the_driver_leaves_no_process_and_can_be_continued(backend: str, tmp_path: Path) -> None:
    driver = drive(tmp_path, WITH_CHILD, backend)
    until(lambda: both_run(tmp_path))
    assert len(alive(tmp_path)) == 6, "two keepers, two jobs, two children of jobs"
    driver.kill()
    driver.wait()
    until(lambda: not alive(tmp_path), 15)
    told = [record(tmp_path / str(n)) for n in range(3)]
    assert [t["status"] for t in told] == ["interrupted", "interrupted", "waiting"]
    assert told[0]["cause"] == "the process that ran the sweep ended"
    (tmp_path / "go").touch()
    assert [r.value for r in run(tmp_path, [job(n, tmp_path, WITH_CHILD) for n in range(3)], jobs=2)] == [0.5] * 3


def test_kill_9_of_a_job_or_of_its_keeper_ends_that_job_alone(tmp_path: Path) -> None:
    driver = drive(tmp_path, WITH_CHILD)
    until(lambda: both_run(tmp_path))
    (tmp_path / "go").touch()
    os.kill(int((tmp_path / "0" / "up").read_text().split()[0]), signal.SIGKILL)
    os.kill(record(tmp_path / "1")["pid"], signal.SIGKILL)
    assert driver.wait(60) == 0
    told = [record(tmp_path / str(n)) for n in range(3)]
    assert [t["status"] for t in told] == ["interrupted", "interrupted", "done"]
    assert [t["cause"] for t in told[:2]] == ["ended by SIGKILL; was memory short?", "its keeper ended before it"]
    assert not running(str(tmp_path / "0")), "what a killed job started ends with it"
    child = int((tmp_path / "1" / "up").read_text().split()[1])
    assert running(str(tmp_path / "1")) == [child], "the job ends with its keeper"
    os.kill(child, signal.SIGKILL)  # nobody is left to do it


def test_ctrl_c_ends_jobs_gently(tmp_path: Path) -> None:
    tells = "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit('saved'))\n"
    driver = drive(tmp_path, WITH_CHILD.replace("sys, time\n", "sys, time\n" + tells, 1))
    until(lambda: both_run(tmp_path))
    driver.send_signal(signal.SIGINT)
    assert driver.wait(60) == 130
    told = [record(tmp_path / str(n)) for n in range(3)]
    assert [t["status"] for t in told[:2]] == ["interrupted"] * 2 and told[2]["status"] in ("interrupted", "waiting")
    assert told[0]["cause"] == "the sweep was stopped"
    assert (tmp_path / "0" / "job.log").read_text() == "saved\n", "asked by SIGTERM, and waited for"
    assert not alive(tmp_path)


@pytest.mark.parametrize("waits", [True, False], ids=["sigtimedwait", "without, as on macOS"])
def test_a_keeper_hears_signals_on_systems_that_cannot_wait_for_them(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_job, "POLL_SECONDS", 0.05)
    if not waits:
        monkeypatch.delattr(signal, "sigtimedwait")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, sweep_job._WAKE)
    try:
        assert sweep_job._woken() is None
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # other threads do not block it
        assert sweep_job._woken() == signal.SIGUSR1
        assert sweep_job._woken() is None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_no_sweep_and_no_job_runs_twice_at_once(tmp_path: Path) -> None:
    driver = drive(tmp_path, WITH_CHILD)
    until(lambda: both_run(tmp_path))
    try:
        with pytest.raises(ConfigError, match="another process is running the sweep in"):
            run(tmp_path, [job(n, tmp_path) for n in range(3)])
        keeper = [
            sys.executable,
            "-I",
            sweep_job.__file__,
            str(tmp_path / "0"),
            str(os.getpid()),
            "0",
            str(tmp_path / "s"),
        ]
        assert subprocess.run(keeper).returncode == sweep_job.HELD
    finally:
        driver.kill()
        driver.wait()
        until(lambda: not alive(tmp_path), 15)


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["sweep.jobs=2"], "sweep.jobs: is an option of sweeps; add -m (from override 'sweep.jobs=2')"),
        (["-m", "seed=1,2", "sweep.jobs=0"], "sweep.jobs: expected 1 or more, got 0"),
        (["-m", "seed=1,2", "sweep.jbs=2"], "hydra.launcher.jbs: "),
        (["-m", "seed=1,2", "sweep.backend=thread"], "no back end is named 'thread'; did you mean 'threads'?"),
        (["-m", "seed=1,2", "sweep.options={a: 1}"], "sweep.options: 'threads' has no options, got {'a': 1}"),
        (["-m", "seed=1,2", "sweep.options.a=1"], "sweep.options: 'threads' has no options, got {'a': 1}"),
        (["-m", "seed=1,2", "sweep.devices=[]"], "sweep.devices: expected at least one device"),
        (["-m", "seed=1,1"], "jobs 0 and 1 are the same run"),
        (["-m", "sweep.resume=nowhere"], "sweep.resume: nowhere holds no sweep"),
        (["-m", "seed=1,2", "sweep.resume=true"], "sweep.resume: outputs/smoke holds no sweep"),
    ],
)
def test_mistakes(
    argv: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mllm-factory"])
    assert cli.main(["train", "experiment=smoke", *argv] if "nowhere" not in argv[-1] else ["train", *argv]) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert not list(tmp_path.rglob("job.json")), "nothing was started"


def test_options_of_a_sweep_are_short_for_the_launchers() -> None:
    given = ["sweep.jobs=2", "seed=1,2", "+sweep.options.cluster=slurm", "sweep.resume=TRUE"]
    overrides, resume = sweep_command.split(given[:2] + given[3:], True)
    assert (overrides, resume) == (["hydra.launcher.jobs=2", "seed=1,2"], "auto")
    assert sweep_command.split(["sweep.resume='a b'"], True) == ([], "a b")
    assert sweep_command.split(["sweep.options={cluster: slurm}"], True)[0] == [
        "++hydra.launcher.options={cluster: slurm}"
    ]
    assert sweep_command.split(["sweep.resume=false"], True) == ([], None)
    assert sweep_command.hydra_overrides(
        ["hydra.mode=MULTIRUN", "hydra.verbose=true", "hydra/launcher=x"], 3, Path("/a'b")
    ) == [
        "hydra.verbose=true",
        "hydra.job.num=3",
        "hydra.run.dir='/a\\'b'",
    ]
