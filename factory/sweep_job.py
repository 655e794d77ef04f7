"""The process that keeps one job of a sweep: it starts the job's command, tells in job.json how it goes, and ends it in time.

It runs by itself, ``python -I sweep_job.py <folder> <parent> <driver> <stop file>``, with nothing but the standard library, and
holds the folder's lock for as long as the job lives. The command gets a session of its own, so that its children (loader
workers) end with it; what is left in other sessions (torchrun's workers) comes to the keeper, which ends it. The job ends when
the process that started the keeper is gone, when the sweep's driver is gone, when the stop file appears, or when a search gives
it up (job.end): however a sweep ends, no job is left behind, and none runs twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import signal
import socket
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

RECORD, LOG, LOCK, END = "job.json", "job.log", "job.lock", "job.end"
HELD = 75
"""Exit code of a keeper that found the folder's lock held (EX_TEMPFAIL)."""

UNWRITTEN = 74
"""Exit code of a keeper that could not write job.json (EX_IOERR)."""

POLL_SECONDS, GRACE_SECONDS = 0.5, 20.0
_CRASHES = {signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_NOTICE = {signal.SIGUSR1, signal.SIGUSR2}  # of a scheduler that kills by itself when the time is over
_WAKE = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *_NOTICE}
_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))
_PDEATHSIG, _SUBREAPER = 1, 36
_REAP_SECONDS = 5.0
_FRAME = re.compile(r"[\w.]*(?:Error|Exception|Interrupt|Exit)\b")
_ERROR, _OTHER = "error: ", "stopped because another one did"
_TORCHRUN = re.compile(r"[EWI]\d{4} [\d:.]+ \d+ \S*torch/distributed/")
_FIRST = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: \d+ \(pid: \d+\) of binary")
_EACH = re.compile(r"^ *exitcode +: (-?\d+) \(pid: \d+\)", re.MULTILINE)
_TOLD = re.compile(r"SignalException: Process \d+ got signal: (\d+)")


class Watch(NamedTuple):
    """What must go on for the job to go on: process ids (0: none) and two files that must not appear, one of the sweep, one of the job."""

    parent: int
    driver: int
    stop: Path
    end: Path

    def over(self) -> str:
        """Why the job has to end; empty while it may go on."""
        if os.getppid() != self.parent or (self.driver and not _alive(self.driver)):
            return "the process that ran the sweep ended"
        if self.stop.exists():
            return "the sweep was stopped"
        return self.end.read_text(encoding="utf-8") if self.end.exists() else ""

    @property
    def gentle(self) -> bool:
        """Whether the job has time to end by itself: somebody is there to wait for it."""
        return os.getppid() == self.parent and (self.stop.exists() or self.end.exists())


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# ---------------------------------------------------------------- job.json


def read(folder: Path) -> dict[str, Any]:
    """A job's record; empty where there is none.

    Raises:
        ValueError, OSError: it cannot be read.
    """
    file = folder / RECORD
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def write(folder: Path, record: dict[str, Any]) -> None:
    """Replace a job's record in one step.

    Raises:
        OSError: it cannot be written.
    """
    tmp = folder / f"{RECORD}.tmp"
    with tmp.open("w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    tmp.replace(folder / RECORD)


def now() -> str:
    """The time, to the second, with its zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def lock(folder: Path, seconds: float = 0.0) -> IO[str] | None:
    """Hold a job's folder until the file is closed; None where another process still holds it after ``seconds``."""
    file, end = (folder / LOCK).open("w"), time.monotonic() + seconds
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= end:
                file.close()
                return None
            time.sleep(0.1)


# ---------------------------------------------------------------- outcome


def outcome(code: int, stopped: str, log: Path) -> dict[str, Any]:
    """``status``, ``exit_code`` (-n: ended by signal n) and ``cause`` of a job that ended.

    ``interrupted`` is what was ended from outside (a full disk included) and can go on from its last checkpoint; ``failed`` ended
    itself; ``pruned`` was given up.
    """
    if code == 0:
        return {"status": "done", "exit_code": 0, "cause": None}
    if stopped:
        status = "pruned" if log.with_name(END).exists() else "interrupted"
        return {"status": status, "exit_code": code, "cause": stopped}
    killed = -code if code < 0 else code - 128 if code - 128 in set(signal.Signals) else 0
    if killed:
        name = signal.Signals(killed).name
        cause = f"ended by {name}" + ("; was memory short?" if killed == signal.SIGKILL else "")
        return {"status": "failed" if killed in _CRASHES else "interrupted", "exit_code": code, "cause": cause}
    cause = last_error(log) or f"exit code {code}"
    status = "interrupted" if any(text in cause for text in _FULL) else "failed"
    return {"status": status, "exit_code": code, "cause": cause}


def last_error(log: Path) -> str:
    """The last error that a log tells: a line ``error: ...``, the end of a traceback, or else its last line.

    Of several processes it is the cause: neither what torchrun reports nor what those say that another one stopped.
    """
    errors, lines = _errors(_end(log))
    return (errors or lines or [""])[-1][:500]


def _end(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2**16))
        return file.read().decode("utf-8", "replace")


def _errors(text: str) -> tuple[list[str], list[str]]:
    """Errors that a log tells, and all its lines, less torchrun's."""
    report = _FIRST.search(text)
    lines = [line.strip() for line in (text[: report.start()] if report else text).splitlines()]
    lines = [line for line in lines if line and not _TORCHRUN.match(line) and _OTHER not in line]
    told = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    return told or [line for line in lines if _FRAME.match(line)], lines


def first_end(log: Path) -> int | None:
    """Exit code of that of torchrun's processes which ended first, 128 + the signal that torchrun got, or None if it says neither.

    Where several ended at once and none tells an error, one that was killed was first.
    """
    text = _end(log)
    if told := _TOLD.search(text):
        return 128 + int(told[1])
    codes = list(map(int, _FIRST.findall(text)[-1:] + _EACH.findall(text)))
    killed = [code for code in codes if code < 0 and code != -signal.SIGTERM]
    return killed[0] if killed and codes[0] > 0 and not _errors(text)[0] else next(iter(codes), None)


# ---------------------------------------------------------------- the command


def start(command: list[str], cwd: str, log: Path) -> int:
    """Run a command in a session and folder of its own with its output in ``log``; its process id."""
    keeper = os.getpid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    process = os.fork()
    if process:
        os.close(output)
        os.close(nothing)
        return process
    try:
        os.setsid()
        os.chdir(cwd)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)  # ends with its keeper, even after kill -9
            if os.getppid() != keeper:
                os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where a shell started the sweep in the background
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAKE)
        os.dup2(nothing, 0), os.dup2(output, 1), os.dup2(output, 2)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(output, f"error: {command[0]} in {cwd} cannot be started: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def wait(process: int, watch: Watch) -> tuple[int, str]:
    """Wait for a command, ending it when it is time; its exit code, and why it was ended (empty: by itself)."""
    stopped, deadline = "", float("inf")
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            signal_group(process, signal.SIGKILL)  # what it left behind
            end_children()
            return os.waitstatus_to_exitcode(status), stopped
        if not stopped and (stopped := watch.over()):
            ask(process) if watch.gentle else signal_group(process, signal.SIGKILL)
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            signal_group(process, signal.SIGKILL)
        woken = _woken()
        if woken is not None and woken != signal.SIGCHLD and not stopped:
            stopped = f"ended by {signal.Signals(woken).name}"
            deadline = float("inf") if woken in _NOTICE else time.monotonic() + GRACE_SECONDS
            ask(process)


def _woken() -> int | None:
    """The signal of ``_WAKE``, all of which are blocked, that came within the next ``POLL_SECONDS``."""
    if hasattr(signal, "sigtimedwait"):
        found = signal.sigtimedwait(_WAKE, POLL_SECONDS)
        return None if found is None else found.si_signo
    time.sleep(POLL_SECONDS)  # macOS
    pending = signal.sigpending() & _WAKE
    return signal.sigwait(pending) if pending else None


def ask(process: int) -> None:
    """Let a command, or a keeper, end by itself: training saves where it is. Its children end with it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)


def signal_group(process: int, number: signal.Signals) -> None:
    """Send a signal to a command and all its children, where they still are."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, number)


def end_children() -> None:
    """End what is left of a command: all children of this process, and what comes to it when they are gone."""
    own, end = os.getpid(), time.monotonic() + _REAP_SECONDS
    place = Path(f"/proc/{own}/task/{own}/children")
    while time.monotonic() < end:
        for child in place.read_text().split() if place.exists() else ():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(child), signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def keep(folder: Path, watch: Watch) -> int:
    """Run the job that job.json describes; 0 once that file says how it ended, ``HELD`` or ``UNWRITTEN``."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAKE)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1)  # what a job leaves behind comes here, whatever session it is in
    try:
        held = lock(folder)
        if held is None:
            return HELD
        with held:
            _keep(folder, watch)
        return 0
    except OSError as error:
        print(f"{folder}: {error.strerror}", file=sys.stderr)
        return UNWRITTEN


def _keep(folder: Path, watch: Watch) -> None:
    record, began, stopped = read(folder), time.monotonic(), watch.over()
    host = {"host": socket.gethostname(), "pid": os.getpid(), "device": os.environ.get("CUDA_VISIBLE_DEVICES")}
    record |= {"status": "running", "start": now(), "end": None, "exit_code": None, "cause": None, **host}
    write(folder, record)
    code = 130
    if not stopped:
        code, stopped = wait(start(record["command"], record["cwd"], folder / LOG), watch)
        if code and record.get("processes", 1) > 1:
            code = first_end(folder / LOG) or code
    record |= {**outcome(code, stopped, folder / LOG), "end": now(), "seconds": round(time.monotonic() - began, 3)}
    write(folder, record)


if __name__ == "__main__":
    own = Path(sys.argv[1])
    sys.exit(keep(own, Watch(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), own / END)))
