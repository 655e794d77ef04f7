"""The figures of a report against the numbers they show, and its page as a browser shows it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import BROWSER, show
from matplotlib.figure import Figure
from report_runs import CHOICES, attentive, costs, sweep, tree_of, write_run

from mllm_factory import cli, report_figures
from mllm_factory.report import make

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three configurations with attention and counterfactual keys, and a job that is not done."""
    folder = tmp_path_factory.mktemp("many") / "runs"
    for i, tuning in enumerate(("lora", "mores", HOSTILE)):
        tree, choices = tree_of(tuning={"backbone": {"name": tuning}}), {**CHOICES, "tuning": tuning}
        values = {**attentive(i / 10), **costs(10.0**i)}
        write_run(folder / str(i), [f"tuning={tuning}"], tree, values, [3.0, 2.0, 1.0], choices)
    write_run(folder / "3", ["seed=1", "tuning=lora"], tree_of(1, tuning={"backbone": {"name": "lora"}}), None, [2.0])
    return folder


@pytest.fixture(scope="module")
def page(runs: Path) -> str:
    assert cli.main(["report", str(runs)]) == 0
    return (runs / "report" / "report.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- figures


def drawn(draw: Any, *given: Any) -> Any:
    figure = Figure()
    draw(figure, *given)
    return figure.axes


def test_curves_over_layers_show_the_values(runs: Path) -> None:
    groups = make([str(runs)]).groups
    (axes,) = drawn(report_figures._over_layers, groups, "lmar/vision", True)
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines if "=" in str(line.get_label())}
    assert set(lines) == {"tuning=lora", "tuning=mores", f"tuning={HOSTILE}"}
    assert lines["tuning=lora"] == pytest.approx([0.01, 0.1, 1.0, 10.0])
    assert lines["tuning=mores"] == pytest.approx([0.11, 0.2, 1.1, 10.1])
    assert axes.get_yscale() == "log"
    assert len({line.get_color() for line in axes.lines}) == 4  # three and the line at 1


def test_shares_are_stacked(runs: Path) -> None:
    groups = make([str(runs)]).groups[:1]
    (axes,) = drawn(report_figures._stack, groups, ["attention_share/vision", "attention_share/user"])
    bars = [[(bar.get_y(), bar.get_height()) for bar in container] for container in axes.containers]
    assert bars[0] == [pytest.approx((0.0, 0.2))] * 4
    assert bars[1] == [pytest.approx((0.2, 0.4))] * 4


def test_maps_of_heads(runs: Path) -> None:
    axes = drawn(report_figures._head_maps, make([str(runs)]).groups, "attention_share/vision")
    image = axes[1].images[0].get_array()
    assert image.shape == (4, 3)  # layers upwards, heads to the right
    assert image[2].tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_bars_carry_the_reported_interval(runs: Path) -> None:
    groups = make([str(runs)]).groups
    keys = report_figures._intervals(list(groups[0].values))
    assert keys == {"image_gain": ["image_gain", "image_gain/blank"], "flip_rate": ["flip_rate/vision"]}
    (axes,) = drawn(report_figures._bars, groups, keys["image_gain"])
    whiskers = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "|"]
    assert whiskers == [pytest.approx([0.2 + i / 10, 0.45 + i / 10]) for i in range(3) for _ in keys["image_gain"]]
    assert [bar.get_width() for bar in axes.containers[2]] == pytest.approx([0.5, 0.5])


def test_an_interval_over_seeds_is_the_widest(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / str(seed), [f"seed={seed}"], tree_of(seed), {**attentive(seed / 10), **costs(1)})
    value = make([str(tmp_path)]).groups[0].values["image_gain"]
    assert (value.mean, value.low, value.high) == pytest.approx((0.35, 0.2, 0.55))


def test_a_learning_curve_is_the_mean_over_seeds(tmp_path: Path) -> None:
    groups = make([str(sweep(tmp_path / "s"))]).groups
    (axes,) = drawn(report_figures._curve, groups, "loss")
    thick = [list(line.get_ydata()) for line in axes.lines if line.get_linewidth() > 1]
    assert thick == [[3.0, 2.0, 1.5, 1.5]] * 2  # 1.0 and 2.0 at the last step
    assert len(axes.lines) == 6
    long = [{"step": i, "loss": float(i)} for i in range(12345)]
    thin = report_figures.points(long, "loss")
    assert len(thin) <= 1001 and (thin[0], thin[-1]) == ((0, 0.0), (12344, 12344.0))


def test_the_front_is_filled(tmp_path: Path) -> None:
    places = [(10.0, 0.5), (100.0, 0.4), (1000.0, 0.9)]
    for i, (cost, merit) in enumerate(places):
        tree = tree_of(tuning={"backbone": {"name": str(i)}})
        write_run(tmp_path / str(i), [], tree, {"exact_match": merit, **costs(cost)}, choices={})
    groups = make([str(tmp_path)]).groups
    (axes,) = drawn(report_figures._pareto, groups, "exact_match", 1)
    marks = {
        float(line.get_xdata()[0]): line.get_markerfacecolor() for line in axes.lines if line.get_marker() in "osD^"
    }
    assert {x: colour != "white" for x, colour in marks.items()} == {10.0: True, 100.0: False, 1000.0: True}
    front = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert list(front.get_xdata()) == [10.0, 1000.0]


# ---------------------------------------------------------------- page


class Reader(HTMLParser):
    """Tags with what they are in, and the texts of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given, [str(a.get("class")) for _, a in self.open]))
        if tag not in ("meta", "img"):
            self.open.append((tag, given))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] == "td":
            self.cells.append(data)


def test_the_page_is_whole_and_needs_nothing_else(page: str, runs: Path) -> None:
    read = Reader(page)
    assert read.open == []
    names = [tag for tag, _, _ in read.tags]
    assert not {"script", "link", "iframe", "object"}.intersection(names)
    assert not re.search(r"url\(|@import|src=\"(?!data:)|href=", page)
    images = [given for tag, given, _ in read.tags if tag == "img"]
    assert len(images) == len(list((runs / "report" / "figures").glob("*.svg"))) == 11
    assert all(image["alt"] and str(image["src"]).startswith("data:image/svg+xml;base64,") for image in images)
    assert all("box" in around for tag, _, around in read.tags if tag == "table")
    assert HOSTILE in read.cells and {"unfinished", "1 of 4"} <= set(read.cells)
    assert "beside the counterfactual values" in page and "@media print" in page


@pytest.mark.skipif(BROWSER is None, reason="no headless browser is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(page: str, width: int, tmp_path: Path) -> None:
    seen = show(page, width, tmp_path)
    assert (seen.scroll, seen.client) == (width, width)  # nothing sticks out of the page ...
    assert seen.hidden > 0  # ... as the wide table scrolls in its box
    assert seen.images == seen.loaded == 11
    assert seen.console == ""
