"""The table of docs/balance.md: ``python scripts/commit_tiny.py FOLDER [--seeds 0 1 2] [--steps 300] [--only NAME ...] [--json]``.

Trains the base of ``experiment=commit_tiny`` once, then each variant with each seed, and prints loss, accuracy and the
spread of kappa. What FOLDER already holds is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

from mllm_factory import run, runs
from mllm_factory.assemble import build_model
from mllm_factory.checkpoint import load
from mllm_factory.config import compose

RATE = 6e-3
FAST, SLOW = 10 * RATE, RATE / 10
LLM_UP = [f"schedule.part_lr.backbone={FAST}"]
ENCODER_UP = [f"schedule.part_lr.vision={FAST}", f"schedule.part_lr.projector={FAST}"]
CALM = ["schedule.window=50", "schedule.update_every=10", "schedule.measure_every=2"]
SWINGING = ["schedule.distance=kl", "schedule.window=10", "schedule.update_every=10", "schedule.measure_every=1"]
VARIANTS: dict[str, list[str]] = {
    "constant 1:1": ["schedule=commit_monitor"],
    "LLM up 10:1": ["schedule=commit_monitor", *LLM_UP],
    "encoder up 1:10": ["schedule=commit_monitor", *ENCODER_UP],
    "CLR from 10:1": ["schedule=commit_clr", *CALM, *LLM_UP],
    "CLR from 1:10": ["schedule=commit_clr", *CALM, *ENCODER_UP],
    "CLR 1:1": ["schedule=commit_clr", *CALM],
    "CLR 1:1, KL, N = L": ["schedule=commit_clr", *SWINGING],
    "CoMMIT 1:1": ["schedule=commit", *CALM],
    "Feature CD": ["schedule=feature_cd"],
    "Language CD": ["schedule=language_cd"],
    "static ratio 0.1:1": ["schedule=static_ratio", f"schedule.part_lr.backbone={SLOW}"],
    "grad_ratio": ["schedule=grad_ratio"],
    "OGM-GE": ["schedule=ogm_ge"],
    "AGM": ["schedule=agm"],
}
"""Row of the table -> overrides of ``experiment=commit_tiny``. Ratios are LLM to encoder."""

FINAL = 30
"""The final loss is the mean over so many last steps."""


def tree_of(folder: Path, *overrides: str) -> dict[str, Any]:
    """A composed tree that writes to ``folder``."""
    composed = compose("train", [*overrides, f"output_dir={folder}", "trainer.device=cpu"])
    problems = composed.check()
    if problems or composed.tree is None:
        raise SystemExit("\n".join(map(str, problems)))
    return composed.tree


def base(folder: Path, *overrides: str) -> Path:
    """Train the base and store its language model in transformers' format; the folder of both."""
    target = folder / "base"
    if not (target / "backbone" / "config.json").exists():
        tree = tree_of(target, "experiment=commit_tiny_base", *overrides)
        run.train(tree)
        model = build_model(tree)
        load(runs.resolve(str(target)), model)
        language: Any = model.backbone
        language.model.save_pretrained(target / "backbone")
    return target


def variant(folder: Path, start: Path, name: str, seed: int, *overrides: str) -> dict[str, float]:
    """Train one variant with one seed; the numbers of its row."""
    target = folder / name.replace(" ", "_").replace(":", "-").replace(",", "") / str(seed)
    if not (target / "report.json").exists():
        shutil.rmtree(target, ignore_errors=True)  # what was cut off starts anew
        given = [f"init_from={start}", f"backbone.pretrained={start / 'backbone'}", f"seed={seed}"]
        run.train(tree_of(target, "experiment=commit_tiny", *VARIANTS[name], *given, *overrides))
    return numbers(target)


def numbers(folder: Path) -> dict[str, float]:
    """Mean loss over all steps, final loss, accuracy, and the median and deviation of log10 kappa (NaN if not measured)."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    distances = [(line.get("balance/d/encoder"), line.get("balance/d/llm")) for line in lines]
    kappas, last = [], None
    for pair in distances:
        if pair != last and all(pair):
            kappas.append(math.log10(pair[1] / pair[0]))
        last = pair
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {
        "mean": statistics.fmean(losses),
        "final": statistics.fmean(losses[-FINAL:]),
        "accuracy": report.get("exact_match", math.nan),
        "median": statistics.median(kappas) if kappas else math.nan,
        "deviation": statistics.stdev(kappas) if len(kappas) > 1 else math.nan,
    }


def row(found: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and deviation over seeds of each number."""
    columns = {key: [numbers[key] for numbers in found] for key in found[0]}
    return {k: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for k, v in columns.items()}


def shown(name: str, found: dict[str, tuple[float, float]]) -> str:
    """A line of the table."""
    cells = [f"{found[key][0]:.3f} ± {found[key][1]:.3f}" for key in ("mean", "final", "accuracy")]
    cells += [f"{found[key][0]:.2f}" if math.isfinite(found[key][0]) else "-" for key in ("median", "deviation")]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Train what is missing; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else")
    given = parser.parse_args()
    folder, table = given.folder.absolute(), {}
    start = base(folder)
    steps = [f"trainer.max_steps={given.steps}", f"trainer.save_every={given.steps}"]
    for name in given.only:
        table[name] = row([variant(folder, start, name, seed, *steps) for seed in given.seeds])
    if given.json:
        print(json.dumps(table, indent=2))
        return
    print(
        "| variant | mean loss | final loss | accuracy | median log10 kappa | sd log10 kappa |\n|---|---|---|---|---|---|"
    )
    for name, found in table.items():
        print(shown(name, found))


if __name__ == "__main__":
    main()
