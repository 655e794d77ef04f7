"""Where the jobs of a sweep run: in this machine's processes, or handed to joblib, submitit or ray.

Each back end gets strings (a folder and environment variables) and returns an exit code; nothing is pickled but those. What it
calls is ``execute``, which starts the job's keeper and waits. A thread of this process waits for each job in turn (``Pool``), so
jobs can be added while others run.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from mllm_factory import files, sweep_job, sweep_slurm
from mllm_factory.errors import ConfigError, Problem, UserError, hint

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
DEVICE = "CUDA_VISIBLE_DEVICES"
STOP = ".stop"
"""The file in a sweep's folder that ends all its jobs."""

Call = Callable[["Work", Mapping[str, str]], int]


class Work(NamedTuple):
    """A job as a back end sees it: number, folder with its job.json, the file that stops it."""

    number: int
    folder: str
    stop: str


class Ended(NamedTuple):
    """The exit code of a job's keeper; None where the back end lost it, and what it said then."""

    number: int
    code: int | None
    lost: str = ""


@dataclass
class Options:
    """How jobs are run; the options of ``hydra/launcher=processes``.

    Attributes:
        backend: threads, joblib, submitit or ray.
        jobs: at a time; None: as many as ``threads`` fit the cores, or one.
        processes: of each job, which torchrun starts; None: one, without torchrun.
        threads: of each process; None: the cores divided by all processes at a time.
        devices: values of CUDA_VISIBLE_DEVICES that jobs take in turn; None: all jobs see what this process sees.
        options: of the back end.
    """

    backend: str = "threads"
    jobs: int | None = None
    processes: int | None = None
    threads: int | None = None
    devices: Sequence[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: everything wrong at once.
        """
        problems = []
        if self.backend not in BACKENDS:
            problems.append(
                Problem(f"no back end is named '{self.backend}'{hint(self.backend, BACKENDS)}", "sweep.backend")
            )
        for name in ("jobs", "processes", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                problems.append(Problem(f"expected 1 or more, got {value}", f"sweep.{name}"))
        if self.devices is not None and not self.devices:
            problems.append(
                Problem("expected at least one device, got none; null leaves them as they are", "sweep.devices")
            )
        short = [value for value in self.groups if len(value.split(",")) < self.size]
        if short:
            need = f"a job of {self.size} processes takes {self.size} devices, got '{short[0]}'"
            problems.append(Problem(f"{need}; name them together, such as ['0,1','2,3']", "sweep.devices"))
        if self.backend in ("threads", "joblib") and self.options:
            problems.append(Problem(f"'{self.backend}' has no options, got {dict(self.options)}", "sweep.options"))
        if problems:
            raise ConfigError(problems)

    @property
    def width(self) -> int:
        """Jobs at a time."""
        return self.jobs or (max(1, _cores() // (self.threads * self.size)) if self.threads else 1)

    @property
    def size(self) -> int:
        """Processes of a job."""
        return self.processes or 1

    @property
    def groups(self) -> list[str]:
        """``devices`` as CUDA_VISIBLE_DEVICES takes them: those of one job with commas between them."""
        return [",".join(map(str, one)) if isinstance(one, list | tuple) else str(one) for one in self.devices or ()]

    @property
    def cores(self) -> int:
        """Threads of a process: what OMP_NUM_THREADS allows, where that is less than its share of the cores."""
        given = os.environ.get(THREADS[0], "")
        share = max(1, _cores() // (self.width * self.size))
        return self.threads or (min(int(given), share) if given.isdigit() and int(given) else share)

    @property
    def env(self) -> dict[str, str]:
        """Environment variables that keep a process to its threads."""
        return dict.fromkeys(THREADS, str(self.cores))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def execute(work: Work, env: Mapping[str, str], driver: int, host: str) -> int:
    """Start a job's keeper and wait for it; its exit code. On the driver's machine it also ends with the driver."""
    watched = driver if socket.gethostname() == host and driver != os.getpid() else 0
    watch = [str(os.getpid()), str(watched), work.stop]
    keeper = [sys.executable, "-I", str(Path(sweep_job.__file__).resolve()), work.folder, *watch]
    process = subprocess.Popen(keeper, env={**os.environ, **env}, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


class Pool:
    """A back end that runs at most ``options.width`` jobs at a time; each device is given to one job at a time.

    Use it as a context: leaving it by an error ends the running jobs and starts no other.

    Raises:
        UserError: on entering: the back end is not installed, cannot be reached or does not know an option.
    """

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder, self.running = options, folder, 0
        self._ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self._devices: queue.SimpleQueue[str] = queue.SimpleQueue()
        for i in range(options.width if options.groups else 0):
            self._devices.put(options.groups[i % len(options.groups)])

    def __enter__(self) -> Self:
        with ExitStack() as held:
            try:
                self._call = held.enter_context(BACKENDS[self.options.backend](self.options, self.folder))
            except ImportError as error:
                needs = f"sweep.backend={self.options.backend} needs the package '{error.name}'"
                raise UserError(f"{needs}; install mllm-factory[sweep], or use sweep.backend=threads") from error
            except Exception as error:  # each library has its own
                given = f"'{self.options.backend}' cannot start with {dict(self.options.options)}"
                message = f"{given}: {files.reason(error)}; change sweep.options or sweep.backend"
                raise ConfigError(Problem(message, "sweep.options")) from error
            self._threads = ThreadPoolExecutor(self.options.width)
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._held:
            if kind is not None:
                (self.folder / STOP).touch()
            self._threads.shutdown(wait=True, cancel_futures=True)

    def submit(self, number: int, folder: Path) -> None:
        """Run a job as soon as there is room."""
        self.running += 1
        self._threads.submit(self._run, Work(number, str(folder), str(self.folder / STOP)))

    def next(self, seconds: float | None = None) -> Ended | None:
        """The next job that ends; None where none does in time."""
        try:
            ended = self._ended.get(timeout=seconds)
        except queue.Empty:
            return None
        self.running -= 1
        return ended

    def _run(self, work: Work) -> None:
        device = self._devices.get() if self.options.devices else None
        try:
            env = self.options.env | ({} if device is None else {DEVICE: device})
            self._ended.put(Ended(work.number, self._call(work, env)))
        except Exception as error:  # of the back end; the job's own end is an exit code
            self._ended.put(Ended(work.number, None, f"{self.options.backend}: {files.reason(error)}"))
        finally:
            if device is not None:
                self._devices.put(device)


# ---------------------------------------------------------------- the back ends


@contextmanager
def _threads(options: Options, folder: Path) -> Iterator[Call]:
    """Processes of this machine."""
    here = os.getpid(), socket.gethostname()
    yield lambda work, env: execute(work, env, *here)


@contextmanager
def _joblib(options: Options, folder: Path) -> Iterator[Call]:
    """joblib's processes (loky), one for each job: a worker that is killed takes no other job with it."""
    from joblib.externals.loky import ProcessPoolExecutor

    here = os.getpid(), socket.gethostname()

    def call(work: Work, env: Mapping[str, str]) -> int:
        with ProcessPoolExecutor(1) as worker:
            return int(worker.submit(execute, work, dict(env), *here).result())

    yield call


@contextmanager
def _submitit(options: Options, folder: Path) -> Iterator[Call]:
    """submitit's executors: ``options.cluster`` is slurm, local or debug; the rest are parameters of the executor."""
    import submitit

    given = {"cluster": "local", "timeout_min": 7 * 24 * 60, **options.options}
    cluster = given.pop("cluster")
    own = {name: given.pop(name) for name in ("slurm_max_num_timeout",) if name in given}
    executor = submitit.AutoExecutor(folder=str(folder / ".submitit"), cluster=cluster, **own)
    if cluster == "slurm":
        threads = options.threads and options.threads * options.size
        executor.update_parameters(**sweep_slurm.parameters(given, folder.name, threads))
        yield sweep_slurm.calls(executor, execute, () if threads else THREADS, options.size)
        return
    executor.update_parameters(**given)
    driver = os.getpid() if cluster == "local" else 0
    submitted: list[Any] = []

    def call(work: Work, env: Mapping[str, str]) -> int:
        handle = executor.submit(execute, work, dict(env), driver, socket.gethostname())
        submitted.append(handle)
        return int(handle.result())

    try:
        yield call
    finally:
        for handle in submitted:
            with suppress(Exception):
                if not handle.done():
                    handle.cancel()


@contextmanager
def _ray(options: Options, folder: Path) -> Iterator[Call]:
    """A ray cluster: ``options.address`` of one, or a local one for the time of the sweep; ``num_cpus``, ``num_gpus`` of a job."""
    import ray

    given = {"address": None, "num_cpus": options.cores * options.size, "num_gpus": 0, **options.options}
    address, resources = given.pop("address"), {**given, "max_retries": 0}
    started = not ray.is_initialized()
    if started:
        size: dict[str, Any] = {} if address else {"num_cpus": max(_cores(), options.width * int(given["num_cpus"]))}
        os.environ.setdefault("RAY_worker_niceness", "0")  # ray's own 15 lets jobs stand still beside other work
        ray.init(address=address, log_to_driver=False, include_dashboard=False, **size)
    try:
        remote = ray.remote(**resources)(execute)
        driver = 0 if address else os.getpid()
        yield lambda work, env: int(ray.get(remote.remote(work, dict(env), driver, socket.gethostname())))
    finally:
        if started:
            ray.shutdown()


BACKENDS: Mapping[str, Callable[[Options, Path], AbstractContextManager[Call]]] = {
    "threads": _threads,
    "joblib": _joblib,
    "submitit": _submitit,
    "ray": _ray,
}
