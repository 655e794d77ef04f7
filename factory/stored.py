"""A checkpoint's own config as Hydra's primary config, so that ``evaluate checkpoint=F key=value`` starts from it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override

from mllm_factory import runs
from mllm_factory.errors import Problem
from mllm_factory.overrides import origin

PRIMARY = "checkpoint_config"
FREE = ("data", "metrics", "trainer")
"""The groups that an evaluation may choose anew; the checkpoint fixes the others."""


class Stored(NamedTuple):
    """A checkpoint's config made a primary config."""

    folder: Path
    problems: list[Problem]


def store(checkpoint: str, choices: Iterable[Override], label: str = "") -> Stored:
    """Put the config of a checkpoint into Hydra's ConfigStore under the name ``PRIMARY``.

    Args:
        checkpoint: a checkpoint folder, or a run folder, whose newest good checkpoint is meant.
        choices: the overrides that choose a preset; their groups are left out of the checkpoint's config.
        label: added to the name of the output folder, where several checkpoints are evaluated.

    Raises:
        CheckpointError: there is no usable checkpoint.
    """
    folder = runs.resolve(checkpoint).absolute()
    chosen = list(choices)
    fixed = [override for override in chosen if override.key_or_group not in FREE]
    problems = [
        Problem("the checkpoint fixes this; leave it out, or train another model", o.key_or_group, origin(o))
        for o in fixed
    ]
    groups = {override.key_or_group for override in chosen} & set(FREE)
    saved = {key: value for key, value in runs.read_config(folder).items() if key not in groups}
    name = f"evaluate_${{now:%Y-%m-%d_%H-%M-%S}}{label}"
    node = {
        **_literal(saved),
        **{"checkpoint": _literal(str(folder)), "trust_components": False, "resume": None, "init_from": None},
        "output_dir": f"outputs/${{name}}/{name}",
        "defaults": ["_self_", *({group: None} for group in sorted(groups))],
        "hydra": {
            "run": {"dir": "${output_dir}"},
            "sweep": {"dir": f"outputs/${{name}}/sweep_{name}", "subdir": "${hydra.job.num}"},
            "job": {"chdir": False},
        },
    }
    ConfigStore.instance().store(name=PRIMARY, node=node, provider="mllm-factory")
    return Stored(folder, problems)


def _literal(value: Any) -> Any:
    """Saved values are final: what looks like an interpolation is text."""
    if isinstance(value, Mapping):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", value) if isinstance(value, str) else value
