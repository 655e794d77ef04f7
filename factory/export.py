"""``export``: a trained model as a folder that needs nothing else: transformers' own format where it fits, else ours.

checkpoint -> model with its tuning -> merged into plain weights, if asked for -> LLaVA folder, or native folder
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mllm_factory import files, llava, native, runs
from mllm_factory.assemble import Tree, build_model
from mllm_factory.checkpoint import load, read_progress
from mllm_factory.checks import check_tree
from mllm_factory.completion import EXPORTED
from mllm_factory.errors import CheckpointError, ConfigError, UserError, hint
from mllm_factory.interfaces import Tuning
from mllm_factory.model import MultimodalModel, state_tensors
from mllm_factory.registry import build


@dataclass(frozen=True)
class Exported:
    """What was written: where, ``llava`` or ``native``, and why it is not the other one."""

    folder: Path
    format: str
    reason: str = ""


def export(argv: Sequence[str]) -> int:
    """The verb ``export``: ``checkpoint=F [merge=true] [output=F] [trust_components=true]``.

    Raises:
        UserError: an unknown option, or anything that ``write`` refuses.
    """
    given = _read(argv)
    done = write(given["checkpoint"], given["merge"], given["output"], given["trust_components"])
    if done.reason:
        print(f"no transformers folder: {done.reason}")
    print(f"wrote a {done.format} folder: {done.folder}")
    return 0


def _read(argv: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = dict.fromkeys(EXPORTED) | {"merge": "false", "trust_components": "false"}
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals or key not in EXPORTED:
            raise UserError(f"export takes option=value, got '{word}'{hint(key, EXPORTED)}")
        given[key] = value
    if not given["checkpoint"]:
        raise UserError("export needs a checkpoint; give checkpoint=<run folder or checkpoints/step_<n>>")
    for key in ("merge", "trust_components"):
        if given[key] not in ("true", "false"):
            raise UserError(f"{key}: '{given[key]}' is neither true nor false")
        given[key] = given[key] == "true"
    return given


def write(checkpoint: str, merge: bool = False, output: str | None = None, trust_components: bool = False) -> Exported:
    """Export a checkpoint.

    Args:
        checkpoint: a checkpoint folder, or a run folder, whose newest good checkpoint is meant.
        merge: fold what the tuning inserted into plain weights.
        output: the folder to make; None for ``export`` beside the checkpoints of the run.
        trust_components: the checkpoint's config may name classes outside the registry.

    Raises:
        CheckpointError: no usable checkpoint, or the folder is there already or cannot be written.
        ConfigError: the tuning cannot be merged, or the weights cannot be stored.
    """
    source = runs.resolve(checkpoint)
    folder = Path(output).expanduser().absolute() if output else source.parent.parent / f"export_{source.name}"
    if folder.exists():
        raise CheckpointError(f"output: {folder} exists; choose another folder, or remove it")
    tree = runs.read_config(source)
    found = check_tree({**tree, "checkpoint": None}, not trust_components, evaluate=True)
    problems = [problem for problem in found if problem.key.partition(".")[0] in runs.ARCHITECTURE]  # data stay closed
    if problems:
        raise ConfigError(problems)
    model = build_model(tree)
    load(source, model)
    return _write(model.eval(), tree, merge, folder, _step(source))


def _write(model: MultimodalModel, tree: Tree, merge: bool, folder: Path, step: int) -> Exported:
    plain = _plain_names(tree)
    if merge:
        fold(model, tree, plain)
    left = state_tensors(model).keys() - plain
    reason = "the modules of the tuning are no part of a transformers model; merge=true folds in those that can be"
    if not left:
        try:
            with _appearing(folder) as tmp:
                llava.write(model, tmp)
                about = "A LLaVA of transformers (`LlavaForConditionalGeneration`, `AutoProcessor`), exported by mllm-factory."
                text = f"# {tree['name']}, step {step}\n\n{about}\n{native.origins(tree)}"
                (tmp / "README.md").write_text(text, encoding="utf-8")
            return Exported(folder, "llava")
        except llava.MisfitError as error:
            reason = str(error)
    with _appearing(folder) as tmp:
        native.write(model, tree, bool(left), tmp, folder, step)
    return Exported(folder, "native", reason)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder that gets its name when all is in it.

    Raises:
        CheckpointError: it cannot be written.
    """
    tmp = folder.with_name(f"{folder.name}.tmp")
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        yield tmp
        tmp.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"output: {folder} cannot be written: {files.reason(error)}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(read_progress(checkpoint)["step"])


def _plain_names(tree: Tree) -> set[str]:
    """Names of the tensors of the same model before tuning."""
    tuning = {part: {"name": "frozen"} for part in native.TUNED}
    with torch.device("meta"):
        return set(state_tensors(build_model({**tree, "tuning": tuning})))


# ---------------------------------------------------------------- merge


def fold(model: MultimodalModel, tree: Tree, plain: set[str]) -> None:
    """Fold what strategies inserted into plain weights: each one's ``merge(part, model)``, the last of a list first.

    Args:
        plain: names of the tensors that shall be left.

    Raises:
        ConfigError: a strategy cannot be merged; says why.
    """
    for part, module in model.parts().items():
        for strategy in reversed(_strategies(tree, part)):
            merge: Callable[..., None] | None = getattr(strategy, "merge", None)
            if merge is not None:
                merge(module, model)
    left = sorted(state_tensors(model).keys() - plain)
    if left:
        raise ConfigError(
            f"merge: {len(left)} tensors of the tuning have no place in plain weights, such as {left[0]}; export without merge"
        )


def _strategies(tree: Tree, part: str) -> list[Tuning]:
    """A part's strategies in order, as they were applied."""
    tuning = tree["tuning"]
    key = part if tuning.get(part) else "projector" if part.endswith("projector") else part
    nodes = tuning[key] if isinstance(tuning[key], list) else [tuning[key]]
    return [build(Tuning, node, f"tuning.{key}") for node in nodes]
