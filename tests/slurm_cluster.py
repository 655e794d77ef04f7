"""A Slurm cluster of our own on this machine: two or more nodes, each a slurmd with a port of its own, for the time of a test."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
SBIN = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))  # not all users' PATH has these
MISSING = [name for name in PROGRAMS if shutil.which(name, path=SBIN) is None]

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=10
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs={cpus}
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def cluster(folder: Path, nodes: int = 2, cpus: int = 2) -> Iterator[Path]:
    """Within: ``sbatch`` and the like talk to a cluster of nodes n1, n2, ..., each with so many CPUs, whatever this machine has.

    Its daemons are children of this process and end with the context, after all jobs. Root and ordinary users may have one.
    """
    (folder / "state").mkdir(parents=True)
    control, *ports = free_ports(nodes + 1)
    host = socket.gethostname().partition(".")[0]
    spread = {"control": control, "ports": ",".join(map(str, ports)), "nodes": nodes, "cpus": cpus}
    (folder / "slurm.conf").write_text(CONF.format(host=host, user=getpass.getuser(), folder=folder, **spread))
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}
    os.environ |= {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{SBIN}",
    }
    with ExitStack() as held:
        held.callback(_restore, before)
        for command in (["slurmctld", "-i"], *(["slurmd", "-N", f"n{n + 1}"] for n in range(nodes))):
            held.enter_context(_daemon(command, folder / f"{command[0]}.{command[-1]}.log"))
        held.callback(_empty)
        until(lambda: ask("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * nodes, 60)
        yield folder


def ask(*command: str) -> str:
    """What a command prints; empty where it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def do(*command: str) -> str:
    """What a command prints; it must not fail."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def jobs(*states: str) -> list[str]:
    """Ids of the jobs in the queue, the oldest first; with states only those in one of them."""
    only = [f"--states={','.join(states)}"] if states else []
    return sorted(do("squeue", "--noheader", "--format=%i", *only).split(), key=int)


def soon(job: str) -> None:
    """Start a job that was queued again; Slurm waits for two minutes, and takes one of the same second for the one it ended."""
    until(lambda: job in jobs("PENDING"))
    time.sleep(2)
    do("scontrol", "update", f"jobid={job}", "StartTime=now")


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now, in rising order."""
    with ExitStack() as held:
        open_ = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in open_:
            one.bind(("127.0.0.1", 0))
        return sorted(one.getsockname()[1] for one in open_)


@contextmanager
def _daemon(command: list[str], log: Path) -> Iterator[None]:
    with log.open("w") as output:
        process = subprocess.Popen(
            [command[0], "-D", *command[1:]], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            yield
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()


def _empty() -> None:
    """End all jobs."""
    ask("scancel", f"--user={os.getuid()}")
    until(lambda: not ask("squeue", "--noheader").strip(), 60)


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
