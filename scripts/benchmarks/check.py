"""What ``mllm-factory check`` costs for models that no laptop holds: seconds and memory of whole processes.

Each composition is checked in a fresh process (weights are counted on the meta device, one training step is run there), in turns
with a process that only imports the libraries a check needs. Nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import startup
from benchmarks.harness import Result, Row, compare

SECONDS, MEGABYTES = 10.0, 1500.0
IMPORTS = "import mllm_factory.run, timm, torchvision, transformers.models.llama.modeling_llama"
LARGE = ["vision=clip_vit_l_336", "backbone=vicuna_13b", "data.max_length=2048"]
CASES: dict[str, list[str]] = {
    "smoke": ["experiment=smoke"],
    "CLIP-L/336 + MLP + Vicuna-13B": LARGE,
    "the same, LoRA": [*LARGE, "tuning=lora", "tuning.backbone.rank=128", "trainer.gradient_checkpointing=true"],
}
PUBLISHED = "13,015,864,320"
"""Parameters of Vicuna-13B."""


class Check(NamedTuple):
    """One process: seconds of the clock, its CPU seconds and peak MB, exit code, what it printed."""

    wall: float
    run: startup.Run


def measure(command: list[str], folder: Path) -> Check:
    """Run a command to its end."""
    started = time.perf_counter()
    found = startup.measure(command, folder)
    return Check(time.perf_counter() - started, found)


def run(runs: int | None, small: bool) -> Result:
    """Every case and the imports in turns, ``runs`` rounds; ``small`` checks the smallest model alone."""
    os.environ["HF_HUB_OFFLINE"], os.environ["COLUMNS"] = "1", "160"
    result = Result("check", "the imports that it needs")
    tool = str(Path(sys.executable).parent / "mllm-factory")
    cases = {name: words for name, words in CASES.items() if not small or words is CASES["smoke"]}
    commands = {name: [tool, "check", *words] for name, words in cases.items()}
    commands["imports"] = [sys.executable, "-c", IMPORTS]
    found: dict[str, list[Check]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        measure(commands["imports"], Path(folder))  # the first run fills the disk cache
        for _ in range(runs or 3):
            for name, command in commands.items():
                found[name].append(measure(command, Path(folder)))
    other = found.pop("imports")
    for name, mine in found.items():
        result.rows += _rows(name, mine, other)
        result.checks[f"{name}: exit code 0"] = all(one.run.code == 0 for one in mine)
        if cases[name] is LARGE:
            result.checks[f"{name}: {PUBLISHED} parameters"] = all(PUBLISHED in one.run.text for one in mine)
    return result


def _rows(name: str, mine: list[Check], other: list[Check]) -> list[Row]:
    wall = compare(name, "wall s", [one.wall for one in mine], [one.wall for one in other])
    cpu = compare(name, "CPU s", [one.run.cpu for one in mine], [one.run.cpu for one in other])
    memory = compare(name, "MB", [one.run.memory for one in mine], [one.run.memory for one in other])
    return [_held(wall, SECONDS), cpu, _held(memory, MEGABYTES)]


def _held(row: Row, mark: float) -> Row:
    """The mark is on our number, not on the ratio."""
    return Row(row.case, row.unit, row.ours, row.other, row.ratio, "<=", mark, absolute=True)
