"""The table of docs/imbalance.md: ``python scripts/imbalance_demo.py FOLDER [--data easy_vqa] [OVERRIDE ...]``.

For each data set it trains a model that can see (or hear) and one whose training pictures belong to other questions; plants a
text-only model, the first one with a projector that gives zeros; starts four ways of tuning from the blind one's language
model; and compares all of them in a report. What FOLDER already holds is not trained again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from mllm_factory import runs
from mllm_factory.assemble import build_model
from mllm_factory.checkpoint import load


@dataclass(frozen=True)
class Task:
    """A data set of the demo.

    Attributes:
        modality: what its questions are about.
        experiment: the preset to train with.
        exchanged: the data preset whose training media belong to other questions.
        tuned: overrides of every way of tuning.
    """

    modality: str
    experiment: str
    exchanged: str
    tuned: tuple[str, ...] = ()


TASKS = {
    "easy_vqa": Task("vision", "imbalance_demo", "easy_vqa_exchanged", ("trainer.max_steps=200",)),
    "sounds": Task(
        "audio", "imbalance_demo_sounds", "sounds_exchanged", ("trainer.max_steps=400", "tuning.audio.name=full")
    ),
}
WATCH = "schedule.measure_every=10"
WAYS: dict[str, tuple[str, ...]] = {
    "frozen": ("tuning=projector_only", "schedule=cosine"),
    "full": ("tuning=full", WATCH),
    "lora": ("tuning=lora", WATCH),
    "mores": ("tuning=mores", WATCH),
}
"""Ways of tuning -> overrides. With a frozen language model there is no balance to monitor."""

COLUMNS = (
    "accuracy blind_accuracy/{0}/shuffle {1}_gain {1}_gain/first js_{1} flip_rate/{0} modality_shapley/{0} "
    "modality_shapley/{0}/accuracy "
    "modality_shapley/text interaction/{0}+text attention_share/{0} lmar/{0} parameters/trainable_backbone"
)


def verb(*words: str) -> None:
    """Run a verb of the command in a process of its own."""
    subprocess.run([sys.executable, "-m", "mllm_factory", *words], check=True)


def train(folder: Path, name: str, task: Task, *overrides: str) -> Path:
    """A run's folder, trained unless it is there; what was cut off goes on from its checkpoint."""
    place = folder / name
    if not (place / "report.json").exists():
        more = [f"resume={place}"] if place.exists() and runs.steps(place) else []
        verb("train", f"experiment={task.experiment}", *overrides, f"name={name}", f"output_dir={place}", *more)
    return place


def plant(see: Path, folder: Path, task: Task) -> Path:
    """The run with a projector that gives zeros, judged: whatever the encoder finds, the language model is told nothing."""
    place = folder / "planted"
    if not (place / "report.json").exists():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(runs.resolve(str(see)), place / "weights")
        file = place / "weights" / "model.safetensors"
        with safe_open(file, "pt") as stored:
            meta = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
        silent = [name for name in tensors if name.startswith("projectors.")]
        save_file(tensors | {name: tensors[name] * 0 for name in silent}, file, metadata=meta)
        (place / "weights" / "manifest.json").unlink()
        (place / "weights" / "manifest.json").write_text(json.dumps(runs.manifest(place / "weights")), encoding="utf-8")
        verb("imbalance", f"checkpoint={place / 'weights'}", "name=planted", f"output_dir={place}")
    return place


def language(blind: Path, folder: Path) -> Path:
    """The blind run's language model in transformers' format."""
    place = folder / "language"
    if not (place / "config.json").exists():
        import yaml

        tree = yaml.safe_load((blind / "config.yaml").read_text(encoding="utf-8"))
        model = build_model(tree)
        load(runs.resolve(str(blind)), model)
        backbone: Any = model.backbone
        backbone.model.save_pretrained(place)
    return place


def demo(folder: Path, name: str, more: Sequence[str]) -> None:
    """All runs of one data set, and their report."""
    task = TASKS[name]
    see = train(folder, "see", task, WATCH, *more)
    blind = train(folder, "blind", task, f"data={task.exchanged}", WATCH, *more)
    planted = plant(see, folder, task)
    start = f"backbone.pretrained={language(blind, folder)}"
    steers = (f"tuning.backbone.modalities={task.modality}",)
    tuned = [
        train(folder, way, task, *overrides, *task.tuned, *(steers if way == "mores" else ()), start, *more)
        for way, overrides in WAYS.items()
    ]
    eye = "image" if task.modality == "vision" else "audio"
    columns = ",".join(COLUMNS.format(task.modality, eye).split())
    places = map(str, (see, blind, planted, *tuned))
    verb(
        "report",
        *places,
        "--by",
        "name",
        "--columns",
        columns,
        "--main",
        "accuracy",
        "--output",
        str(folder / "report"),
    )


def main() -> None:
    """Run the demo; a line with the seconds of training at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", action="append", choices=list(TASKS), help="once for each data set; default: all")
    parser.add_argument("overrides", nargs="*", help="of every training, such as trainer.max_steps=2")
    given = parser.parse_intermixed_args()
    for name in given.data or TASKS:
        demo(given.folder.absolute() / name, name, given.overrides)
    reports = [json.loads(file.read_text()) for file in given.folder.glob("*/*/report.json")]
    print(f"trained for {sum(values.get('train/seconds') or 0.0 for values in reports):.0f} s in all")


if __name__ == "__main__":
    main()
