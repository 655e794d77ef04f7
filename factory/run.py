"""From a tree to a training run, an evaluation or a check. Read this file first.

tree -> sources, model (encoders -> projectors -> backbone), tuning -> collator -> trainer / evaluator -> report
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml

from mllm_factory import distributed, ending, estimate, files, randomness, recorder, runs
from mllm_factory.assemble import (
    MISFITS,
    Tree,
    build_collator,
    build_engine_node,
    build_metrics,
    build_model,
    build_source,
    length_of,
)
from mllm_factory.cached_items import CachedItems
from mllm_factory.checkpoint import Writer, carry, fingerprints, initialise, load, read_progress
from mllm_factory.data import Collator
from mllm_factory.distributed import World
from mllm_factory.ending import Ended
from mllm_factory.errors import ConfigError, Problem
from mllm_factory.evaluator import evaluate as evaluate_model
from mllm_factory.features import cache_features
from mllm_factory.follower import Follower, restore
from mllm_factory.identity import absent
from mllm_factory.interfaces import Encoder, Schedule, Source
from mllm_factory.loader import Order, train_batches
from mllm_factory.model import MultimodalModel
from mllm_factory.recorder import Recorder, console
from mllm_factory.registry import build
from mllm_factory.trainer import Trainer, TrainState
from mllm_factory.types import MODALITIES, Batch
from mllm_factory.weightless import weightless

PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}  # paths stay as they are


def train(tree: Tree) -> float | None:
    """Train, evaluate at the end, write the report; the first metric's main value, or None without metrics.

    Raises:
        UserError: anything that the user can mend, before the first step where possible.
    """
    trainer = build_engine_node(Trainer, tree["trainer"], "trainer")
    schedule = build(Schedule, tree["schedule"], "schedule")
    with distributed.joined(trainer.device, trainer.timeout) as world, ExitStack() as held:
        tree = {**tree, "output_dir": distributed.lead(world, lambda: str(tree["output_dir"]))}
        start = distributed.lead(world, lambda: _open(tree, held))
        return train_in(tree, trainer, schedule, world, start)


def _open(tree: Tree, held: ExitStack) -> Path | None:
    """Lock the run's folder; the checkpoint to continue from, if any. Only the first process does this."""
    folder = Path(tree["output_dir"])
    held.enter_context(recorder.lock(folder))
    if not tree.get("resume"):
        if runs.steps(folder):
            raise ConfigError(
                Problem(
                    f"{folder} holds the checkpoints of a run; continue it with resume=auto, or choose another",
                    "output_dir",
                )
            )
        return None
    start = runs.latest(folder) if tree["resume"] == "auto" else runs.resolve(tree["resume"])
    if start is None:
        console.print(f"resume=auto: {folder} holds no usable checkpoint; starting from the beginning", **PLAIN)
        return None
    runs.require_same_architecture(start, tree)
    console.print(f"resuming from {start}", **PLAIN)
    for change in runs.changed_options(start, tree):
        console.print(f"changed since then: {change}", **PLAIN)
    return start


def train_in(
    tree: Tree, trainer: Trainer, schedule: Schedule, world: World, start: Path | None, before: Path | None = None
) -> float | None:
    """A training in a world and a folder that is held.

    Args:
        start: the checkpoint to continue from.
        before: the checkpoint of the stage before; not looked at where ``start`` is given.
    """
    folder, sources = Path(tree["output_dir"]), read_sources(tree)
    model = build_model(tree)
    collator = build_collator(tree, model)
    _initialise(tree, model, start, before)
    writer = Writer(folder, tree, fingerprints(model), trainer.keep, world)
    cached = _cache_features(model, trainer, folder, world)
    collate = collator.for_training(trainer.packing, {} if schedule.reads_media else cached)
    wrapped, state = trainer.prepare(model, world)
    randomness.seed_all(randomness.seed_of(tree["seed"], f"process {world.rank}"))
    progress = read_progress(start) if start is not None else {}
    if progress:
        restore(progress, state, schedule)
    if world.leads:
        files.write(folder / "config.yaml", yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True))
    judge = partial(_judge, tree, model, sources.get("eval"), collator, trainer, world)
    with (
        Recorder(folder, trainer.max_steps, state.step, trainer.tensorboard, world.leads) as lines,
        ending.noticed() as state.notice,
    ):
        follower = Follower(trainer, schedule, writer, lines, judge, progress.get("counts", {}))
        batches = _batches(tree, sources["train"], collate, trainer, state)
        trainer.fit(wrapped, state, schedule, batches, follower)
        del batches  # ends the loader's processes
    if announced := state.ending or state.notice():
        if world.leads:
            told = f"{signal.Signals(announced).name}: step {state.step} of {trainer.max_steps} is saved"
            console.print(f"{told}; resume=auto goes on from it", **PLAIN)
        raise Ended(announced)
    results = judge(None)
    papers = {
        "parameters/trainable_backbone": float(sum(p.numel() for p in model.backbone.parameters() if p.requires_grad))
    }
    values = {**results, **follower.summary(state), **papers}
    if world.leads:
        recorder.report(folder, values)
    return next(iter(results.values()), None)


def _batches(tree: Tree, source: Source, collator: Collator, trainer: Trainer, state: TrainState) -> Iterator[Batch]:
    """This process's batches from the state's step on."""
    order = Order(
        len(source), trainer.batch_size, tree["seed"], length_of(source, collator), trainer.bucket, source.near
    )
    world = state.world
    return train_batches(
        source,
        collator,
        order,
        first=state.step * trainer.accumulate * world.size,
        world=world.size,
        rank=world.rank,
        workers=trainer.workers,
        pin=world.device.type == "cuda",
    )


def read_sources(tree: Tree) -> dict[str, Source]:
    """Data first: reading it costs little, and most mistakes are there."""
    encoders = {name for name in MODALITIES if tree.get(name)}
    wanted = ["train", *(["eval"] if tree["data"].get("eval") else [])]
    if tree.get("metrics") and "eval" not in wanted:
        raise ConfigError(Problem("metrics need data to be judged on; set data.eval, or metrics=null", "data.eval"))
    build_metrics(tree)
    return {key: build_source(tree, key, encoders) for key in wanted}


def _initialise(tree: Tree, model: MultimodalModel, start: Path | None, before: Path | None) -> None:
    if start is not None:
        load(start, model)
    elif before is not None:
        console.print(f"took {carry(before, model)} tensors of {before}", **PLAIN)
    elif tree.get("init_from"):
        taken, of = initialise(runs.resolve(tree["init_from"]), model)
        console.print(f"init_from: took {taken} of {of} trained tensors", **PLAIN)


def _cache_features(model: MultimodalModel, trainer: Trainer, folder: Path, world: World) -> dict[str, CachedItems]:
    """Let frozen encoders remember features, if that is wanted; by modality, what loader workers may know of them."""
    cached = {}
    for name, encoder in model.encoders.items() if trainer.cache_features else ():
        file = folder / "features" / f"{name}_{world.rank}.f32"
        if not cache_features(cast(Encoder, encoder), file):
            raise ConfigError(
                Problem(
                    f"features change while {name} is trained; freeze it or set this to false", "trainer.cache_features"
                )
            )
        cached[name] = CachedItems(file)
    return cached


def _judge(
    tree: Tree,
    model: MultimodalModel,
    source: Source | None,
    collator: Collator,
    trainer: Trainer,
    world: World,
    limit: int | None,
) -> dict[str, float]:
    """Every metric on ``data.eval``; the same in every process, so that none waits for another."""
    metrics = build_metrics(tree)
    if not metrics or source is None:
        return {}
    size = min(len(source), limit or len(source))
    with recorder.counter("evaluate", size, world.leads) as count:
        results = evaluate_model(
            model,
            source,
            collator,
            metrics,
            batch_size=trainer.eval_batch_size,
            device=world.device,
            autocast=trainer.autocast(world),
            limit=limit,
            workers=trainer.workers,
            seed=tree["seed"],
            on_batch=count,
        )
    if world.leads:
        recorder.tables(Path(tree["output_dir"]), {label: metric.tables() for label, metric in metrics.items()})
    return results


def evaluate(tree: Tree) -> float | None:
    """Evaluate a checkpoint, or the model as composed; the first metric's main value.

    Raises:
        UserError: anything that the user can mend.
    """
    trainer = build_engine_node(Trainer, tree["trainer"], "trainer")
    if not tree.get("metrics"):
        raise ConfigError(Problem("there is nothing to measure; choose some, such as metrics=[exact_match]", "metrics"))
    with distributed.joined(trainer.device, trainer.timeout) as world, ExitStack() as held:
        folder = Path(distributed.lead(world, lambda: str(tree["output_dir"])))
        distributed.lead(world, lambda: held.enter_context(recorder.lock(folder)))
        start = distributed.lead(world, lambda: runs.resolve(tree["checkpoint"]) if tree.get("checkpoint") else None)
        source = build_source(tree, "eval", {name for name in MODALITIES if tree.get(name)})
        model = build_model(tree)
        collator = build_collator(tree, model)
        if start is not None:
            load(start, model)
        _cache_features(model, trainer, folder, world)
        results = _judge(tree, model.to(world.device), source, collator, trainer, world, None)
        if world.leads:
            memory = {"peak_memory_bytes": float(recorder.peak_memory_bytes(world.device))}
            recorder.report(folder, {**results, **memory})
        return next(iter(results.values()), None)


def check(tree: Tree) -> dict[str, Any]:
    """Build everything on the meta device, where weights take no memory, run one training step there, and count.

    Returns:
        ``parts`` (name, total, trainable of each), ``total``, ``trainable``, ``trainable_backbone`` (the language model alone, as
        papers count), ``targets`` (of ``estimate.targets``), ``tokens`` (of one item, by modality), ``context`` (of
        ``estimate.context``), ``memory`` (bytes of weights, gradients, optimizer state and activations, and their ``peak`` at
        one moment), ``sharding`` (bytes of the largest decoder ``layer`` and of the ``rest`` outside of layers), ``samples``
        of the training data, ``features`` (bytes of one item's cached features, by modality), ``trainer`` (its
        ``batch_size``, ``accumulate``, ``strategy`` and ``save_every``), ``flops_per_step`` of one
        process, and ``notes`` (what is to be downloaded, and what could not be found out).

    Raises:
        ConfigError: everything wrong with the parts, at once.
    """
    trainer = build_engine_node(Trainer, tree["trainer"], "trainer")
    build(Schedule, tree["schedule"], "schedule")
    sources = read_sources(tree)
    with weightless():
        model = build_model(tree)
    away = absent(tree).items()
    notes = [f"{key}: {source} is not on this machine; it is downloaded at the first run" for key, source in away]
    encoders: dict[str, Encoder] = dict(model.encoders.items())  # type: ignore[arg-type]  # a ModuleDict forgets the kind
    inner = ((name, module) for name, encoder in encoders.items() for module in encoder.modules())
    notes += [f"{name}: {module.absent}" for name, module in inner if isinstance(module, Encoder) and module.absent]
    collator = build_collator(tree, model)
    parts = _count(model, tree)
    if tree.get("checkpoint") is None and not any(part["trainable"] for part in parts.values()):
        trainer.refuse_nothing_to_train()
    learning = estimate.bytes_of(model, trained=True)
    memory = {"weights": estimate.bytes_of(model), "gradients": learning, "optimizer": 2 * learning}
    found = {
        "parts": parts,
        "total": sum(part["total"] for part in parts.values()),
        "trainable": sum(part["trainable"] for part in parts.values()),
        "trainable_backbone": parts["backbone"]["trainable"],
        "targets": estimate.targets(model, tree["tuning"]),
        "tokens": dict(model.tokens_per_item),
        "context": estimate.context(model, collator.max_length),
        "memory": memory,
        "sharding": estimate.sharding(model),
        "samples": len(sources["train"]),
        "trainer": {name: getattr(trainer, name) for name in ("batch_size", "accumulate", "strategy", "save_every")},
        "features": {name: 4 * encoder.num_tokens * encoder.dim for name, encoder in encoders.items()},
        "notes": notes,
    }
    try:
        cost = estimate.step(model, trainer, collator.max_length)
    except MISFITS as error:  # a part's own code may need values
        notes.append(f"activations and FLOPs: a step cannot run without values ({files.reason(error)[:200]})")
        return found
    memory |= {"activations": cost.activations, "peak": cost.peak}
    return {**found, "flops_per_step": cost.flops}


def _count(model: MultimodalModel, tree: Tree) -> dict[str, dict[str, Any]]:
    parts = {}
    for part, module in model.parts().items():
        sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
        total, trainable = sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
        parts[part] = {"name": (tree.get(part) or tree["projector"])["name"], "total": total, "trainable": trainable}
    return parts
