"""Checkpoints: folders that explain themselves, hold only what was trained, and appear whole or not at all.

checkpoints/step_000200/
  config.yaml          the tree of the run
  model.safetensors    trained tensors, by their names in the model
  trainer.pt           step, optimizer, schedule, random state of every process, identity of the frozen weights
  README.md            what this is and how to use it
  manifest.json        size and SHA-256 of every other file: how a damaged checkpoint is told from a good one
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mllm_factory import distributed
from mllm_factory.distributed import World
from mllm_factory.errors import CheckpointError
from mllm_factory.model import MultimodalModel, trained_tensors

log = logging.getLogger("mllm_factory")
ARCHITECTURE = ("vision", "audio", "projector", "audio_projector", "backbone", "tuning")
_STEP = re.compile(r"step_(\d+)$")


# ---------------------------------------------------------------- write


def save(
    run: Path, tree: Mapping[str, Any], model: MultimodalModel, progress: dict[str, Any], world: World, keep: int | None
) -> Path:
    """Write ``run/checkpoints/step_<step>``; to be called in every process.

    Everything goes to a ``.tmp`` folder first, is flushed to disk, and gets its name last: a crash at any moment leaves the
    former checkpoints as they were.

    Args:
        progress: ``step`` and whatever ``trainer.pt`` shall hold besides; tensors and plain values only.
        keep: newest checkpoints to keep; None keeps all.

    Raises:
        CheckpointError: it cannot be written (full disk, no permission).
    """
    folder = run / "checkpoints" / f"step_{progress['step']:06d}"
    tensors = {name: distributed.whole(t).cpu().contiguous() for name, t in trained_tensors(model).items()}
    progress = {**progress, "frozen": fingerprints(model)}
    failure = None
    if world.leads:
        try:
            _write(folder, tree, model, tensors, progress)
            _prune(folder.parent, keep)
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(folder.with_suffix(".tmp"), ignore_errors=True)
            failure = (
                f"the checkpoint {folder} cannot be written: {_reason(error)}; earlier checkpoints are untouched; "
                "free space or choose another output_dir, then continue with resume=auto"
            )
    failure = distributed.agree(failure, world)
    if failure:
        raise CheckpointError(failure)
    return folder


def _write(
    folder: Path,
    tree: Mapping[str, Any],
    model: MultimodalModel,
    tensors: dict[str, Tensor],
    progress: dict[str, Any],
) -> None:
    tmp = folder.with_suffix(".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    (tmp / "config.yaml").write_text(yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True), encoding="utf-8")
    save_file(tensors, tmp / "model.safetensors", metadata={"format": "pt"})
    torch.save(progress, tmp / "trainer.pt")
    (tmp / "README.md").write_text(_readme(folder, tree, model, tensors, progress), encoding="utf-8")
    (tmp / "manifest.json").write_text(json.dumps(_manifest(tmp), indent=1), encoding="utf-8")
    for path in [*tmp.iterdir(), tmp]:
        _flush(path)
    if folder.exists():  # the same step again, after a resume: the old one goes only when the new one is whole
        old = folder.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        tmp.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        tmp.rename(folder)
    _flush(folder.parent)


def _readme(
    folder: Path,
    tree: Mapping[str, Any],
    model: MultimodalModel,
    tensors: dict[str, Tensor],
    progress: dict[str, Any],
) -> str:
    names = {part: tree[part]["name"] for part in ("vision", "audio", "projector", "backbone") if tree.get(part)}
    parts = "\n".join(f"- {part}: `{name}`" for part, name in names.items())
    bases = "\n".join(
        f"- {part}: `{node['pretrained']}`"
        for part in ("vision", "audio", "backbone")
        if isinstance(node := tree.get(part), dict) and node.get("pretrained")
    )
    size = sum(t.numel() for t in tensors.values())
    return (
        f"# {tree['name']}, step {progress['step']}\n\n"
        f"A multimodal language model trained with mllm-factory.\n\n{parts}\n\n"
        f"`model.safetensors` holds the {size:,} trained values in {len(tensors)} tensors. "
        "Everything else is rebuilt from `config.yaml`"
        + (f", with the pretrained weights of\n\n{bases}\n\n" if bases else ".\n\n")
        + "```bash\nmllm-factory evaluate checkpoint=<this folder>\n```\n"
    )


def _manifest(folder: Path) -> dict[str, Any]:
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(checkpoints: Path, keep: int | None) -> None:
    for leftover in [*checkpoints.glob("step_*.tmp"), *checkpoints.glob("step_*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)
    if keep is not None:
        for old in _steps(checkpoints)[: -max(1, keep)]:
            shutil.rmtree(old)


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]


# ---------------------------------------------------------------- find


def _steps(checkpoints: Path) -> list[Path]:
    found = [(int(m[1]), path) for path in checkpoints.glob("step_*") if (m := _STEP.match(path.name))]
    return [path for _, path in sorted(found)]


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None where all files are as they were written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, facts in manifest.items():
            if (folder / name).stat().st_size != facts["bytes"] or _sha256(folder / name) != facts["sha256"]:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error}"
    return None


def latest(run: Path) -> Path | None:
    """The newest undamaged checkpoint of a run folder; a damaged one is skipped with a warning. None where there is none."""
    _restore_old(run / "checkpoints")
    for folder in reversed(_steps(run / "checkpoints")):
        fault = damage(folder)
        if fault is None:
            return folder
        log.warning("skipping the damaged checkpoint %s: %s", folder, fault)
    return None


def _restore_old(checkpoints: Path) -> None:
    """Undo a replacement that a crash cut between its two renames."""
    for old in checkpoints.glob("step_*.old"):
        if not old.with_suffix("").exists():
            old.rename(old.with_suffix(""))


def resolve(folder: str | Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest good one of a run folder.

    Raises:
        CheckpointError: there is none, or the one named is damaged.
    """
    path = Path(folder).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"there is no checkpoint at {path.absolute()}; give a run folder or a checkpoints/step_<n> folder"
        )
    if (path / "model.safetensors").exists() or _STEP.match(path.name):
        fault = damage(path)
        if fault:
            raise CheckpointError(f"the checkpoint {path} is damaged: {fault}; use another step of the run")
        return path
    found = latest(path.parent if path.name == "checkpoints" else path)
    if found is None:
        raise CheckpointError(
            f"{path.absolute()} holds no usable checkpoint; give a run folder or a checkpoints/step_<n> folder"
        )
    return found


def find_run(resume: str, tree: Mapping[str, Any]) -> Path | None:
    """The run folder that ``resume`` means, or None where ``auto`` finds nothing to continue.

    ``auto`` looks into ``output_dir``; where that is a new folder in ``outputs/<name>``, the newest run there is meant.

    Raises:
        CheckpointError: a folder was named and holds no usable checkpoint.
    """
    if resume != "auto":
        return resolve(resume).parent.parent
    here = Path(tree["output_dir"])
    candidates = [here]
    if here.parent.name == tree["name"]:
        candidates += sorted((p for p in here.parent.glob("*") if p != here), reverse=True)
    return next((run for run in candidates if latest(run) is not None), None)


# ---------------------------------------------------------------- read


def read_config(folder: Path) -> dict[str, Any]:
    """The tree a checkpoint was trained with.

    Raises:
        CheckpointError: it is missing or is no YAML mapping.
    """
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{folder / 'config.yaml'} cannot be read: {_first_line(error)}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{folder / 'config.yaml'} is no tree of options")
    return tree


def read_progress(folder: Path) -> dict[str, Any]:
    """What ``trainer.pt`` holds; nothing but tensors and plain values is accepted.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load names no base class for what a damaged file raises
        raise CheckpointError(f"{folder / 'trainer.pt'} cannot be read: {_first_line(error)}") from error


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


def differences(old: Any, new: Any, key: str) -> list[str]:
    """``key: old -> new`` for every leaf in which two trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [line for k in keys for line in differences(old.get(k), new.get(k), f"{key}.{k}")]
    return [] if old == new else [f"{key}: {old!r} -> {new!r}"]


def load(folder: Path, model: MultimodalModel) -> None:
    """Put a checkpoint's tensors into a model built from the same config.

    Raises:
        CheckpointError: other tensors are trained here, shapes differ, or the frozen weights are not those it was trained on.
    """
    saved, own = _tensors(folder), trained_tensors(model)
    if saved.keys() != own.keys():
        raise CheckpointError(
            f"{folder} does not fit this model: {_some('missing in the checkpoint', own.keys() - saved.keys())}"
            f"{_some('unknown to the model', saved.keys() - own.keys())}"
        )
    for part, (saved_print, print_) in _pairs(read_progress(folder)["frozen"], fingerprints(model)).items():
        if saved_print != print_:
            raise CheckpointError(
                f"the frozen weights of '{part}' are not those that {folder} was trained with; restore its pretrained source"
            )
    _copy(folder, saved, own)


def initialise(folder: Path, model: MultimodalModel) -> tuple[int, int]:
    """Start from the tensors that a checkpoint and a model share by name and shape.

    Returns:
        How many were taken, and how many trained tensors the model has.

    Raises:
        CheckpointError: they share none.
    """
    saved, own = _tensors(folder), trained_tensors(model)
    both = {name: t for name, t in saved.items() if name in own and own[name].shape == t.shape}
    if not both:
        raise CheckpointError(
            f"init_from: {folder} shares no trained tensor with this model{_some(' the checkpoint has', saved)}"
        )
    _copy(folder, both, own)
    return len(both), len(own)


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / 'model.safetensors'} cannot be read: {_first_line(error)}") from error


@torch.no_grad()
def _copy(folder: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for name, value in saved.items():
        if own[name].shape != value.shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(value.shape)}, this model's has {list(own[name].shape)}"
            )
        own[name].copy_(value)


def fingerprints(model: MultimodalModel) -> dict[str, str]:
    """Per part, a hash over names, shapes and up to 1,024 evenly spaced values of every frozen tensor."""
    return {name: _fingerprint(part) for name, part in model.parts().items()}


def _fingerprint(part: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, p in part.named_parameters():
        if not p.requires_grad:
            values = distributed.whole(p.data).flatten()
            sample = values[:: max(1, values.numel() // 1024)].to("cpu", torch.float32)
            digest.update(f"{name} {list(p.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (a.get(key), b.get(key)) for key in {**a, **b}}


def _some(what: str, names: Any) -> str:
    names = sorted(names)
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); " if names else ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
