"""Single samples of a report: the picture or the sound, the question, the answers, and where each run's answer looked.

They come from the tables ``<metric>_shown.csv`` and ``<metric>_shown_tokens.csv`` of a run's folder. A heat map lies over a
picture only where the tokens are known to be a plain grid of it; otherwise the page says why not and shows bars by token.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_factory import files
from mllm_factory.errors import UserError
from mllm_factory.report_figures import COLOURS, Plan
from mllm_factory.report_groups import Group
from mllm_factory.report_runs import DONE

MOST_SAMPLES, MOST_RUNS = 8, 7
"""Samples of a page, and configurations beside each other in one."""

_CELL = 2**24  # characters of a table's cell: a picture is in one
_SHOWN = re.compile(r"(.+)_shown\.csv")


@dataclass(frozen=True)
class Item:
    """A picture or a recording of a sample, and what one configuration's answer gave to each of its tokens.

    Attributes:
        label: the configuration's.
        facts: the table's row about the item, by column.
        shares: the attention of each token, mean over layers.
    """

    label: str
    facts: Mapping[str, str]
    shares: Sequence[float]


def sample_plans(groups: Sequence[Group]) -> Iterator[Plan]:
    """A figure for each item of the first samples that the configurations' first runs show, side by side."""
    found: dict[tuple[str, ...], list[Item]] = {}
    for group in groups:
        for run in [run for run in group.runs if run.state == DONE][:1]:
            for key, item in _items(run.folder, group.label):
                found.setdefault(key, []).append(item)
    samples = list(dict.fromkeys(key[0] for key in found))[:MOST_SAMPLES]
    for number, (key, items) in enumerate(found.items()):
        if key[0] in samples:
            yield _plan(number, key, items[:MOST_RUNS])


# ---------------------------------------------------------------- tables


def _items(folder: Path, label: str) -> Iterator[tuple[tuple[str, ...], Item]]:
    """Items by sample, modality and number."""
    inside = folder / "tables"
    for path in sorted(inside.glob("*_shown.csv")) if inside.is_dir() else ():
        named = _SHOWN.fullmatch(path.name)
        shares: dict[tuple[str, ...], list[float]] = {}
        for row in _rows(inside / f"{named[1] if named else ''}_shown_tokens.csv"):
            shares.setdefault(_key(row), []).append(_number(row.get("mean")))
        for row in _rows(path):
            if key_shares := shares.get(_key(row)):
                yield _key(row), Item(label, row, key_shares)
        return  # other metrics of the run show the same


def _rows(path: Path) -> list[dict[str, str]]:
    """A table's rows; none where it is missing.

    Raises:
        UserError: it is there and may not be read.
    """
    before = csv.field_size_limit(_CELL)
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            return [{key: value or "" for key, value in row.items() if key} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []
    except (OSError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read: {files.reason(error)}; make it readable or leave the run out"
        ) from error
    finally:
        csv.field_size_limit(before)


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return row.get("sample", ""), row.get("modality", ""), row.get("item", "")


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


# ---------------------------------------------------------------- figures


def _plan(number: int, key: Sequence[str], items: Sequence[Item]) -> Plan:
    first, seen = items[0], key[1] == "vision"
    several = (
        f", item {int(_number(key[2])) + 1} of {first.facts['items']}" if first.facts.get("items", "1") != "1" else ""
    )
    title = f"{key[0]}: {key[1]}{several}"
    if seen and all(item.facts.get("layout") == "grid" for item in items):
        draw, size = _over_picture, (7.0, 0.5 + 2.2 * -(-(len(items) + 1) // 4))
    else:
        draw, size = _bars, (7.0, 1.4 + 0.9 * len(items))
    return Plan(f"sample_{number}", "samples", title, _caption(items), lambda figure: draw(figure, items), size)


def _caption(items: Sequence[Item]) -> str:
    """Question, reference, answers, and why there is no map."""
    facts = items[0].facts
    answers = "; ".join(f"{item.label}: {item.facts.get('answer') or '-'}" for item in items)
    reasons = dict.fromkeys(item.facts["why"] for item in items if item.facts.get("why"))
    lacks = f" No place in it is known: {'; '.join(reasons)}." if reasons else ""
    return (
        f"Question: {facts.get('question')} Reference: {facts.get('reference')}. Likeliest tokens of {answers}.{lacks}"
    )


def _picture(text: str) -> Any:
    """A data URI -> [h, w, 3], or None where there is none or it is damaged."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2], validate=True))) as image:
            return image.convert("RGB")
    except (OSError, ValueError):
        return None


def _over_picture(figure: Any, items: Sequence[Item]) -> None:
    """The picture as the encoder gets it, then each configuration's map over it in grey; colours from 0 to the map's maximum."""
    columns = min(4, len(items) + 1)
    axes = list(figure.subplots(-(-(len(items) + 1) // 4), columns, squeeze=False).flat)
    for each in axes:
        each.axis("off")
    picture, extent = _picture(items[0].facts.get("picture", "")), (0, 1, 0, 1)
    if picture is not None:
        axes[0].imshow(picture, extent=extent)
    axes[0].set_title("what the encoder gets", fontsize=7)
    for place, item in zip(axes[1:], items, strict=False):
        side = int(_number(item.facts["side"]))
        if side * side != len(item.shares):
            continue
        if picture is not None:
            place.imshow(picture.convert("L"), extent=extent, cmap="gray", vmin=0, vmax=255)
        grid = [item.shares[row * side : (row + 1) * side] for row in range(side)]
        place.imshow(grid, extent=extent, cmap="inferno", vmin=0, alpha=0.6)
        place.set_title(f"{item.label}\nshare {sum(item.shares):.2f}, most {max(item.shares):.3f}", fontsize=7)


def _bars(figure: Any, items: Sequence[Item]) -> None:
    """The sound, then the attention of each token over time; over the tokens' numbers where no time is known."""
    facts = items[0].facts
    seconds = _number(facts.get("seconds"))
    timed = seconds == seconds and all(item.facts.get("layout") == "time" for item in items)
    axes = figure.subplots(1 + len(items), 1, sharex=timed, squeeze=False)[:, 0]
    _sound(axes[0], facts, seconds)
    for i, (place, item) in enumerate(zip(axes[1:], items, strict=True)):
        k = len(item.shares)
        width = seconds / k if timed else 1.0
        place.bar([width * t for t in range(k)], item.shares, width=0.9 * width, align="edge", color=COLOURS[i % 8])
        place.set_title(f"{item.label}: share {sum(item.shares):.2f}", fontsize=7, loc="left")
        place.set_ylim(bottom=0)
    axes[-1].set_xlabel("seconds" if timed else "token")


def _sound(axes: Any, facts: Mapping[str, str], seconds: float) -> None:
    picture, envelope = _picture(facts.get("picture", "")), [_number(x) for x in facts.get("envelope", "").split()]
    axes.set_yticks([])
    if facts.get("modality") == "audio" and picture is not None and seconds == seconds:
        axes.imshow(picture, extent=(0, seconds, 0, 1), aspect="auto")
        axes.set_title("log-mel spectrogram", fontsize=7, loc="left")
    elif envelope and seconds == seconds:
        axes.fill_between(
            [seconds * (i + 0.5) / len(envelope) for i in range(len(envelope))], envelope, color="#555555"
        )
        axes.set_title("loudness", fontsize=7, loc="left")
    elif picture is not None:
        axes.imshow(picture)
        axes.set_title("what the encoder gets", fontsize=7)
    else:
        axes.axis("off")
