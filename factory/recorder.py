"""What a run tells while it goes: progress bar, metrics.jsonl, event files, report.json. Only the first process speaks."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mllm_factory import files
from mllm_factory.errors import CheckpointError, ConfigError, Problem

console = Console(stderr=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Make a run's folder and hold it for this process.

    Raises:
        ConfigError: it cannot be made or written.
        CheckpointError: another process is running in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(
            Problem(f"{folder} cannot be written: {files.reason(error)}; choose another", "output_dir")
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by loader workers
        except (BlockingIOError, PermissionError) as error:
            raise CheckpointError(
                f"another process is running in {folder}; wait for it, or choose another output_dir"
            ) from error
        except OSError as error:  # a file system without locks
            raise ConfigError(
                Problem(f"{folder} cannot be locked: {files.reason(error)}; choose another", "output_dir")
            ) from error
        yield


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the device, or on the CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count what this process was before its exec
        held = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(held.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Recorder:
    """Writes the lines of a run and draws its bar.

    Args:
        folder: the run's folder.
        max_steps: length of the bar.
        step: where the run starts; later lines of an earlier attempt are dropped from ``metrics.jsonl``.
        tensorboard: also write event files to ``<folder>/tensorboard``.
        active: False in all processes but the first.

    Raises:
        ConfigError: tensorboard is asked for and not installed.
    """

    def __init__(self, folder: Path, max_steps: int, step: int, tensorboard: bool, active: bool) -> None:
        self.file, self.active = folder / "metrics.jsonl", active
        self.writer = _event_writer(folder, step) if tensorboard and active else None
        if active:
            _drop_after(self.file, step)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  lr {task.fields[rate]}  {task.fields[speed]} samples/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not (active and console.is_terminal),
        )
        self.task = self.bar.add_task("train", total=max_steps, completed=step, loss="-", rate="-", speed="-")

    def __enter__(self) -> Recorder:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.writer is not None:
            self.writer.close()

    def flush(self) -> None:
        """Wait until all lines are on the disk."""
        if self.active and self.file.exists():
            files.flush(self.file)

    def advance(self, step: int) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of ``metrics.jsonl``: ``step`` and flat keys to numbers."""
        if not self.active:
            return
        files.append(self.file, json.dumps({"step": step, **numbers(values)}))
        if self.writer is not None:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)
        if "loss" in values:
            rate = max(v for k, v in values.items() if k.startswith("lr/"))
            loss, speed = f"{values['loss']:.4f}", f"{values['samples_per_second']:.1f}"
            self.bar.update(self.task, completed=step, loss=loss, rate=f"{rate:.2e}", speed=speed)
            if not console.is_terminal:
                console.print(f"step {step}  loss {loss}  lr {rate:.2e}  {speed} samples/s", highlight=False)


def _event_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "trainer.tensorboard needs the package 'tensorboard'; install it, or set it to false"
        ) from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def _drop_after(file: Path, step: int) -> None:
    """Keep the whole lines up to a step: a resumed run writes the later ones again."""
    if not file.exists():
        return
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {files.reason(error)}; move it away") from error
    files.write(file, "".join(line + "\n" for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut off by a crash
        return math.inf


@contextmanager
def counter(what: str, total: int, active: bool) -> Iterator[Callable[[int], None]]:
    """A bar for a pass over ``total`` samples; call the value with the number just done."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (active and console.is_terminal),
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    """Values as JSON can hold them: what is not finite becomes null."""
    return {key: float(value) if math.isfinite(value) else None for key, value in values.items()}


def report(folder: Path, values: Mapping[str, float]) -> Path:
    """Write ``report.json`` and print it as a table."""
    path = folder / "report.json"
    files.write(path, json.dumps(numbers(values), indent=1) + "\n")
    table = Table(title=str(path), title_justify="left")
    table.add_column("key")
    table.add_column("value", justify="right")
    for key, value in values.items():
        table.add_row(key, f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4f}")
    console.print(table)
    return path


def tables(folder: Path, found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> list[Path]:
    """Write ``tables/<metric>_<table>.csv`` of every table with a row, by metric and table; what is not finite is empty."""
    paths = []
    for label, of_metric in found.items():
        for name, rows in of_metric.items():
            if not rows:
                continue
            text = io.StringIO()
            columns = list(dict.fromkeys(key for row in rows for key in row))
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
            paths.append(folder / "tables" / f"{label}_{name}.csv")
            paths[-1].parent.mkdir(exist_ok=True)
            files.write(paths[-1], text.getvalue())
    return paths


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and not math.isfinite(value) else value
