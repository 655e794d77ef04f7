"""Which numbers a report shows, which way each of them is better, and how it is written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mllm_factory.errors import UserError, hint
from mllm_factory.report_groups import Group, Value
from mllm_factory.report_runs import Run

COSTS = (
    "parameters/trainable",
    "parameters/trainable_backbone",
    "train/seconds",
    "peak_memory_bytes",
    "checkpoint_bytes",
)
"""The columns behind the metrics."""

UP, DOWN, NEITHER = 1, -1, 0
"""Which way a number is better. Most are neither: an attention share, an LMAR or a gain describes, it does not rank."""

_UP = re.compile(r"exact_match|(^|_)(accuracy|f1|bleu|rouge|cider|samples_per_second)")
_DOWN = re.compile(r"(^|_)(loss|perplexity|wer|cer|error|seconds|bytes)($|_)")
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_COUNTS = ("samples", "refused", "clusters")
_BALANCE = re.compile(r"balance/(kappa|kappa_average|grad_rel_norm)(/|$)")
_LAYER = re.compile(r"(.+)/layer_(\d+)$")
_HEAD = re.compile(r"(.+)/layer_(\d+)/head_(\d+)$")
_MEDIA = ("vision", "audio")


def direction(key: str, up: Sequence[str] = (), down: Sequence[str] = ()) -> int:
    """UP, DOWN or NEITHER, by what the user says, else by the key's name."""
    if key in up or key in down:
        return UP if key in up else DOWN
    if key.startswith("parameters/"):
        return DOWN
    if "/" in key and not key.startswith("train/"):
        return NEITHER  # a breakdown, such as ablation/vision/exact_match
    name = key.rpartition("/")[2]
    return DOWN if _DOWN.search(name) else UP if _UP.search(name) else NEITHER


def chosen(found: Sequence[Run], wanted: Sequence[str]) -> list[str]:
    """The columns: those wanted, else each metric's main value and the costs.

    Raises:
        UserError: no run reports one that is wanted.
    """
    known = dict.fromkeys(key for run in found for key in run.values)
    if not wanted:
        mains = dict.fromkeys(key for run in found for key in main_values(run))
        return [*(key for key in mains if key not in COSTS), *(key for key in COSTS if key in known)]
    for key in wanted if known else ():
        require_known(key, known)
    return list(dict.fromkeys(wanted))


def require_known(key: str, known: Mapping[str, None], flag: str = "--columns") -> None:
    """Refuse a key that no report has.

    Raises:
        UserError: names the nearest ones.
    """
    if key not in known:
        raise UserError(f"{flag}: no run reports '{key}'{hint(key, known)}")


def main_values(run: Run) -> list[str]:
    """Keys of what the metrics report, one a metric: plain names, means over layers of media, else a metric's first key."""
    before_counts = list(run.values)[: next((i for i, key in enumerate(run.values) if key == "samples"), None)]
    keys = [key for key in before_counts if not key.startswith(("train/", "parameters/", *COSTS))]
    layered = dict.fromkeys(base for base, _ in layers(keys))
    plain = [key for key in keys if "/" not in key and key not in _COUNTS]
    media = [key for key in layered if key in keys and key.rpartition("/")[2] in _MEDIA]
    found = [*plain, *media]
    for label, node in (run.tree.get("metrics") or {}).items():
        names = (f"{label}/", f"{node.get('name')}/" if isinstance(node, Mapping) else f"{label}/")
        own = [key for key in keys if key.startswith(names)]
        if own and not any(key in (label, names[1][:-1]) or key.startswith(names) for key in found):
            found.append(own[0])
    return found


def main_of(columns: Mapping[str, int], groups: Sequence[Group], wanted: str | None) -> str | None:
    """The metric that ranks: the one wanted, else of the columns that are no costs the first with a better way, else the first.

    Raises:
        UserError: no run reports the one wanted.
    """
    known = dict.fromkeys(key for group in groups for key in group.values)
    if wanted is not None:
        if known:
            require_known(wanted, known, "--main")
        return wanted
    metrics = [key for key in columns if key in known and key not in COSTS]
    return next((key for key in metrics if columns[key] != NEITHER), metrics[0] if metrics else None)


def over_steps(known: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Keys of ``metrics.jsonl`` that are drawn: ``loss``, what was evaluated on the way of the columns, and the balance."""
    wanted = ["loss", *(f"eval/{column}" for column in columns), *filter(on_log_axis, known)]
    return [key for key in wanted if key in known]


def on_log_axis(key: str) -> bool:
    """Whether a key over steps is a ratio of sizes."""
    return bool(_BALANCE.match(key))


def layers(keys: Sequence[str]) -> list[tuple[str, int]]:
    """(base, layer) of each key ``<base>/layer_<n>``."""
    return [(m[1], int(m[2])) for key in keys if (m := _LAYER.fullmatch(key))]


def heads(keys: Sequence[str]) -> list[tuple[str, int, int]]:
    """(base, layer, head) of each key ``<base>/layer_<n>/head_<m>``."""
    return [(m[1], int(m[2]), int(m[3])) for key in keys if (m := _HEAD.fullmatch(key))]


def best(groups: Sequence[Group], key: str, way: int) -> list[bool]:
    """Which configurations have the best mean of a key; none where they are all alike or no way is better."""
    means = [group.values[key].mean for group in groups if key in group.values]
    if way == NEITHER or len(set(means)) < 2:
        return [False] * len(groups)
    top = max(way * mean for mean in means)
    return [key in group.values and way * group.values[key].mean == top for group in groups]


def ranked(groups: Sequence[Group], main: str | None, way: int) -> list[Group]:
    """Best first where a way is better; then those without the metric, then those without a finished run."""

    def rank(group: Group) -> tuple[bool, bool, float]:
        if main is None or main not in group.values:
            return not group.done, True, 0.0
        return not group.done, False, -way * group.values[main].mean

    return sorted(groups, key=rank)


def number(value: float, key: str = "") -> str:
    """``1,234,567`` for counts, ``86.5 kB`` for keys that count bytes, else about four significant digits."""
    if key.endswith("bytes"):
        scale, unit = next(((s, u) for s, u in _UNITS if abs(value) >= s), (1, "B"))
        return f"{value / scale:.1f} {unit}"
    size = abs(value)
    if size >= 1000 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.2f}" if size >= 10 else f"{value:.4f}" if size >= 1e-3 else f"{value:.2e}"


def shown(value: Value | None, runs: int, key: str = "") -> str:
    """``0.81 ± 0.02`` where runs differ; a single run's own interval as ``0.81 [0.77, 0.85]``; ``(n 2)`` where not all have it."""
    if value is None:
        return ""
    text = number(value.mean, key)
    if value.sd:
        text += f" ± {number(value.sd, key)}"
    elif value.n == 1 and value.low is not None and value.high is not None:
        text += f" [{number(value.low, key)}, {number(value.high, key)}]"
    return text if value.n == runs else f"{text} (n {value.n})"
