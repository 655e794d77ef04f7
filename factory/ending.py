"""An end that is announced: a scheduler's signal lets training finish its step and save before it ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ANNOUNCED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers send some time before they kill: SIGTERM, or what ``sbatch --signal`` names."""


class Ended(SystemExit):
    """Training stopped at an announced end, with everything saved; as an exit code 128 + the signal, as shells count."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


@contextmanager
def noticed() -> Iterator[Callable[[], int]]:
    """Within: the first signal of ``ANNOUNCED`` is what the given function returns from then on (0 before). Later ones change
    nothing: a scheduler tells every process, and so does what started it. Outside of the main thread nothing is noted.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in ANNOUNCED} if here else {}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlive_notice(worker: int) -> None:
    """In a loader worker: obey ``ANNOUNCED`` only where they come from the process that it works for, which ends its workers by
    SIGTERM; schedulers send them to every process of a job, and the step that is to be finished may need another batch.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, ANNOUNCED)
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo(ANNOUNCED).si_pid != os.getppid():
        pass
    os._exit(0)
