"""A side of a comparison in a fresh process: it trains so many steps at each word of command and reports what they took."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Report = dict[str, float]


class Turns:
    """The child's end: ``step`` is called after each training step, and waits for the next command when a turn is done.

    The first turn starts with ``begin``, when everything is loaded; from there the memory is counted.
    """

    def __init__(self, parent: Connection) -> None:
        self.parent = parent
        self.left = 0
        self.totals: Report = {}

    def begin(self) -> None:
        """Note the idle process's memory and wait for the first command."""
        gc.collect()
        _return_free_memory()
        self.idle = _resident()
        _reset_peak()
        self.parent.send({"idle": self.idle})
        self._wait()

    def step(self, **counts: float) -> None:
        """One training step is done; ``counts`` are summed over the turn."""
        for name, count in counts.items():
            self.totals[name] = self.totals.get(name, 0.0) + count
        self.left -= 1
        if self.left == 0:
            spent = {"seconds": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu}
            self.parent.send({**spent, **self.totals, "extra": _peak() - self.idle})
            self._wait()

    def _wait(self) -> None:
        self.left = self.parent.recv()
        if self.left == 0:
            os._exit(0)  # the training loop has no other way out
        self.totals = {}
        self.wall, self.cpu = time.perf_counter(), time.process_time()


class Side:
    """The parent's end: a fresh process that runs ``target(turns, *args)``."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=_serve, args=(target, child, *args), daemon=True)
        self.process.start()
        child.close()
        self.idle: Report = self._receive()

    def turn(self, steps: int) -> Report:
        """What so many steps took: seconds, CPU seconds, the sum of each count, and the extra memory so far in bytes."""
        self.pipe.send(steps)
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self.pipe.send(0)
        self.process.join()

    def _receive(self) -> Report:
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError("one side of the comparison ended early; its error stands above") from None


def _serve(target: Callable[..., None], parent: Connection, *args: Any) -> None:
    sys.stdout = sys.stderr  # libraries print; stdout belongs to the result
    target(Turns(parent), *args)


# ---------------------------------------------------------------- memory


def _resident() -> int:
    """Bytes of memory this process holds now."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return _peak()


def _peak() -> int:
    """The most bytes of memory this process held since ``_reset_peak``.

    Where Linux tells of the process alone, that is taken: the usual counter starts at the peak of the process's parent.
    """
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak() -> None:
    """Let the peak start from here; where the system cannot, it includes loading."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _return_free_memory() -> None:
    """Give what the allocator keeps back to the system (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
