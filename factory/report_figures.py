"""Figures of a report: learning curves, the Pareto front, curves over layers, maps of heads, bars with intervals.

Colours are those of Okabe and Ito, for colour-blind readers; line styles and markers differ as well.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_factory.report_columns import DOWN, NEITHER, heads, layers, on_log_axis, over_steps
from mllm_factory.report_groups import Group, pareto

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A7A00")
LINES = ("-", "--", "-.", ":")
MARKS = "osD^vPX*"
MOST = 16
"""Configurations that get a colour and a place in the legend; the others are grey. Also the most that get a panel of their own."""

RATIOS = ("lmar", "aei")
"""Families on a logarithmic axis around 1."""

SHARES = "attention_share"
"""The family whose members are parts of a whole."""

RUNS_AND_MEAN = "A thin line for each run, a thick one for the mean over seeds."
NOTES = {
    "kappa": "Above 1 the language model's step moved the answers more than the encoder's. ",
    "grad_rel_norm": "Gradient over weights, to be read within one part over time: not across parts or models. ",
}
"""What belongs under a curve, by a word of its key."""

_POINTS = 1000
_GREY = "#BBBBBB"


@dataclass(frozen=True)
class Picture:
    """A figure in both formats. ``name`` is its file's stem; ``section`` the part of the page it belongs to."""

    name: str
    section: str
    title: str
    caption: str
    png: bytes
    svg: bytes


@dataclass(frozen=True)
class Plan:
    """A figure to be drawn: ``draw`` fills a matplotlib figure of ``size`` inches."""

    name: str
    section: str
    title: str
    caption: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = (7.0, 3.8)


def pictures(groups: Sequence[Group], columns: Sequence[str], main: str | None, way: int) -> Iterator[Picture]:
    """Every figure that the runs have numbers for, configurations in the order given."""
    return rendered(_plans(groups, columns, main, way))


def rendered(plans: Iterable[Plan]) -> Iterator[Picture]:
    """Draw figures, all in one style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    fixed: Any = {"svg.hashsalt": "mllm-factory", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(fixed):
        for plan in plans:
            figure = Figure(figsize=plan.size, layout="constrained")
            plan.draw(figure)
            png, svg = io.BytesIO(), io.BytesIO()
            figure.savefig(png, format="png", dpi=150)
            figure.savefig(svg, format="svg", metadata={"Date": None})
            yield Picture(plan.name, plan.section, plan.title, plan.caption, png.getvalue(), svg.getvalue())


def _plans(groups: Sequence[Group], columns: Sequence[str], main: str | None, way: int) -> Iterator[Plan]:
    done = [group for group in groups if group.done]
    cost = "parameters/trainable"
    if main is not None and way != NEITHER and sum(main in g.values and cost in g.values for g in done) > 1:
        caption = "Filled: no other configuration is as good with as few trainable parameters."
        yield Plan("pareto", "pareto", f"{main} against {cost}", caption, lambda f: _pareto(f, done, main, way))
    logged = dict.fromkeys(key for g in groups for run in g.runs for line in run.lines for key in line)
    for key in over_steps(list(logged), columns):
        caption = next((text for word, text in NOTES.items() if word in key), "") + RUNS_AND_MEAN
        yield Plan(f"curve_{_stem(key)}", "curves", f"{key} over training", caption, _later(_curve, groups, key))
    keys = list(dict.fromkeys(key for group in done for key in group.values))
    yield from _layer_plans(done, keys)
    for family, members in _intervals(keys).items():
        caption = "Bars: mean. Whiskers: the interval that each run reports; over several seeds from its lowest to its highest end."
        height = 1.2 + 0.18 * len(members) * (min(len(done), MOST) + 1)
        draw = _later(_bars, done[:MOST], members)
        yield Plan(f"bars_{_stem(family)}", "intervals", family, caption, draw, (7.0, min(height, 40.0)))


def _later(draw: Callable[..., None], *given: Any) -> Callable[[Any], None]:
    return lambda figure: draw(figure, *given)


def _stem(key: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in key)


def _style(i: int) -> dict[str, Any]:
    if i >= MOST:
        return {"color": _GREY, "linestyle": "-", "zorder": 1}
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // len(COLOURS) % len(LINES)], "zorder": 3}


def _legend(figure: Any, axes: Any) -> None:
    marks, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(marks, names, loc="outside lower center", ncols=1 if max(map(len, names)) > 40 else 2, fontsize=8)


# ---------------------------------------------------------------- training


def points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines that have a number there; thinned to a thousand, the last one kept."""
    found = [(line["step"], float(line[key])) for line in lines if isinstance(line.get(key), int | float)]
    every = -(-len(found) // _POINTS)
    return [point for i, point in enumerate(found) if i % every == 0 or i == len(found) - 1] if found else []


def _curve(figure: Any, groups: Sequence[Group], key: str) -> None:
    axes = figure.subplots()
    for i, group in enumerate(groups):
        of_runs = [curve for run in group.runs if (curve := points(run.lines, key))]
        if not of_runs:
            continue
        style, several = _style(i), len(of_runs) > 1
        single = {"marker": "o"} if max(map(len, of_runs)) == 1 else {}
        for curve in of_runs:
            name = group.label if not several and i < MOST else None
            axes.plot(*zip(*curve, strict=True), **style, **single, linewidth=0.6 if several else 1.6, label=name)
        if several:
            shared = sorted(set.intersection(*({step for step, _ in curve} for curve in of_runs)))
            at = [dict(curve) for curve in of_runs]
            means = [sum(curve[step] for curve in at) / len(at) for step in shared]
            axes.plot(shared, means, **style, **single, linewidth=2.0, label=group.label if i < MOST else None)
    axes.set(xlabel="step", ylabel=key, yscale="log" if on_log_axis(key) else "linear")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)


def _pareto(figure: Any, groups: Sequence[Group], main: str, way: int) -> None:
    cost = "parameters/trainable"
    axes = figure.subplots()
    shown = [(i, g) for i, g in enumerate(groups) if main in g.values and cost in g.values]
    places = [(group.values[cost].mean, group.values[main].mean) for _, group in shown]
    front = pareto(places, way != DOWN)
    line = sorted(place for place, on in zip(places, front, strict=True) if on)
    axes.plot(*zip(*line, strict=True), color="#888888", linewidth=1, drawstyle="steps-post", zorder=1)
    for (i, group), (x, y), on in zip(shown, places, front, strict=True):
        style = _style(i) | {"linestyle": "none"}
        fill = style["color"] if on else "white"
        name = group.label if i < MOST else None
        axes.errorbar(x, y, group.values[main].sd, **style, marker=MARKS[i % 8], mfc=fill, capsize=2, label=name)
    axes.set_xscale("log" if min(x for x, _ in places) > 0 else "symlog")
    axes.set(xlabel=cost, ylabel=main)
    _legend(figure, axes)


# ---------------------------------------------------------------- layers and heads


def _layer_plans(groups: Sequence[Group], keys: Sequence[str]) -> Iterator[Plan]:
    bases: dict[str, list[int]] = {}
    for base, layer in layers(keys):
        bases.setdefault(base, []).append(layer)
    parts = [base for base in bases if base.startswith(f"{SHARES}/")]
    panels = groups[:MOST]
    if len(parts) > 1:
        caption = "Mean attention of the answers' rows, by group of keys. Attention is no proof of use: see the counterfactuals."
        size = _grid_size(len(panels))
        yield Plan(
            "layers_shares", "by_layer", "Attention shares by layer", caption, _later(_stack, panels, parts), size
        )
    for base in bases:
        log = base.partition("/")[0] in RATIOS
        caption = "Logarithmic axis; at 1 a media token gets as much as a text token." if log else ""
        draw = _later(_over_layers, groups, base, log)
        yield Plan(f"layers_{_stem(base)}", "by_layer", f"{base} by layer", caption, draw)
    for base in dict.fromkeys(base for base, _, _ in heads(keys)):
        draw = _later(_head_maps, [g for g in panels if _of_heads(g, base)], base)
        size = _grid_size(len(panels))
        yield Plan(f"heads_{_stem(base)}", "by_layer", f"{base} by layer and head", "Means over samples.", draw, size)


def _grid_size(panels: int) -> tuple[float, float]:
    return 7.0, 0.8 + 2.4 * -(-panels // 2)


def _of_layers(group: Group, base: str) -> list[tuple[int, float]]:
    """(layer, mean) in order."""
    return sorted((n, value.mean) for key, value in group.values.items() for b, n in layers([key]) if b == base)


def _of_heads(group: Group, base: str) -> dict[tuple[int, int], float]:
    """(layer, head) -> mean."""
    return {(n, h): value.mean for key, value in group.values.items() for b, n, h in heads([key]) if b == base}


def _over_layers(figure: Any, groups: Sequence[Group], base: str, log: bool) -> None:
    axes = figure.subplots()
    for i, group in enumerate(groups):
        curve = [(n, value) for n, value in _of_layers(group, base) if value > 0 or not log]
        if curve:
            name = group.label if i < MOST else None
            axes.plot(*zip(*curve, strict=True), **_style(i), marker=MARKS[i % 8], markersize=4, label=name)
    if log:
        axes.set_yscale("log")
        axes.axhline(1.0, color="#888888", linewidth=0.8)
    axes.set(xlabel="layer", ylabel=base)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)


def _panels(figure: Any, groups: Sequence[Group]) -> Iterator[tuple[Any, Group]]:
    """An axes for each configuration, two in a row."""
    rows = -(-len(groups) // 2)
    grid = list(figure.subplots(rows, min(2, len(groups)), squeeze=False).flat)
    for axes, group in zip(grid, groups, strict=False):
        axes.set_title(group.label, fontsize=8)
        yield axes, group
    for axes in grid[len(groups) :]:
        axes.axis("off")


def _stack(figure: Any, groups: Sequence[Group], bases: Sequence[str]) -> None:
    for axes, group in _panels(figure, groups):
        under: dict[int, float] = {}
        for i, base in enumerate(bases):
            found = _of_layers(group, base)
            bottoms = [under.get(n, 0.0) for n, _ in found]
            fill, hatch = COLOURS[i % 8], ("", "//", "..", "xx")[i % 4]
            style = {"color": fill, "hatch": hatch, "edgecolor": "white", "width": 0.9}
            axes.bar(
                [n for n, _ in found], [v for _, v in found], bottom=bottoms, label=base.partition("/")[2], **style
            )
            under |= {n: bottom + value for bottom, (n, value) in zip(bottoms, found, strict=True)}
        axes.set(xlabel="layer", ylabel="share", ylim=(0, 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, figure.axes[0])


def _head_maps(figure: Any, groups: Sequence[Group], base: str) -> None:
    maps = [_of_heads(group, base) for group in groups]
    lowest, highest = (end(value for found in maps for value in found.values()) for end in (min, max))
    for (axes, _), found in zip(_panels(figure, groups), maps, strict=True):
        rows, columns = (sorted({place[i] for place in found}) for i in (0, 1))
        values = [[found.get((n, h), float("nan")) for h in columns] for n in rows]
        image = axes.imshow(values, cmap="cividis", vmin=lowest, vmax=highest, aspect="auto", origin="lower")
        axes.set(xlabel="head", ylabel="layer")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
    figure.colorbar(image, ax=figure.axes, label=base)


# ---------------------------------------------------------------- intervals


def _intervals(keys: Sequence[str]) -> dict[str, list[str]]:
    """Keys with ``/low`` and ``/high``, by the first word of the key: one scale each."""
    known, families = set(keys), dict[str, list[str]]()
    for key in keys:
        if f"{key}/low" in known and f"{key}/high" in known:
            families.setdefault(key.partition("/")[0], []).append(key)
    return families


def _bars(figure: Any, groups: Sequence[Group], keys: Sequence[str]) -> None:
    axes = figure.subplots()
    wide = len(groups) + 1
    for i, group in enumerate(groups):
        there = [(j, group.values[key]) for j, key in enumerate(keys) if key in group.values]
        at, means = [j * wide + i for j, _ in there], [value.mean for _, value in there]
        fill = {"color": COLOURS[i % 8], "hatch": ("", "//", "..", "xx")[i // 8], "edgecolor": "white"}
        axes.barh(at, means, height=0.85, label=group.label, **fill)
        for y, (_, value) in zip(at, there, strict=True):
            if value.low is not None and value.high is not None:
                axes.plot([value.low, value.high], [y, y], color="black", linewidth=1, marker="|", markersize=5)
    axes.set_yticks([j * wide + (len(groups) - 1) / 2 for j in range(len(keys))], keys)
    axes.invert_yaxis()
    axes.axvline(0.0, color="#888888", linewidth=0.8)
    _legend(figure, axes)
