"""The table of docs/balance.md: ``python scripts/commit_tiny.py FOLDER [--seeds 0 1 2] [--steps 600] [--only NAME ...] [--json]``.

Trains the base of ``experiment=commit_tiny`` once, then each variant with each seed, and prints loss, accuracy and the
spread of kappa, and which claims hold. What FOLDER already holds is not trained again. Ends with status 1 if a claim fails.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from commit_runs import Row, arguments, length, place, printed, study, table, trained, tree_of

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

Claim = tuple[str, str, str, float]
CLAIMS: dict[str, Claim] = {
    "C1, a fast LLM slows convergence": ("final", "constant 1:1", "LLM up 10:1", 1.0),
    "C1, a fast encoder slows convergence": ("final", "constant 1:1", "encoder up 1:10", 1.0),
    "C2, coordination repairs a fast LLM": ("final", "CLR from 10:1", "LLM up 10:1", 1.0),
    "C4, sqrt(JS) and a window of five updates steady kappa": ("deviation", "CLR 1:1", "constant 1:1", 1.0),
    "C4, KL and a window of one update make it swing": ("deviation", "constant 1:1", "CLR 1:1, KL, N = L", 0.5),
}
"""Claim -> (number, lower row, higher row, factor): it holds where lower < factor * higher, in the mean over seeds.

That coordination beats equal rates (C3) or that the regulariser helps (C5) is reported and not claimed. log kappa of KL, a
squared distance, is twice that of its root, hence the factor of the last one.
"""


def claims(rows: Mapping[str, Row]) -> dict[str, bool]:
    """Which of the claims hold, among those whose two rows are in the table."""
    return {
        claim: rows[low][key][0] < factor * rows[high][key][0]
        for claim, (key, low, high, factor) in CLAIMS.items()
        if low in rows and high in rows
    }


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
    """Train what is missing; print the table and the claims."""
    given = arguments(__doc__, VARIANTS, seeds=5, steps=600, batch=64).parse_args()
    folder = given.folder.absolute()
    folders = study(given.only, given.seeds, partial(variant, folder, base(folder), length(given)))
    rows = table(folders)
    printed({"commit_tiny": rows}, len(given.seeds), given.json)
    found = claims(rows)
    for claim, holds in found.items():
        print(f"{claim}: {'holds' if holds else 'DOES NOT HOLD'}", file=sys.stderr if given.json else sys.stdout)
    if not all(found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
