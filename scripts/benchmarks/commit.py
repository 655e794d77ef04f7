"""What measuring the learning balance costs: turns of training with the schedule ``commit`` against the same with ``cosine``.

Both sides start from the same weights, see the same batch and take turns in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Result
from benchmarks.overhead import samples
from benchmarks.tuning import TINY, rows, sizes, tree, turns
from mllm_factory import Schedule, build
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.distributed import World
from mllm_factory.trainer import Trainer

SHAPE = sizes(256, 6, 8, 8, 768)
COSINE = {"name": "cosine", "lr": 1e-4}
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "monitor, every step": ({"measure_every": 1, "act": False}, 1.75),
    "monitor, every 10th step": ({"measure_every": 10, "act": False}, 1.08),
    "regulariser, every step": ({"weight": 1.0}, 3.2),
}
"""Options of ``commit``, and the mark: time over that of the plain steps."""


def trainer_turn(
    node: dict[str, Any], schedule: dict[str, Any], batch_size: int, steps: int, losses: list[float]
) -> Callable[[], None]:
    """A turn of so many training steps of a model of its own; the loss of each step is added to ``losses``."""
    model = build_model(node)
    batch = build_collator(node, model)(samples(batch_size))
    trainer = Trainer(max_steps=10**6, device="cpu")
    wrapped, state = trainer.prepare(model, World(0, 1, torch.device("cpu")))
    built = build(Schedule, schedule)

    def turn() -> None:
        trainer.max_steps = state.step + steps
        trainer.fit(
            wrapped, state, built, iter([batch] * steps), lambda state, facts: losses.append(float(facts["loss_sum"]))
        )

    return turn


def run(runs: int | None, small: bool) -> Result:
    """Every case; a turn is 10 steps, so that each holds as many measurements."""
    shape, batch_size = (next(iter(TINY.values())), 2) if small else (SHAPE, 8)
    runs = runs or (1 if small else 5)
    result = Result("commit", "the same training with the schedule cosine")
    node = tree(shape, {"name": "full"})
    for case, (options, mark) in CASES.items():
        schedule = {**COSINE, "name": "commit", "warmup": 0.05, "window": 100, **options}
        losses: tuple[list[float], list[float]] = ([], [])
        ours = trainer_turn(node, schedule, batch_size, 10, losses[0])
        other = trainer_turn(node, COSINE, batch_size, 10, losses[1])
        rows(result, case, turns(ours, other, runs), "<=", mark)
        if not options.get("act", True):
            result.checks[f"{case}: losses are those without it"] = losses[0] == losses[1]
    learning = sum(p.numel() for p in build_model(node).parameters() if p.requires_grad)
    result.facts |= {"trainable parameters": learning, "batch": batch_size}
    return result
