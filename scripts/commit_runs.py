"""What the experiments with learning balance share: runs that are trained once, their numbers, a table and curves.

A study is a folder with a run for each variant and seed, ``<folder>/<variant>/<seed>``. What is there is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mllm_factory import Batch, run
from mllm_factory.config import compose

FINAL = 30
"""The final loss is that of so many last steps."""

HEADER = (
    "| variant | seeds | mean loss | final loss | accuracy | median log10 kappa | sd log10 kappa |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)

Line = dict[str, Any]
Numbers = dict[str, float]
Row = dict[str, tuple[float, float]]


def tree_of(folder: Path, *overrides: str) -> dict[str, Any]:
    """A composed tree that writes to ``folder`` and runs on the CPU."""
    composed = compose("train", [*overrides, f"output_dir={folder}", "trainer.device=cpu"])
    problems = composed.check()
    if problems or composed.tree is None:
        raise SystemExit("\n".join(map(str, problems)))
    return composed.tree


def trained(folder: Path, *overrides: str) -> Path:
    """Train into a folder unless it holds this very run; the folder. What was cut off starts anew.

    Raises:
        SystemExit: the folder holds the results of other options.
    """
    tree = tree_of(folder, *overrides)
    if (folder / "report.json").exists():
        held = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        changed = [key for key in tree if held.get(key) != tree[key]]
        if changed:
            raise SystemExit(f"{folder} holds a run with another {changed[0]}; choose another folder, or remove it")
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    run.train(tree)
    return folder


def place(folder: Path, name: str, seed: int) -> Path:
    """Where a variant's run with a seed lies."""
    return folder / "".join(c for c in name.replace(" ", "_").replace(":", "-") if c not in ",=") / str(seed)


def lines_of(folder: Path) -> list[Line]:
    """The lines of a run's ``metrics.jsonl`` that have a loss."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if "loss" in line]


def kappas(lines: Sequence[Line]) -> list[tuple[int, float]]:
    """(step, log10 of d_llm / d_encoder) of each measurement; a measurement stays in the lines until the next one."""
    found: list[tuple[int, float]] = []
    last: tuple[Any, Any] | None = None
    for line in lines:
        pair: tuple[Any, Any] = (line.get("balance/d/llm"), line.get("balance/d/encoder"))
        if pair != last and all(pair):
            found.append((line["step"], math.log10(pair[0] / pair[1])))
        last = pair
    return found


def numbers(folder: Path) -> Numbers:
    """Mean loss over all steps, final loss, accuracy, and the median and deviation of log10 kappa (NaN if not measured)."""
    lines = lines_of(folder)
    losses, measured = [line["loss"] for line in lines], [k for _, k in kappas(lines)]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {
        "mean": statistics.fmean(losses),
        "final": statistics.fmean(line["loss"] for line in lines if line["step"] > lines[-1]["step"] - FINAL),
        "accuracy": report.get("exact_match", math.nan),
        "median": statistics.median(measured) if measured else math.nan,
        "deviation": statistics.stdev(measured) if len(measured) > 1 else math.nan,
    }


def row(found: Sequence[Numbers]) -> Row:
    """Mean and deviation over seeds of each number; NaN where a seed has none."""
    columns = {key: [one[key] for one in found] for key in found[0]}
    return {key: (statistics.fmean(values), _spread(values)) for key, values in columns.items()}


def _spread(values: Sequence[float]) -> float:
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


def shown(name: str, seeds: int, found: Row) -> str:
    """A line of the table."""
    cells = [f"{found[key][0]:.3f} ± {found[key][1]:.3f}" for key in ("mean", "final", "accuracy")]
    cells += [f"{found[key][0]:.2f}" if math.isfinite(found[key][0]) else "-" for key in ("median", "deviation")]
    return f"| {name} | {seeds} | " + " | ".join(cells) + " |"


def arguments(
    about: str | None, variants: Mapping[str, Any], seeds: int, steps: int, batch: int
) -> argparse.ArgumentParser:
    """``FOLDER --seeds ... --steps N --batch N --only NAME ... --json``."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what it holds is not trained again")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)))
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch, help="samples of a step")
    parser.add_argument("--only", nargs="+", choices=variants, default=list(variants), metavar="VARIANT")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else")
    return parser


def length(given: argparse.Namespace) -> list[str]:
    """The overrides that ``--steps`` and ``--batch`` stand for; a run is saved at its end only."""
    steps = [f"trainer.max_steps={given.steps}", f"trainer.save_every={given.steps}"]
    return [*steps, f"trainer.batch_size={given.batch}"]


def study(names: Sequence[str], seeds: Sequence[int], train: Callable[[str, int], Path]) -> dict[str, list[Path]]:
    """The run of every variant and seed, trained where it is missing; seed by seed, so that all variants have the first ones."""
    folders: dict[str, list[Path]] = {name: [] for name in names}
    for seed in seeds:
        with same_batches():
            for name in names:
                folders[name].append(train(name, seed))
    return folders


@contextmanager
def same_batches() -> Iterator[None]:
    """Collate the training batches once for all runs inside, which must differ in nothing that makes them.

    Runs of one seed see the same batches, and making those of a tiny model takes longer than learning from them.
    """
    made: list[Batch] = []
    original = run.train_batches

    def remembered(*given: Any, **options: Any) -> Iterator[Batch]:
        yield from made
        options["first"] += len(made)  # of one process without accumulation, so a step is a batch
        for batch in original(*given, **options):
            made.append(batch)
            yield batch

    run.train_batches = remembered
    try:
        yield
    finally:
        run.train_batches = original


def table(folders: Mapping[str, Sequence[Path]]) -> dict[str, Row]:
    """Rows by variant."""
    return {name: row([numbers(folder) for folder in of]) for name, of in folders.items()}


def printed(tables: Mapping[str, Mapping[str, Row]], seeds: int, as_json: bool) -> None:
    """Tables by title as markdown, or as JSON, on stdout."""
    if as_json:
        print(json.dumps(tables, indent=2))
        return
    for title, found in tables.items():
        print("\n".join([f"{title}\n", HEADER, *(shown(name, seeds, of) for name, of in found.items()), ""]))
