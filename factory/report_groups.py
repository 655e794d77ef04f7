"""Runs that are the same but for ``seed`` as one configuration, named by the overrides in which it differs from the others."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_factory.errors import UserError, hint
from mllm_factory.report_runs import DONE, Run

NEITHER = ("seed", "output_dir", "resume", "name", "checkpoint", "trust_components")
"""Root keys that make no other configuration: repetitions, places and names."""

ABSENT = "-"
MOST_NAMED = 3
"""Runs that a configuration without settings is named by."""


@dataclass(frozen=True)
class Value:
    """A number over the runs of a configuration.

    Attributes:
        mean: over the runs that have it.
        sd: sample standard deviation, divided by n - 1; None for one run.
        n: how many runs have it.
        low, high: the interval that the runs report (``<key>/low``, ``<key>/high``); of several, the lowest and highest end.
    """

    mean: float
    sd: float | None
    n: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Group:
    """One configuration: its name, its runs, and its numbers by key."""

    settings: Mapping[str, str]
    runs: Sequence[Run]
    values: Mapping[str, Value]

    @property
    def done(self) -> int:
        """How many of its runs have a report."""
        return sum(run.state == DONE for run in self.runs)

    @property
    def label(self) -> str:
        """``tuning=lora, rank=4``: the last words of the keys where they say enough; its runs where nothing varies."""
        short = Counter(key.rpartition(".")[2] for key in self.settings)
        names = {
            key: end if short[end := key.rpartition(".")[2]] == 1 and end != "name" else key for key in self.settings
        }
        words = [f"{names[key]}={value}" for key, value in self.settings.items()]
        several = len(self.runs) > MOST_NAMED
        return ", ".join(words) or (f"{len(self.runs)} runs" if several else ", ".join(run.label for run in self.runs))


def grouped(found: Sequence[Run], by: Sequence[str] = ()) -> list[Group]:
    """Configurations in the order of their first run, named by some keys of their trees; none: by what was overridden and varies.

    Raises:
        UserError: no run has one of the keys.
    """
    for key in by:
        if all(_setting(run, key) == ABSENT for run in found):
            raise UserError(f"--by: no run's config has '{key}'{hint(key, [*found[0].tree, *_flat(found[0])])}")
    parts = _same_tree(found, by)
    keys = list(by) or _varying(found)
    names = [{key: _setting(part[0], key) for key in keys} for part in parts]
    _tell_apart(parts, names)
    return [Group(name, part, _values(part)) for name, part in zip(names, parts, strict=True)]


def _same_tree(found: Sequence[Run], by: Sequence[str]) -> list[list[Run]]:
    """Runs with equal trees but for the seed, and alike in ``by``. Where a seed comes twice, other checkpoints were evaluated: those are split."""
    parts: dict[str, list[Run]] = {}
    for run in found:
        tree = {key: value for key, value in run.tree.items() if key not in NEITHER}
        known = tree or {"": str(run.folder)}  # nothing is known of it, so it is like no other
        known |= {f"--by {key}": _setting(run, key) for key in by}
        parts.setdefault(json.dumps(known, sort_keys=True, default=str), []).append(run)
    split: list[list[Run]] = []
    for part in parts.values():
        twice = max(Counter(str(run.seed) for run in part).values()) > 1
        apart: dict[str, list[Run]] = {}
        for run in part:
            apart.setdefault(str(run.tree.get("checkpoint")) if twice else "", []).append(run)
        split += apart.values()
    return split


# ---------------------------------------------------------------- names


def _varying(found: Sequence[Run]) -> list[str]:
    """Keys overridden in some run whose value is not the same in all."""
    keys = dict.fromkeys(key for run in found for key in run.overrides)
    return [
        key
        for key in keys
        if key not in NEITHER and not key.startswith("hydra") and len({_setting(run, key) for run in found}) > 1
    ]


def _setting(run: Run, key: str) -> str:
    """A run's value of a key: the preset of a group, the composed value, or what was written."""
    if key in run.choices:
        return shown_setting(run.choices[key])
    value: Any = run.tree
    for word in key.split("."):
        if not isinstance(value, Mapping) or word not in value:
            return run.overrides.get(key, ABSENT)
        value = value[word]
    return run.overrides[key] if isinstance(value, Mapping) and key in run.overrides else shown_setting(value)


def shown_setting(value: Any) -> str:
    """A value as one writes it in an override."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and "name" in value:
        return str(value["name"])
    return json.dumps(value, default=str)


def _tell_apart(parts: Sequence[Sequence[Run]], names: Sequence[dict[str, str]]) -> None:
    """Add keys of the trees until no two configurations have the same name: presets and checkpoints differ without overrides."""
    while True:
        seen: dict[tuple[str, ...], int] = {}
        for i, name in enumerate(names):
            j = seen.setdefault(tuple(name.values()), i)
            if j != i:
                break
        else:
            return
        key = _plainest_difference(parts[j][0], parts[i][0])
        for part, name in zip(parts, names, strict=True):
            name[key] = _flat(part[0]).get(key, ABSENT) if key else part[0].label


def _plainest_difference(one: Run, other: Run) -> str:
    """The key that tells two trees apart best: a component's name, else the least deep. Empty where there is no key."""
    a, b = _flat(one), _flat(other)
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return min(keys, key=lambda key: (not key.endswith("name"), key.count("."), len(key)), default="")


def _flat(run: Run) -> dict[str, str]:
    """Dotted key -> value for the leaves of a tree."""
    found: dict[str, str] = {}

    def walk(node: Any, key: str) -> None:
        if isinstance(node, Mapping) and node:
            for word, value in node.items():
                walk(value, f"{key}.{word}" if key else str(word))
        else:
            found[key] = shown_setting(node)

    walk({key: value for key, value in run.tree.items() if key not in NEITHER or key == "checkpoint"}, "")
    return found


# ---------------------------------------------------------------- numbers


def _values(part: Sequence[Run]) -> dict[str, Value]:
    done = [run.values for run in part if run.state == DONE]
    keys = dict.fromkeys(key for values in done for key in values)
    return {key: _value([v[key] for v in done if key in v], _ends(done, key)) for key in keys}


def _ends(done: Sequence[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    low, high = f"{key}/low", f"{key}/high"
    return [(values[low], values[high]) for values in done if low in values and high in values]


def _value(numbers: Sequence[float], ends: Sequence[tuple[float, float]]) -> Value:
    sd = statistics.stdev(numbers) if len(numbers) > 1 else None
    low, high = (min(low for low, _ in ends), max(high for _, high in ends)) if ends else (None, None)
    return Value(math.fsum(numbers) / len(numbers), sd, len(numbers), low, high)


def pareto(points: Sequence[tuple[float, float] | None], larger_is_better: bool) -> list[bool]:
    """Which points (cost, merit) no other one beats: none costs as little or less with as much or more merit, one of them strictly.

    None, a point without its numbers, is never on the front.
    """
    sign = 1 if larger_is_better else -1

    def beaten(point: tuple[float, float], others: Iterable[tuple[float, float] | None]) -> bool:
        cost, merit = point[0], sign * point[1]
        return any(o[0] <= cost and sign * o[1] >= merit and (o[0] < cost or sign * o[1] > merit) for o in others if o)

    return [point is not None and not beaten(point, points) for point in points]
