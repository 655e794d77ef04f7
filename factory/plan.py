"""What a run takes on more machines than this one: arithmetic on what ``check`` found, each number with its formula.

W processes with a device each; w, g, o, a bytes of weights, gradients, optimizer state and activations of one process as
``check`` counts them; l bytes of the largest decoder layer, e of all weights outside of decoder layers; F FLOPs of a step of one
process; b samples of a batch, c batches of a step; N samples of the training data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mllm_factory.errors import UserError, hint


@dataclass(frozen=True)
class Machine:
    """One device and what is around it. These are assumptions, to be replaced by what was measured.

    Attributes:
        flops: FLOPs per second of the device at the run's precision.
        use: share of them that training reaches.
        memory: bytes of the device.
        link: bytes per second between processes, each way, of the slowest part that all traffic passes.
        disk: bytes per second to the file system that checkpoints and features lie on.
        worker: samples per second that one loader worker reads, decodes and collates.
    """

    flops: float = 3e14
    use: float = 0.4
    memory: float = 8e10
    link: float = 2.5e10
    disk: float = 1e9
    worker: float = 50.0


def machine(text: str) -> Machine:
    """A machine from ``flops=1e15,use=0.3``; what is not named stays as assumed.

    Raises:
        UserError: no such property, or no number above 0.
    """
    known = asdict(Machine())
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in known:
            raise UserError(f"--machine: there is no '{name}'{hint(name, known)}")
        try:
            known[name] = float(value)
        except ValueError:
            known[name] = 0.0
        if not known[name] > 0:
            raise UserError(f"--machine: {name} is a number above 0, got '{value}'; write it as {name}=1e9")
    return Machine(**known)


@dataclass(frozen=True)
class Row:
    """One number of a plan."""

    name: str
    value: float
    unit: str
    formula: str


def plan(found: Mapping[str, Any], processes: int, of: Machine) -> list[Row]:
    """Memory, traffic, time, checkpoints, data and cached features.

    Args:
        found: of ``run.check``; it holds the cost of a step.
        processes: W.
        of: what each process runs on.

    Raises:
        UserError: fewer than one process, or a step whose cost is not known.
    """
    if processes < 1:
        raise UserError(f"--processes: {processes} is no number of processes; use 1 or more")
    if "flops_per_step" not in found:
        raise UserError("--processes: what a step takes is not known; the notes of check say why")
    return [*_memory(found, processes, of), *_time(found, processes, of)]


def _memory(found: Mapping[str, Any], W: int, of: Machine) -> Iterator[Row]:
    m, s = found["memory"], found["sharding"]
    w, g, o, a = (m[name] for name in ("weights", "gradients", "optimizer", "activations"))
    yield Row("memory of a process, ddp", m["peak"], "B", "w + g + o + a at one moment")
    yield Row(
        "memory of a process, fsdp",
        (w + g + o) / W + 2 * s["layer"] + s["rest"] + a,
        "B",
        "(w + g + o) / W + 2 l + e + a",
    )
    yield Row("memory of a device", of.memory, "B", "assumed")


def _time(found: Mapping[str, Any], W: int, of: Machine) -> Iterator[Row]:
    m, trainer, N = found["memory"], found["trainer"], found["samples"]
    b, c = trainer["batch_size"], trainer["accumulate"]
    w, g = m["weights"], m["gradients"]
    sharded = trainer["strategy"] == "fsdp"
    ddp, fsdp = 2 * (W - 1) / W * g, c * (W - 1) / W * (2 * w + g)
    yield Row("traffic of a process a step, ddp", ddp, "B", "2 (W-1)/W g: gradients are summed once")
    yield Row(
        "traffic of a process a step, fsdp", fsdp, "B", "c (W-1)/W (2 w + g): weights gathered twice, gradients spread"
    )
    arithmetic, waiting = found["flops_per_step"] / (of.flops * of.use), (fsdp if sharded else ddp) / of.link
    step = max(arithmetic, waiting)
    name = "fsdp" if sharded else "ddp"
    yield Row("arithmetic of a step", arithmetic, "s", "F / (flops use)")
    yield Row(f"traffic of a step, {name}", waiting, "s", "traffic / link")
    yield Row("a step", step, "s", "the longer of both: they overlap")
    rate = W * b * c / step
    yield Row("samples of a step", W * b * c, "", "W b c")
    yield Row("an epoch", N / (W * b * c), "steps", "N / (W b c)")
    yield Row("an epoch's time", N / rate / 3600, "h", "steps x a step")
    yield Row("checkpoint", 3 * g, "B", "g trained weights + 2 g moments of AdamW")
    saving = 3 * g / of.disk + (3 * g / of.link if sharded else 0.0)
    yield Row("writing a checkpoint", saving, "s", "3 g / disk" + (" + 3 g / link" if sharded else ""))
    yield Row("time spent on checkpoints", saving / (saving + trainer["save_every"] * step), "share", "with save_every")
    yield Row("samples to be loaded", rate, "1/s", "W b c / a step")
    yield Row("loader workers of a process", rate / W / of.worker, "", "samples / (W worker)")
    for modality, size in found["features"].items():
        yield Row(f"cached {modality} features", size * N, "B", "N x tokens x width x 4, one item a sample")
        yield Row(f"reading {modality} features", size * rate / W, "B/s", "of a process")
