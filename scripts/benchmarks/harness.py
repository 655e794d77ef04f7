"""What every benchmark shares: pairs of measurements, their ratios, the machine, and how a result is shown."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from statistics import median
from typing import Any

LIBRARIES = ("torch", "transformers", "timm", "hydra-core")


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of several measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median(values), min(values), max(values))

    def show(self, digits: int = 1) -> str:
        """``12.3 (11.9-13.0)``"""
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}-{self.high:,.{digits}f})"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        case: what was measured.
        unit: of ``ours`` and ``other``.
        ours, other: the two sides.
        ratio: over the pairs, in the direction of ``rule``: ours / other for ``<=``, other / ours for ``>=``.
        rule: ``<=`` or ``>=``.
        mark: what the median ratio is held against; None where the row is for information.
        absolute: the mark is on ``ours`` instead of the ratio.
    """

    case: str
    unit: str
    ours: Spread
    other: Spread
    ratio: Spread
    rule: str = "<="
    mark: float | None = None
    absolute: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the median keeps the mark."""
        if self.mark is None:
            return None
        value = (self.ours if self.absolute else self.ratio).median
        return value <= self.mark if self.rule == "<=" else value >= self.mark


def compare(
    case: str, unit: str, ours: Sequence[float], other: Sequence[float], rule: str = "<=", mark: float | None = None
) -> Row:
    """A row from measurements taken in pairs: ``ours[i]`` right before or after ``other[i]``."""
    pairs = list(zip(ours, other, strict=True))
    ratios = [a / b if rule == "<=" else b / a for a, b in pairs]
    return Row(case, unit, Spread.of(ours), Spread.of(other), Spread.of(ratios), rule, mark)


@dataclass
class Result:
    """What a benchmark found.

    Attributes:
        bench: its name.
        against: what the other side is.
        rows: the comparisons.
        checks: facts that must hold whatever the speed; one that is False makes the command fail.
        facts: numbers that explain the rows.
    """

    bench: str
    against: str
    rows: list[Row] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True where every check holds. Marks are reported, never enforced."""
        return all(self.checks.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = [{**asdict(row), "met": row.met} for row in self.rows]
        plain = {"bench": self.bench, "against": self.against, "machine": machine(), "ok": self.ok}
        return {**plain, "checks": self.checks, "facts": self.facts, "rows": rows}


def machine() -> dict[str, Any]:
    """Cores, threads, load and versions: numbers mean little without them."""
    torch = sys.modules.get("torch")
    threads = {"torch_threads": torch.get_num_threads()} if torch else {}
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "architecture": platform.machine(),
        **threads,
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def cells(row: Row) -> list[str]:
    """A row as text: case, ours, other, ratio, mark, whether it was met."""
    digits = 3 if row.unit.endswith(" s") else 1
    mark = f"{'at most' if row.rule == '<=' else 'at least'} {row.mark:g}" if row.mark is not None else ""
    mark += f" {row.unit}" if row.absolute else ""
    met = {True: "yes", False: "no", None: ""}[row.met]
    return [
        f"{row.case}, {row.unit}",
        row.ours.show(digits),
        row.other.show(digits),
        row.ratio.show(3 if row.ratio.median < 2 else 2),
        mark,
        met,
    ]


HEADER = ["case", "ours", "other", "ratio", "mark", "met"]


def show(result: Result) -> None:
    """Print the machine, the table, the facts and the checks."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()), style="dim")
    table = Table(*HEADER, title=f"{result.bench}: ours against {result.against}; median (min-max)")
    for row in result.rows:
        table.add_row(*cells(row))
    console.print(table)
    for name, value in {**result.facts, **result.checks}.items():
        console.print(f"{name}: {value}", highlight=False)


def markdown(result: Result) -> str:
    """The table for docs/benchmarks.md."""
    lines = [HEADER, ["---"] * len(HEADER), *map(cells, result.rows)]
    m = machine()
    about = ", ".join(
        [
            *([f"{m['torch_threads']} torch threads"] if "torch_threads" in m else []),
            *(f"{name} {m[name]}" for name in LIBRARIES),
        ]
    )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{m['cores']} cores of an {m['architecture']} CPU, {about}.\n\n{table}"
