"""Learning balance on pictures and on sounds: ``python scripts/commit_tasks.py FOLDER [--seeds 0 1 2] [--only NAME ...] [--figure FILE.png]``.

Trains the quickstart's composition on easy-VQA and the one of ``experiment=sounds`` with constant, unbalanced and coordinated
rates and two baselines; prints a table for each task and draws loss and kappa over training. What FOLDER already holds is
not trained again.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from commit_runs import arguments, kappas, length, lines_of, place, printed, study, table, trained

from mllm_factory.report_figures import COLOURS, LINES

RATE = 1.5e-3
FAST = 10 * RATE
LLM_UP = [f"schedule.part_lr.backbone={FAST}"]
ENCODER_UP = [f"schedule.part_lr.{part}={FAST}" for part in ("vision", "audio", "projector")]
VARIANTS: dict[str, list[str]] = {
    "constant 1:1": ["schedule=commit_monitor"],
    "LLM up 10:1": ["schedule=commit_monitor", *LLM_UP],
    "encoder up 1:10": ["schedule=commit_monitor", *ENCODER_UP],
    "CLR 1:1": ["schedule=commit_clr"],
    "CLR from 10:1": ["schedule=commit_clr", *LLM_UP],
    "CLR from 1:10": ["schedule=commit_clr", *ENCODER_UP],
    "CoMMIT 1:1": ["schedule=commit"],
    "grad_ratio": ["schedule=grad_ratio"],
}
"""Row of a table -> overrides. Ratios are LLM to encoder."""

CUT = [
    "schedule.lr=1.5e-3",
    "trainer.log_every=1",
    "trainer.eval_batch_size=128",
    "data.eval.limit=512",
    "metrics=[exact_match]",
]
WINDOW = ["schedule.window=40", "schedule.update_every=8"]
TASKS: dict[str, list[str]] = {
    "easy-VQA": ["experiment=quickstart"],
    "sounds": ["experiment=sounds"],
}
SMOOTH = 10
"""Steps that a point of the loss curves averages."""


def variant(folder: Path, task: str, more: list[str], name: str, seed: int) -> Path:
    """One variant of a task with one seed; its folder."""
    overrides = VARIANTS[name]
    windows = WINDOW if any("=commit" in choice for choice in overrides) else []
    return trained(place(folder / task, name, seed), *TASKS[task], *overrides, *CUT, *windows, *more, f"seed={seed}")


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, mean loss of the SMOOTH steps that end there)."""
    lines = lines_of(folder)
    cuts = (lines[i : i + SMOOTH] for i in range(0, len(lines) - SMOOTH + 1, SMOOTH))
    return [(cut[-1]["step"], statistics.fmean(line["loss"] for line in cut)) for cut in cuts]


def measured(folder: Path) -> list[tuple[int, float]]:
    """(step, kappa) of each measurement."""
    return [(step, 10**value) for step, value in kappas(lines_of(folder))]


def draw(found: Mapping[str, Mapping[str, Sequence[Path]]], file: Path) -> None:
    """A row of two panels for each task: loss and kappa, thin lines for seeds, thick ones for their mean (of kappa geometric)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.2 * len(found) + 0.6), layout="constrained")
    grid = figure.subplots(len(found), 2, squeeze=False)
    for axes, (task, folders) in zip(grid, found.items(), strict=True):
        for i, (name, runs) in enumerate(folders.items()):
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // 4 % len(LINES)]}
            _curves(axes[0], name, [losses(run) for run in runs], style, statistics.fmean)
            _curves(axes[1], name, [measured(run) for run in runs], style, statistics.geometric_mean)
        axes[0].set(title=f"{task}: training loss", xlabel="step")
        axes[1].set(title=f"{task}: kappa", xlabel="step", yscale="log")
        axes[1].axhline(1.0, color="#BBBBBB", linewidth=0.8)
    marks, names = grid[0][0].get_legend_handles_labels()
    figure.legend(marks, names, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(file, dpi=110)


def _curves(axes: Any, name: str, runs: Sequence[Sequence[tuple[int, float]]], style: Any, mean: Any) -> None:
    if not all(runs):
        return  # kappa was not measured
    for points in runs:
        axes.plot(*zip(*points, strict=True), linewidth=0.6, alpha=0.35, **style)
    at = [dict(points) for points in runs]
    steps = [step for step in at[0] if all(step in points for points in at)]
    axes.plot(steps, [mean([points[step] for points in at]) for step in steps], linewidth=1.8, label=name, **style)


def main() -> None:
    """Train what is missing; print the tables, draw the figure."""
    parser = arguments(__doc__, VARIANTS, seeds=3, steps=200, batch=32)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--figure", type=Path, help="draw loss and kappa into this file")
    given = parser.parse_args()
    folder = given.folder.absolute()
    found: dict[str, dict[str, list[Path]]] = {}
    for task in given.tasks:
        found[task] = study(given.only, given.seeds, partial(variant, folder, task, length(given)))
    printed({task: table(folders) for task, folders in found.items()}, len(given.seeds), given.json)
    if given.figure:
        draw(found, given.figure)


if __name__ == "__main__":
    main()
