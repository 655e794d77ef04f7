"""``stages:`` of a tree: trainings that follow each other in one run, each a partial config over the same base.

stages:
  - name: projector             # names the stage and its folder
    tuning: projector_only      # a preset of a group
    schedule.lr: 1.0e-3         # values by dotted keys, or nested
  - name: task
    tuning: lora
    trainer: {max_steps: 500}

A stage is composed as if its lines stood behind the overrides of the command line. ``staged`` runs what is composed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from mllm_factory import presets
from mllm_factory.config import Composed, Composer
from mllm_factory.errors import ConfigError, Problem
from mllm_factory.overrides import origin, quoted

OF_THE_RUN = ("output_dir", "resume", "init_from", "trust_components", "stages")
"""Keys that belong to all stages together."""

_composer: list[Composer] = []


def compose_by(composer: Composer) -> None:
    """Say what the stages of this process's jobs are composed by."""
    _composer[:] = [composer]


def words(stage: Mapping[str, Any]) -> list[str]:
    """A stage as overrides: choices of presets first, then values."""
    chosen = {key: value for key, value in stage.items() if key in presets.GROUPS and _is_choice(value)}
    values = [word for key, value in stage.items() if key not in chosen for word in _values(str(key), value)]
    return [*(f"{key}={_text(value)}" for key, value in chosen.items()), *values]


def _is_choice(value: Any) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    )


def _values(key: str, value: Any) -> Iterator[str]:
    """Values may be of options that the base has not: whether a part knows them is checked later."""
    if isinstance(value, Mapping) and value:
        for inner, item in value.items():
            yield from _values(f"{key}.{inner}", item)
    else:
        yield f"++{key}={_text(value)}"


def _text(value: Any) -> str:
    """A value in the grammar of overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    return quoted(value) if isinstance(value, str) else str(value)


def composed_stages(
    composer: Composer, overrides: Sequence[str], stages: Sequence[Mapping[str, Any]]
) -> list[Composed]:
    """The tree of each stage."""
    return [composer.compose([*overrides, *words(stage)]) for stage in stages]


def check(composer: Composer, overrides: Sequence[str], base: Composed, registered_only: bool = False) -> list[Problem]:
    """Every problem of the stages of a tree, with the stage and where it stands.

    Args:
        composer: of the tree.
        overrides: of the command line.
        base: the tree.
        registered_only: refuse classes outside the registry.
    """
    stages = (base.tree or {}).get("stages")
    problems = base.problems if base.tree is None else [*base.problems, *_shape(stages)]
    if problems:
        return problems
    found = composed_stages(composer, overrides, stages or [])
    for i, (stage, one) in enumerate(zip(stages or [], found, strict=True)):
        own = {origin(word) for word in words(stage)}
        (one.tree or {}).pop("stages", None)
        for problem in one.check(registered_only):
            here = not problem.origin or problem.origin in own
            place = base.origin(f"stages.{i}") if here else problem.origin
            problems.append(Problem(problem.message, f"stages.{i}.{problem.key}".rstrip("."), place))
    return problems


def _shape(stages: Any) -> list[Problem]:
    """What is wrong with the list itself."""
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, Mapping) and stage for stage in stages):
        return [Problem("is a list of partial configs, such as [{tuning: projector_only}, {tuning: lora}]", "stages")]
    return [
        Problem("belongs to the whole run, not to a stage", f"stages.{i}.{key}")
        for i, stage in enumerate(stages)
        for key in stage
        if str(key).partition(".")[0] in OF_THE_RUN
    ]


def expanded(composer: Composer, overrides: Sequence[str], tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree whose ``stages`` are whole trees.

    Raises:
        ConfigError: the stages do not compose.
    """
    stages = tree["stages"]
    found = composed_stages(composer, overrides, stages) if not _shape(stages) else []
    problems = [*_shape(stages), *(problem for one in found for problem in one.problems)]
    if problems:
        raise ConfigError(problems)
    left_out = {*OF_THE_RUN} - {"trust_components"}
    return {**tree, "stages": [{k: v for k, v in (one.tree or {}).items() if k not in left_out} for one in found]}


def problems_of(
    composer: Composer, overrides: Sequence[str], composed: Composed, registered_only: bool, evaluates: bool
) -> list[Problem]:
    """Everything wrong with a tree: of one with stages these are what is trained, so they are checked, not the base."""
    if (composed.tree or {}).get("stages") is not None and not evaluates:
        return check(composer, overrides, composed, registered_only)
    return composed.check(registered_only, evaluates)


def whole(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A job's tree with the whole tree of each of its stages, while Hydra runs.

    Args:
        tree: of the job.
        overrides: of the job, Hydra's own left out.

    Raises:
        ConfigError: the stages do not compose.
    """
    if not tree.get("stages") or not _composer:
        return tree
    config, running = HydraConfig.instance().cfg, GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()  # the job's own; composing starts another
    try:
        return expanded(_composer[0], overrides, tree)
    finally:
        HydraConfig.instance().cfg, GlobalHydra.instance().hydra = config, running
