"""The table of docs/balance.md: ``python scripts/commit_tiny.py FOLDER [--seeds 0 1 2] [--steps 600] [--only NAME ...] [--json]``.

Trains the base of ``experiment=commit_tiny`` once, then each variant with each seed, and prints loss, accuracy and the
spread of kappa. What FOLDER already holds is not trained again.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from commit_runs import arguments, length, place, printed, study, table, trained, tree_of

from mllm_factory import runs
from mllm_factory.assemble import build_model
from mllm_factory.checkpoint import load

RATE = 2e-3
FAST, SLOW = 10 * RATE, RATE / 10
LLM_UP = [f"schedule.part_lr.backbone={FAST}"]
ENCODER_UP = [f"schedule.part_lr.vision={FAST}", f"schedule.part_lr.projector={FAST}"]
KL = ["schedule.distance=kl"]
CLR = ["schedule=commit_clr", "schedule.min_samples=5"]
COMMIT = ["schedule=commit", "schedule.min_samples=5"]
VARIANTS: dict[str, list[str]] = {
    "constant 1:1": ["schedule=commit_monitor"],
    "LLM up 10:1": ["schedule=commit_monitor", *LLM_UP],
    "encoder up 1:10": ["schedule=commit_monitor", *ENCODER_UP],
    "CLR from 10:1": [*CLR, *LLM_UP],
    "CLR from 1:10": [*CLR, *ENCODER_UP],
    "CLR 1:1": [*CLR],
    "CLR 1:1, KL, N = L": [*CLR, *KL, "schedule.window=20"],
    "CLR 1:1, KL, log-mean": [*CLR, *KL, "schedule.average=log"],
    "CoMMIT 1:1": [*COMMIT],
    "CoMMIT from 10:1": [*COMMIT, *LLM_UP],
    "Feature CD": ["schedule=feature_cd"],
    "Language CD": ["schedule=language_cd"],
    "static ratio 0.1:1": ["schedule=static_ratio", f"schedule.part_lr.backbone={SLOW}"],
    "grad_ratio": ["schedule=grad_ratio"],
    "OGM-GE": ["schedule=ogm_ge"],
    "AGM": ["schedule=agm"],
}
"""Row of the table -> overrides of ``experiment=commit_tiny``. Ratios are LLM to encoder.

With five measurements the multipliers start right behind the warm-up; half a window later LoRA may be lost already.
"""


def base(folder: Path, *overrides: str) -> Path:
    """Train the base and store its language model in transformers' format; the folder of both."""
    target = trained(folder / "base", "experiment=commit_tiny_base", *overrides)
    if not (target / "backbone" / "config.json").exists():
        model = build_model(tree_of(target, "experiment=commit_tiny_base", *overrides))
        load(runs.resolve(str(target)), model)
        language: Any = model.backbone
        language.model.save_pretrained(target / "backbone")
    return target


def variant(folder: Path, start: Path, more: list[str], name: str, seed: int) -> Path:
    """One variant with one seed; its folder."""
    given = [f"init_from={start}", f"backbone.pretrained={start / 'backbone'}", f"seed={seed}"]
    return trained(place(folder, name, seed), "experiment=commit_tiny", *VARIANTS[name], *given, *more)


def main() -> None:
    """Train what is missing; print the table."""
    given = arguments(__doc__, VARIANTS, seeds=5, steps=600, batch=64).parse_args()
    folder = given.folder.absolute()
    folders = study(given.only, given.seeds, partial(variant, folder, base(folder), length(given)))
    printed({"commit_tiny": table(folders)}, len(given.seeds), given.json)


if __name__ == "__main__":
    main()
