"""What the command line's quick verbs cost: CPU seconds and memory of whole processes, and whether torch was imported.

Each command runs in fresh processes, in turns with ``python -c "import hydra"`` and a Python that does nothing. A hook that
Python loads at start (``sitecustomize``) notes each process's own peak memory and whether torch is there, when it ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import Result, Row, Spread, compare

MARK = 0.6
HOOK = """
import atexit, os, sys

def note():
    with open("/proc/self/status") as status:
        peak = [line.split()[1] for line in status if line.startswith("VmHWM")]
    with open(os.environ["BENCH_NOTE"], "w") as file:
        file.write(f"{peak[0]} {int('torch' in sys.modules)}")

atexit.register(note)
"""
COMMANDS: dict[str, list[str]] = {
    "--help": ["--help"],
    "list": ["list"],
    "completion": ["completion", "--query", "mllm-factory train projector="],
    "config error": ["train", "projector.dept=3"],
}
EXIT = {"config error": 2}
REFERENCES = {"import hydra": "import hydra", "python": "pass"}


class Run(NamedTuple):
    """One process: CPU seconds, peak MB, whether torch was imported, exit code, what it printed."""

    cpu: float
    memory: float
    torch: bool
    code: int
    text: str


def measure(command: list[str], folder: Path) -> Run:
    """Run a command to its end in ``folder``."""
    note = folder / "note"
    note.unlink(missing_ok=True)
    (folder / "sitecustomize.py").write_text(HOOK)
    environment = {**os.environ, "PYTHONPATH": str(folder), "BENCH_NOTE": str(note)}
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if not note.exists():
        raise RuntimeError(f"{' '.join(command)} left no note of its memory: {text}")
    peak, torch = note.read_text().split()
    return Run(used.ru_utime + used.ru_stime, int(peak) / 1e3, torch == "1", process.returncode, text)


def run(runs: int | None, small: bool) -> Result:
    """All commands and both references in turns, ``runs`` rounds."""
    result = Result("startup", 'python -c "import hydra"')
    tool = str(Path(sys.executable).parent / "mllm-factory")
    commands = {name: [tool, *arguments] for name, arguments in COMMANDS.items()}
    commands |= {name: [sys.executable, "-c", code] for name, code in REFERENCES.items()}
    found: dict[str, list[Run]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for command in commands.values():
            measure(command, Path(folder))  # the first run compiles and fills the disk cache
        for _ in range(runs or 7):
            for name, command in commands.items():
                found[name].append(measure(command, Path(folder)))
    hydra = found["import hydra"]
    for name in COMMANDS:
        mine = found[name]
        result.rows.append(_absolute(compare(name, "CPU s", [r.cpu for r in mine], [r.cpu for r in hydra])))
        result.rows.append(compare(name, "MB", [r.memory for r in mine], [r.memory for r in hydra]))
        result.checks[f"{name}: torch stays out"] = not any(r.torch for r in mine)
        result.checks[f"{name}: exit code {EXIT.get(name, 0)}"] = all(r.code == EXIT.get(name, 0) for r in mine)
        result.facts[f"{name}: last line"] = (mine[-1].text.strip().splitlines() or [""])[-1][:200]
    bare = Spread.of([r.cpu for r in found["python"]])
    result.facts["a Python that does nothing, CPU s"] = bare.show(3)
    return result


def _absolute(row: Row) -> Row:
    """The mark is on our seconds, not on the ratio."""
    return Row(row.case, row.unit, row.ours, row.other, row.ratio, "<=", MARK, absolute=True)
