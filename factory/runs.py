"""The folders of runs: which checkpoint of which run is meant, and whether it is whole. Nothing here needs torch.

outputs/<name>/<date_time>/
  config.yaml            the tree of the run
  metrics.jsonl          one line a logged step
  report.json            the evaluation at the end
  checkpoints/step_000200/
  stages/1_projector/    of a run of several stages (``staged``): a run each, and no checkpoints beside them
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mllm_factory import files
from mllm_factory.errors import CheckpointError

log = logging.getLogger("mllm_factory")
ARCHITECTURE = ("vision", "audio", "projector", "audio_projector", "backbone", "tuning")
"""Keys of the tree that decide which tensors a model has."""

_STEP = re.compile(r"step_(\d+)$")
_NEEDED = ("config.yaml", "model.safetensors", "trainer.pt")


def folder_of(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / "checkpoints" / f"step_{step:06d}"


def steps(run: Path) -> dict[int, Path]:
    """A run's checkpoint folders by step, in order."""
    found = [(int(m[1]), path) for path in (run / "checkpoints").glob("step_*") if (m := _STEP.match(path.name))]
    return dict(sorted(found))


def stage_folder(run: Path, index: int, name: str) -> Path:
    """Where a run keeps a stage, counted from 0."""
    return run / "stages" / f"{index + 1}_{name}"


def stages(run: Path) -> list[Path]:
    """A run's stages in order; empty where it has none."""
    found = [path for path in (run / "stages").glob("*_*") if path.name.partition("_")[0].isdigit()]
    return sorted(found, key=lambda path: int(path.name.partition("_")[0]))


# ---------------------------------------------------------------- whole or not


def manifest(folder: Path) -> dict[str, Any]:
    """Size and SHA-256 of every file of a folder, by name."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None where all files are as they were written."""
    try:
        facts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name in sorted({*_NEEDED, *facts}):
            if (folder / name).stat().st_size != facts[name]["bytes"] or _sha256(folder / name) != facts[name][
                "sha256"
            ]:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except OSError as error:
        return f"it cannot be read: {files.reason(error)}"
    except (ValueError, KeyError, TypeError):
        return "manifest.json is not as it was written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- which one


def latest(run: Path) -> Path | None:
    """The newest undamaged checkpoint of a run, or of its last stage that has one; None where there is none.

    A damaged one is skipped with a warning.
    """
    _restore_old(run / "checkpoints")
    for folder in reversed(steps(run).values()):
        fault = damage(folder)
        if fault is None:
            return folder
        log.warning("skipping the damaged checkpoint %s: %s", folder, fault)
    return next((found for stage in reversed(stages(run)) if (found := latest(stage)) is not None), None)


def _restore_old(checkpoints: Path) -> None:
    """Undo a replacement that a crash cut between its two renames."""
    for old in checkpoints.glob("step_*.old"):
        if not old.with_suffix("").exists():
            with suppress(OSError):  # another process was first
                old.rename(old.with_suffix(""))


def resolve(folder: str | Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest good one of a run folder. Absolute.

    Raises:
        CheckpointError: there is none, or the one named is damaged.
    """
    path = Path(folder).expanduser().absolute()
    rule = "give a run folder or a checkpoints/step_<n> folder"
    _restore_old(path.parent)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}; {rule}")
    if (path / "manifest.json").exists() or _STEP.match(path.name):
        fault = damage(path)
        if fault:
            raise CheckpointError(f"the checkpoint {path} is damaged: {fault}; use another step of the run")
        return path
    found = latest(path.parent if path.name == "checkpoints" else path)
    if found is None:
        raise CheckpointError(f"{path} holds no usable checkpoint; {rule}")
    return found


def find_run(resume: str, tree: Mapping[str, Any]) -> Path | None:
    """The run folder that ``resume`` means, or None where ``auto`` finds nothing to continue.

    ``auto`` means ``output_dir`` where that holds a run; where it is a new folder in ``outputs/<name>``, the newest run there.

    Raises:
        CheckpointError: a folder was named and holds no usable checkpoint, or a checkpoint outside of a run.
    """
    if resume != "auto":
        found = resolve(resume)
        if found.parent.name != "checkpoints":
            raise CheckpointError(
                f"{found} lies in no run folder (<run>/checkpoints/step_<n>), so there is no run to continue; "
                "start a new one from it with init_from"
            )
        own, whole = found.parent.parent, found.parents[3]
        return whole if own.parent == whole / "stages" and Path(resume).resolve() == whole.resolve() else own
    here = Path(tree["output_dir"])
    siblings = sorted(here.parent.glob("*"), reverse=True) if here.parent.name == tree["name"] else []
    return next((run for run in (here, *siblings) if (run / "config.yaml").is_file()), None)


# ---------------------------------------------------------------- trees


def read_config(folder: Path) -> dict[str, Any]:
    """The tree a checkpoint was trained with.

    Raises:
        CheckpointError: it is missing or is no YAML mapping.
    """
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{folder / 'config.yaml'} cannot be read: {files.reason(error)}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{folder / 'config.yaml'} is no tree of options")
    return tree


def require_same_architecture(folder: Path, tree: Mapping[str, Any]) -> None:
    """Refuse to continue a run with other parts.

    Raises:
        CheckpointError: says what differs.
    """
    saved = read_config(folder)
    changes = [change for key in ARCHITECTURE for change in differences(saved.get(key), tree.get(key), key)]
    if changes:
        raise CheckpointError(
            f"{folder} was trained with another architecture: {'; '.join(changes)}; start a new run, or use init_from"
        )


def changed_options(folder: Path, tree: Mapping[str, Any]) -> list[str]:
    """``key: old -> new`` of what a continued run does otherwise: allowed, but it is no longer the same run."""
    saved, ignored = (
        read_config(folder),
        {*ARCHITECTURE, "output_dir", "resume", "init_from", "name", "trust_components"},
    )
    return [
        change
        for key in {**saved, **tree}
        if key not in ignored
        for change in differences(saved.get(key), tree.get(key), key)
    ]


def differences(old: Any, new: Any, key: str) -> list[str]:
    """``key: old -> new`` for every leaf in which two trees differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(k for k in new if k not in old)]
        return [line for k in keys for line in differences(old.get(k), new.get(k), f"{key}.{k}" if key else str(k))]
    return [] if old == new else [f"{key}: {old!r} -> {new!r}"]
