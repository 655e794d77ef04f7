"""A run of several stages: one folder, one lock, one state to resume from, and a report of each stage.

<run>/
  config.yaml                the tree, with the whole tree of every stage
  report.json                what the last stage reported, and `<stage>/<key>` of all
  stages/1_projector/        a run like any other: config.yaml, metrics.jsonl, report.json, checkpoints
  stages/2_task/

A stage starts from the last checkpoint of the one before. What that had trained goes on, is kept where it is frozen now, and is
written into the checkpoints again: each of them is whole.
"""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from mllm_factory import distributed, files, recorder, run, runs
from mllm_factory.assemble import Tree, build_engine_node
from mllm_factory.errors import CheckpointError, ConfigError, Problem
from mllm_factory.interfaces import Schedule
from mllm_factory.recorder import console
from mllm_factory.registry import build
from mllm_factory.trainer import Trainer

log = logging.getLogger("mllm_factory")


def train(tree: Tree) -> float | None:
    """Train the stages that are not done; the first metric's main value of the last one, or None without metrics.

    Args:
        tree: its ``stages`` are whole trees (``stages.expanded``).

    Raises:
        UserError: anything that the user can mend.
    """
    stages = [dict(stage) for stage in tree["stages"]]
    engines = [
        (build_engine_node(Trainer, stage["trainer"], "trainer"), build(Schedule, stage["schedule"], "schedule"))
        for stage in stages
    ]
    for stage in stages[1:]:
        run.read_sources(stage)  # a mistake there is told now, not when the first stages are done
    first = engines[0][0]
    with distributed.joined(first.device, first.timeout) as world, ExitStack() as held:
        tree = {**tree, "output_dir": distributed.lead(world, lambda: str(tree["output_dir"]))}
        folder = Path(tree["output_dir"])
        distributed.lead(world, lambda: _open(tree, held))
        before: Path | None = None
        for i, (stage, (trainer, schedule)) in enumerate(zip(stages, engines, strict=True)):
            own = runs.stage_folder(folder, i, str(stage["name"]))
            own.mkdir(parents=True, exist_ok=True)
            start = distributed.lead(world, lambda own=own: runs.latest(own))  # type: ignore[misc]
            if world.leads:
                console.print(f"stage {i + 1} of {len(stages)}: {stage['name']}", **run.PLAIN)
            if not (own / "report.json").exists() or start is None:
                mine = {**stage, "output_dir": str(own), "init_from": tree.get("init_from") if i == 0 else None}
                run.train_in({**mine, "resume": None}, trainer, schedule, world, start, before)
            elif world.leads:
                console.print("done already", **run.PLAIN)
            before = distributed.lead(world, lambda own=own: runs.resolve(own))  # type: ignore[misc]
        values = _values(folder, stages)
        if world.leads:
            recorder.report(folder, values)
        return next(iter(values.values()), None) if stages[-1].get("metrics") else None


def _open(tree: Tree, held: ExitStack) -> None:
    """Lock the run's folder and write its config. Only the first process does this.

    Raises:
        ConfigError: it holds a run, and nobody asked to continue it.
        CheckpointError: it holds other stages.
    """
    folder = Path(tree["output_dir"])
    held.enter_context(recorder.lock(folder))
    there = folder / "config.yaml"
    if runs.stages(folder) and not tree.get("resume"):
        way = "continue it with resume=auto, or choose another"
        raise ConfigError(Problem(f"{folder} holds the stages of a run; {way}", "output_dir"))
    if runs.stages(folder) and there.exists():
        _require_same(folder, tree)
    whole = yaml.safe_dump(json.loads(json.dumps(dict(tree), default=str)), sort_keys=False, allow_unicode=True)
    files.write(there, whole)


def _require_same(folder: Path, tree: Tree) -> None:
    """Refuse to continue with other stages; another option of a stage is told by it."""
    saved = runs.read_config(folder).get("stages") or []
    names = [[stage.get("name") for stage in stages] for stages in (saved, tree["stages"])]
    if names[0] != names[1][: len(names[0])]:
        raise CheckpointError(f"{folder} was begun with the stages {names[0]}, not {names[1]}; start a new run")
    for i, (old, new) in enumerate(zip(saved, tree["stages"], strict=False)):
        own = runs.stage_folder(folder, i, str(new["name"]))
        start = runs.latest(own)
        if start is not None:
            runs.require_same_architecture(start, new)
        for change in runs.differences(old, new, f"stages.{i}") if start is not None else ():
            console.print(f"changed since then: {change}", **run.PLAIN)


def _values(folder: Path, stages: list[dict[str, Any]]) -> dict[str, float]:
    """The last stage's report, and every stage's under its name."""
    each = {}
    for i, stage in enumerate(stages):
        text = (runs.stage_folder(folder, i, str(stage["name"])) / "report.json").read_text(encoding="utf-8")
        each[f"{i + 1}_{stage['name']}"] = {k: float("nan") if v is None else v for k, v in json.loads(text).items()}
    prefixed = {f"{name}/{key}": value for name, values in each.items() for key, value in values.items()}
    return {**list(each.values())[-1], **prefixed}
