"""Checkpoints: folders that explain themselves, hold only what was trained, and appear whole or not at all.

checkpoints/step_000200/
  config.yaml          the tree of the run
  model.safetensors    trained tensors by their names in the model; its metadata: step, identity of the frozen weights and of their sources
  trainer.pt           step, optimizer, schedule, strategies that have a state, random state of every process, counts
  README.md            what this is and how to use it
  manifest.json        size and SHA-256 of every other file: how a damaged checkpoint is told from a good one
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mllm_factory import distributed, files, identity, runs
from mllm_factory.distributed import World
from mllm_factory.errors import CheckpointError, lost_worker
from mllm_factory.model import MultimodalModel, state_tensors, trained_tensors
from mllm_factory.runs import find_run as find_run
from mllm_factory.runs import latest as latest
from mllm_factory.runs import read_config as read_config
from mllm_factory.runs import require_same_architecture as require_same_architecture
from mllm_factory.runs import resolve as resolve

log = logging.getLogger("mllm_factory")
META = "mllm_factory"  # a single key: safetensors writes several in random order


# ---------------------------------------------------------------- write


@dataclass(frozen=True)
class Writer:
    """Writes the checkpoints of a run.

    Attributes:
        run: the run's folder.
        tree: the run's tree.
        frozen: ``fingerprints`` of the model.
        keep: newest checkpoints to keep; None keeps all.
    """

    run: Path
    tree: Mapping[str, Any]
    frozen: Mapping[str, str]
    keep: int | None
    world: World

    @cached_property
    def sources(self) -> dict[str, dict[str, str]]:
        """Revision, licence and checksum of every pretrained source, by its key."""
        return identity.sources(self.tree)

    def save(self, model: MultimodalModel, progress: Mapping[str, Any]) -> Path:
        """Write ``checkpoints/step_<step>``; to be called in every process.

        Everything goes to a ``.tmp`` folder first, is flushed to disk, and gets its name last: a crash at any moment leaves
        the former checkpoints as they were.

        Args:
            progress: ``step`` and whatever ``trainer.pt`` shall hold besides; tensors and plain values only.

        Raises:
            CheckpointError: it cannot be written (full disk, no permission).
        """
        tensors = distributed.on_leader(trained_tensors(model), self.world)
        return distributed.lead(self.world, lambda: self._save(tensors, progress, sorted(model.carried)))

    def _save(self, tensors: dict[str, Tensor], progress: Mapping[str, Any], carried: list[str]) -> Path:
        folder = runs.folder_of(self.run, progress["step"])
        tmp = folder.with_suffix(".tmp")
        try:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
            self._fill(tmp, tensors, progress, carried)
            _publish(tmp, folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(tmp, ignore_errors=True)
            if isinstance(error.__context__, KeyboardInterrupt):  # torch.save ends what it writes, and fails at that
                raise error.__context__ from None
            if lost_worker(error):
                raise
            raise CheckpointError(
                f"the checkpoint {folder} cannot be written: {files.reason(error)}; earlier ones are untouched; {files.CONTINUE}"
            ) from error
        self._prune(progress["step"])
        return folder

    def _fill(self, tmp: Path, tensors: dict[str, Tensor], progress: Mapping[str, Any], carried: list[str]) -> None:
        tree = yaml.safe_dump(dict(self.tree), sort_keys=False, allow_unicode=True)
        known = {"step": progress["step"], "frozen": dict(self.frozen), "sources": self.sources}
        facts = json.dumps(known | ({"carried": carried} if carried else {}), sort_keys=True)
        (tmp / "config.yaml").write_text(tree, encoding="utf-8")
        save_file(tensors, tmp / "model.safetensors", metadata={META: facts})
        with (tmp / "trainer.pt").open("wb") as file:  # an open file reports a full disk as an OSError
            torch.save(dict(progress), file)
        (tmp / "README.md").write_text(_readme(self.tree, tensors, progress["step"], self.sources), encoding="utf-8")
        (tmp / "manifest.json").write_text(json.dumps(runs.manifest(tmp), indent=1), encoding="utf-8")
        for path in [*tmp.iterdir(), tmp]:
            files.flush(path)

    def _prune(self, step: int) -> None:
        """Drop leftovers of crashes, later steps (of an attempt that this one continues from before), and the oldest."""
        checkpoints = self.run / "checkpoints"
        found = runs.steps(self.run)
        later = [path for at, path in found.items() if at > step]
        if later:
            log.warning(
                "removing %s: the run was continued from an earlier step", ", ".join(path.name for path in later)
            )
        older = [path for at, path in found.items() if at <= step]
        excess = older[: -self.keep] if self.keep is not None else []
        for path in [*later, *excess, *checkpoints.glob("step_*.tmp"), *checkpoints.glob("step_*.old")]:
            shutil.rmtree(path, ignore_errors=True)


def _publish(tmp: Path, folder: Path) -> None:
    """Give a complete folder its name. Of the same step again, the old one goes only when the new one is in place."""
    old = folder.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    tmp.rename(folder)
    files.flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _readme(
    tree: Mapping[str, Any], tensors: Mapping[str, Tensor], step: int, sources: Mapping[str, Mapping[str, str]]
) -> str:
    nodes = {part: tree[part] for part in ("vision", "audio", "projector", "backbone") if tree.get(part)}
    parts = "\n".join(f"- {part}: `{node['name']}`" for part, node in nodes.items())
    bases = "\n".join(f"- {identity.shown(key, facts)}" for key, facts in sources.items())
    size = sum(t.numel() for t in tensors.values())
    return (
        f"# {tree['name']}, step {step}\n\n"
        f"A multimodal language model trained with mllm-factory.\n\n{parts}\n\n"
        f"`model.safetensors` holds the {size:,} trained values in {len(tensors)} tensors. "
        "Everything else is rebuilt from `config.yaml`"
        + (f", with the pretrained weights of\n\n{bases}\n\n" if bases else ".\n\n")
        + "```bash\nmllm-factory evaluate checkpoint=<this folder>\n```\n"
    )


# ---------------------------------------------------------------- read


def read_progress(folder: Path) -> dict[str, Any]:
    """What ``trainer.pt`` holds; nothing but tensors and plain values is accepted.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load names no base class for what a damaged file raises
        raise CheckpointError(f"{folder / 'trainer.pt'} cannot be read: {files.reason(error)}") from error


def load(folder: Path, model: MultimodalModel) -> None:
    """Put a checkpoint's tensors into a model built from the same config.

    Raises:
        CheckpointError: other tensors are trained here, shapes differ, or the frozen weights are not those it was trained on.
    """
    saved, facts = _read(folder)
    model.carried = frozenset(facts.get("carried", ()))
    own = trained_tensors(model)
    if saved.keys() != own.keys():
        lacking, unknown = own.keys() - saved.keys(), saved.keys() - own.keys()
        what = [_some("missing in the checkpoint", lacking), _some("unknown to the model", unknown)]
        raise CheckpointError(f"{folder} does not fit this model: {'; '.join(filter(None, what))}")
    misshapen = [
        f"{name} {list(saved[name].shape)} -> {list(t.shape)}"
        for name, t in own.items()
        if saved[name].shape != t.shape
    ]
    if misshapen:
        raise CheckpointError(f"{folder} does not fit this model: {_some('of another shape', misshapen)}")
    own_prints = fingerprints(model)
    changed = [part for part, value in facts["frozen"].items() if own_prints.get(part) != value]
    if changed:
        raise CheckpointError(
            f"the frozen weights of {' and '.join(changed)} are not those that {folder} was trained with"
            f"{_sources_of(facts, changed)}; restore their `pretrained` source, or for random weights the seed and the library "
            "versions"
        )
    _copy(saved, own)


def _sources_of(facts: Mapping[str, Any], parts: Iterable[str]) -> str:
    """`` (vision.pretrained: ..., revision ...)``: where the named parts' weights came from, as far as the checkpoint says it."""
    known = facts.get("sources", {}).items()
    lines = [identity.shown(key, about) for key, about in known if key.partition(".")[0] in parts]
    return f" ({'; '.join(lines)})" if lines else ""


def initialise(folder: Path, model: MultimodalModel) -> tuple[int, int]:
    """Start from the tensors that a checkpoint has and a model trains, equal in name and shape; the rest is warned about.

    Returns:
        How many were taken, and how many trained tensors the model has.

    Raises:
        CheckpointError: there are none.
    """
    (saved, _), own = _read(folder), trained_tensors(model)
    both = {name: t for name, t in saved.items() if name in own and own[name].shape == t.shape}
    left = _some("tensors of the checkpoint are not trained here, or have another shape", saved.keys() - both.keys())
    if not both:
        raise CheckpointError(f"init_from: {folder} shares no trained tensor with this model: {left}")
    if left:
        log.warning("init_from: %s", left)
    _copy(both, own)
    return len(both), len(own)


def carry(folder: Path, model: MultimodalModel) -> int:
    """Put all that a checkpoint holds into the model of the next stage, trained there or not; it is saved with that model's own.

    Returns:
        How many tensors these are.

    Raises:
        CheckpointError: the model has no place for one.
    """
    (saved, _), there = _read(folder), state_tensors(model)
    homeless = [name for name, t in saved.items() if name not in there or there[name].shape != t.shape]
    if homeless:
        raise CheckpointError(
            f"{_some('tensors', homeless)} that {folder} trained have no place in the next stage; keep the strategies of the "
            "earlier stage in its tuning (a list: [lora, mores]), or start a run of its own with init_from"
        )
    _copy(saved, {name: there[name] for name in saved})
    model.carried = frozenset(saved)
    return len(saved)


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint and the facts beside them."""
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            facts = json.loads(file.metadata()[META])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'model.safetensors'} cannot be read: {files.reason(error)}") from error


@torch.no_grad()
def _copy(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for name, value in saved.items():
        own[name].copy_(value)


def fingerprints(model: MultimodalModel) -> dict[str, str]:
    """Per part, a hash over names, shapes and up to 1,024 evenly spaced values of every tensor that training leaves alone."""
    trained = {id(tensor) for tensor in trained_tensors(model).values()}
    return {name: _fingerprint(part, trained) for name, part in model.parts().items()}


def _fingerprint(part: nn.Module, trained: set[int]) -> str:
    digest = hashlib.sha256()
    for name, tensor in state_tensors(part).items():
        if id(tensor) not in trained:
            values = tensor.detach().flatten()
            sample = values[:: max(1, -(-values.numel() // 1024))].to("cpu", torch.float32)
            digest.update(f"{name} {list(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _some(what: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
