"""What a report says, and the same as Markdown, as CSV tables and as JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_factory.report_columns import UP, best, direction, number, shown
from mllm_factory.report_groups import Group, pareto
from mllm_factory.report_runs import DONE, Run

BEST, FRONT = "★", "●"
"""Marks of the best value of a column and of the Pareto front: signs, as colour alone does not reach everybody."""


@dataclass(frozen=True)
class Report:
    """What a report says.

    Attributes:
        title: what was compared.
        groups: configurations, best first.
        columns: key -> which way is better.
        main: the metric that ranks, if any.
    """

    title: str
    groups: Sequence[Group]
    columns: Mapping[str, int]
    main: str | None

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for group in self.groups for run in group.runs]

    @property
    def finished(self) -> list[Group]:
        """Configurations with at least one finished run: the rows of the table."""
        return [group for group in self.groups if group.done]

    @property
    def settings(self) -> list[str]:
        """The keys in which configurations differ."""
        return list(dict.fromkeys(key for group in self.groups for key in group.settings))

    @property
    def front(self) -> list[bool]:
        """Which rows no other beats in the main metric and in trainable parameters; none where the metric has no better way."""
        cost, key = "parameters/trainable", self.main or ""
        way = self.columns.get(key, direction(key))
        points = [
            (g.values[cost].mean, g.values[key].mean) if key in g.values and cost in g.values else None
            for g in self.finished
        ]
        return pareto(points, way == UP) if way and sum(p is not None for p in points) > 1 else [False] * len(points)

    @property
    def counts(self) -> str:
        """``4 jobs: 3 done, 1 running``."""
        states = [run.state for run in self.runs]
        by = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        return f"{len(states)} {'job' if len(states) == 1 else 'jobs'}: {by}"


# ---------------------------------------------------------------- tables


def headings(report: Report) -> list[str]:
    """The heads of the table's columns, with an arrow where a way is better."""
    arrows = {1: " ↑", -1: " ↓", 0: ""}
    names = report.settings or ["run"]
    return [*names, "n", *(key + arrows[way] for key, way in report.columns.items()), "Pareto"]


def rows(report: Report) -> list[list[tuple[str, bool]]]:
    """The table's cells and whether each is marked best."""
    groups = report.finished
    marks = {key: best(groups, key, way) for key, way in report.columns.items()}
    table = []
    for i, (group, on) in enumerate(zip(groups, report.front, strict=True)):
        names = list(group.settings.values()) or [group.label]
        n = f"{group.done}" if group.done == len(group.runs) else f"{group.done} of {len(group.runs)}"
        cells = [(shown(group.values.get(key), group.done, key), marks[key][i]) for key in report.columns]
        table.append([*((text, False) for text in (*names, n)), *cells, (FRONT if on else "", False)])
    return table


def job_rows(found: Sequence[Run]) -> list[list[str]]:
    """label, state, how far, last loss, why: one row a run."""
    return [[run.label, run.state, _progress(run), _last(run, "loss"), run.cause or _hint(run)] for run in found]


JOB_HEADINGS = ("job", "state", "step", "last loss", "cause")


def _progress(run: Run) -> str:
    step = "-" if run.step is None else str(run.step)
    return f"{step} of {run.max_steps}" if run.max_steps else step


def _last(run: Run, key: str) -> str:
    numbers = [line[key] for line in run.lines if isinstance(line.get(key), int | float)]
    return number(numbers[-1]) if numbers else "-"


def _hint(run: Run) -> str:
    logs = [path.name for path in sorted(run.folder.glob("*.log")) if path.stat().st_size]
    return f"see {', '.join(logs)}" if run.state not in (DONE, "running") and logs else ""


def markdown(report: Report) -> str:
    """The tables as Markdown, best values in bold with a star."""
    cells = [[f"**{text}** {BEST}" if mark else text for text, mark in row] for row in rows(report)]
    text = f"# {report.title}\n\n{report.counts}\n\n{_pipes(headings(report), cells)}"
    open_ = [run for run in report.runs if run.state != DONE]
    return text + (f"\n## Not done\n\n{_pipes(JOB_HEADINGS, job_rows(open_))}" if open_ else "")


def _pipes(head: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *cells]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _csv(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *lines])
    return text.getvalue()


def tables(report: Report) -> dict[str, str]:
    """Name -> CSV: configurations, runs, and every value of every run in one long table. Numbers are not rounded."""
    keys, settings = list(report.columns), report.settings
    spread = [f"{key}/{end}" for key in keys for end in ("mean", "sd", "n")]
    configurations = [
        [*(g.settings.get(s, "") for s in settings), g.done, *(x for key in keys for x in _three(g, key)), int(on)]
        for g, on in zip(report.finished, report.front, strict=True)
    ]
    by_run = [
        [
            run.label,
            run.state,
            run.step,
            run.seed,
            *(g.settings.get(s, "") for s in settings),
            *map(run.values.get, keys),
        ]
        for g in report.groups
        for run in g.runs
    ]
    long = [[run.label, key, value] for run in report.runs for key, value in run.values.items()]
    return {
        "configurations.csv": _csv([*settings, "n", *spread, "pareto"], configurations),
        "runs.csv": _csv(["job", "state", "step", "seed", *settings, *keys], by_run),
        "values.csv": _csv(["job", "key", "value"], long),
    }


def _three(group: Group, key: str) -> tuple[Any, Any, Any]:
    value = group.values.get(key)
    return (value.mean, value.sd, value.n) if value else (None, None, 0)


def facts(report: Report) -> dict[str, Any]:
    """The report for programs."""
    groups = report.finished
    marks = {key: best(groups, key, way) for key, way in report.columns.items()}
    ways = {1: "up", -1: "down", 0: None}
    return {
        "title": report.title,
        "main": report.main,
        "columns": {key: ways[way] for key, way in report.columns.items()},
        "settings": report.settings,
        "configurations": [
            {
                "settings": dict(group.settings),
                "n": group.done,
                "jobs": [run.label for run in group.runs],
                "values": {key: vars(value) for key, value in group.values.items() if key in report.columns},
                "best": [key for key in report.columns if marks[key][i]],
                "pareto": on,
            }
            for i, (group, on) in enumerate(zip(groups, report.front, strict=True))
        ],
        "jobs": [
            {
                **{"job": run.label, "folder": str(run.folder), "state": run.state, "seed": run.seed},
                **{"step": run.step, "max_steps": run.max_steps, "cause": run.cause, "values": dict(run.values)},
            }
            for run in report.runs
        ],
    }
