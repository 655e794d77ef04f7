"""torchrun on one machine: the command that starts a run in several processes, and the end of these with it. Nothing here needs torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

HANDED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
"""What torchrun tells its processes of instead of dying of it."""

_PDEATHSIG = 1


def command(processes: int, patience: float) -> list[str]:
    """What starts ``-m <module> <arguments>`` in so many processes of this machine, as ``torchrun`` does.

    Args:
        processes: 1: no torchrun.
        patience: seconds that they have to end once torchrun was asked to.
    """
    if processes == 1:
        return [sys.executable]
    own = ["--standalone", "--nnodes=1", "--local_addr=127.0.0.1", f"--nproc_per_node={processes}", "--max_restarts=0"]
    ends = [f"--shutdown_timeout={int(patience)}", f"--signals_to_handle={HANDED_ON}", f"--log_dir={os.devnull}"]
    return [sys.executable, "-m", "torch.distributed.run", *own, *ends]


def end_with_it() -> None:
    """Where torchrun started this process: end when it is gone, even after ``kill -9`` (on Linux).

    It starts its processes in sessions of their own, so nothing else would end them.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
