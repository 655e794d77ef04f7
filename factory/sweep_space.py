"""The values that a search may choose from, read from Hydra's sweep grammar.

key=a,b  choice(a,b)  glob(a*)     one of these
range(1,9,2)                       numbers at even distances, the end left out
interval(1e-4,1e-2)                any number; int(interval(2,64)): any whole number
tag(log, ...)                      drawn evenly on a logarithmic scale
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from mllm_factory.errors import ConfigError, Problem
from mllm_factory.overrides import origin

Number = int | float


@dataclass(frozen=True)
class Choice:
    """One of some values, as they are written on the command line."""

    values: tuple[str, ...]

    def examples(self) -> list[str]:
        """Values that stand for all."""
        return list(self.values)

    def read(self, text: str) -> str | None:
        """The value that a command line had; None where it is not one of these."""
        return text if text in self.values else None


@dataclass(frozen=True)
class Numbers:
    """Numbers from ``low`` to ``high``, both included: whole ones, those at distance ``step``, or any."""

    low: Number
    high: Number
    step: Number | None
    log: bool

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def examples(self) -> list[str]:
        """Values that stand for all."""
        return [str(self.low), str(self.high)]

    def read(self, text: str) -> Number | None:
        """The number that a command line had; None where it is not one of these."""
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            return None
        return value if self.low <= value <= self.high else None


Space = Mapping[str, Choice | Numbers]


def space_of(overrides: Sequence[Override]) -> dict[str, Choice | Numbers]:
    """What each swept key may be.

    Raises:
        ConfigError: nothing is swept, or a range that no number is in.
    """
    space: dict[str, Choice | Numbers] = {}
    problems = []
    for override in overrides:
        if override.is_sweep_override():
            found = _values(override)
            if isinstance(found, str):
                problems.append(Problem(found, override.key_or_group, origin(override)))
            else:
                space[override.get_key_element()] = found
    if problems:
        raise ConfigError(problems)
    if not space:
        advice = "give some keys several values, such as schedule.lr=interval(1e-4,1e-2)"
        raise ConfigError(Problem(f"there is nothing to search; {advice}", "hydra/sweeper"))
    return space


def _values(override: Override) -> Choice | Numbers | str:
    """What a key may be, or why that cannot be."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high, step = value.start, value.end, None
    elif isinstance(value, RangeSweep):
        among: list[Any] = list(override.sweep_iterator())
        if not among:
            return "the range is empty; let its end lie behind its start"
        low, high, step = min(among), max(among), abs(value.step) if len(among) > 1 else None
    else:
        return Choice(tuple(override.sweep_string_iterator()))
    log = "log" in value.tags
    if low is None or high is None or low > high:
        return f"expected a start below the end, got {low} and {high}"
    if log and low <= 0:
        return f"on a logarithmic scale values start above 0, got {low}"
    if log and step not in (None, 1):
        return f"a logarithmic scale has no steps, got {step}; use interval, or int(interval(...))"
    return Numbers(low, high, None if log else step, log)


def described(space: Space) -> dict[str, Any]:
    """A space as JSON, to be compared with."""
    return {
        key: {**vars(values), **({"values": list(values.values)} if isinstance(values, Choice) else {})}
        for key, values in space.items()
    }


def one_by_one(overrides: Sequence[Override]) -> list[list[str]]:
    """Combinations in which every example of every key occurs, the others at their first: enough to check each value by itself."""
    fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    swept = {override.get_key_element(): override for override in overrides if override.is_sweep_override()}
    if not swept:
        return [fixed]
    examples = {
        key: [f"{key}={text}" for text in values.examples()] for key, values in space_of(list(swept.values())).items()
    }
    first = [texts[0] for texts in examples.values()]
    others = [[*first[:i], text, *first[i + 1 :]] for i, texts in enumerate(examples.values()) for text in texts[1:]]
    return [[*fixed, *combination] for combination in [first, *others]]
