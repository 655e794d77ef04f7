"""The verb ``report``: a sweep or several runs as one table, figures and a page. Works while a sweep still runs."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path

from mllm_factory.errors import UserError
from mllm_factory.flags import Parser, json_flag
from mllm_factory.report_columns import NEITHER, chosen, direction, main_of, ranked
from mllm_factory.report_groups import grouped
from mllm_factory.report_output import Output
from mllm_factory.report_page import html
from mllm_factory.report_runs import DONE, different_data, read_runs
from mllm_factory.report_tables import (
    BEST,
    FRONT,
    JOB_HEADINGS,
    Report,
    facts,
    headings,
    job_rows,
    markdown,
    rows,
    tables,
)

_NO_TERMINAL = 250
"""Width of the table in a pipe or a file."""


def report(argv: Sequence[str]) -> int:
    """The verb ``report``."""
    parser = json_flag(Parser())
    parser.add_argument("folders", nargs="*")
    for flag in ("--columns", "--main", "--by", "--up", "--down", "--output"):
        parser.add_argument(flag)
    parser.add_argument("--any", action="store_true")
    flags = parser.read(argv)
    if not flags.folders:
        raise UserError("report takes a sweep folder or run folders, such as: report outputs/<name>/sweep_<date_time>")
    columns, up, down, by = (_listed(text) for text in (flags.columns, flags.up, flags.down, flags.by))
    made = make(flags.folders, columns, flags.main, up, down, flags.any, by)
    written = None
    if flags.output or not flags.json:
        only = flags.folders[0] if len(flags.folders) == 1 else "."
        written = _write(made, Output(Path(flags.output or Path(only, "report")), flags.folders))
    if flags.json:
        print(json.dumps(facts(made), indent=1))
    else:
        _show(made)
        print(f"report: {written}")
    return 0


def _listed(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def make(
    folders: Sequence[str],
    columns: Sequence[str] = (),
    main: str | None = None,
    up: Sequence[str] = (),
    down: Sequence[str] = (),
    any_data: bool = False,
    by: Sequence[str] = (),
) -> Report:
    """Read the runs of some folders and compare them.

    Args:
        folders: run folders, or folders that hold some.
        columns: keys of ``report.json``; empty: each metric's main value and the costs.
        main: the key that ranks; None: the first column in which a way is better.
        up: keys of which more is better; ``down``: less. Others go by their names.
        any_data: compare runs that were judged on different data.
        by: keys of the config that name the configurations; empty: those that vary.

    Raises:
        UserError: no runs, different data, or a key that no run reports.
    """
    found = read_runs(folders)
    difference = None if any_data else different_data(found)
    if difference:
        raise UserError(
            f"the runs were judged on different data: {difference}; compare runs of one data set, or add --any"
        )
    both = sorted({*up} & {*down})
    if both:
        raise UserError(f"--up and --down: '{both[0]}' is in both; leave it in one")
    groups = grouped(found, by)
    ways = {key: direction(key, up, down) for key in chosen(found, columns)}
    main = main_of(ways, groups, main)
    ways |= {main: direction(main, up, down)} if main else {}
    way = ways[main] if main else NEITHER
    title = ", ".join(Path(folder).expanduser().absolute().name for folder in folders[:4])
    title += f" and {len(folders) - 4} more" if len(folders) > 4 else ""
    return Report(title, ranked(groups, main, way), ways, main)


def _write(made: Report, output: Output) -> Path:
    """Write everything; the page's path."""
    from mllm_factory.report_figures import pictures, rendered
    from mllm_factory.report_samples import sample_plans

    gc.enable()  # figures are large and full of cycles
    way = made.columns.get(made.main or "", NEITHER)
    drawn = [*pictures(made.groups, list(made.columns), made.main, way), *rendered(sample_plans(made.groups))]
    contents: dict[str, str | bytes] = {"report.html": html(made, drawn), "report.md": markdown(made)}
    contents["report.json"] = json.dumps(facts(made), indent=1) + "\n"
    contents |= {f"tables/{name}": text for name, text in tables(made).items()}
    contents |= {f"figures/{picture.name}.png": picture.png for picture in drawn}
    contents |= {f"figures/{picture.name}.svg": picture.svg for picture in drawn}
    output.write(contents)
    return output.folder / "report.html"


def _show(made: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console = console if console.is_terminal else Console(width=max(console.width, _NO_TERMINAL))
    names = len(made.settings) or 1
    console.print(Text(f"{made.title}: {made.counts}"))
    table = Table()
    for i, name in enumerate(headings(made)):
        table.add_column(Text(name), justify="left" if i < names else "right", overflow="fold")
    for row in rows(made):
        table.add_row(*(Text(f"{text} {BEST}", "bold green") if mark else Text(text) for text, mark in row))
    if table.row_count:
        console.print(table)
        console.print(
            f"{BEST} best of its column   {FRONT} Pareto front: {made.main or 'metric'} against trainable parameters"
        )
    undone = [run for run in made.runs if run.state != DONE]
    if undone:
        jobs = Table(*JOB_HEADINGS, title="not done", title_justify="left")
        for cells in job_rows(undone):
            jobs.add_row(*map(Text, cells))
        console.print(jobs)
