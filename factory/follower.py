"""What happens after a step of training: count, log, evaluate, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mllm_factory import distributed, randomness, recorder, runs
from mllm_factory.checkpoint import Writer
from mllm_factory.errors import CheckpointError
from mllm_factory.interfaces import Schedule, Tuning
from mllm_factory.recorder import Recorder
from mllm_factory.trainer import Trainer, TrainState

log = logging.getLogger("mllm_factory")


def restore(progress: Mapping[str, Any], state: TrainState, schedule: Schedule) -> None:
    """Put optimizer, schedule, strategies, step and random generators of this process back.

    Raises:
        CheckpointError: a strategy goes on from a state that the checkpoint does not hold.
    """
    distributed.load_optimizer(state.model, state.optimizer, progress["optimizer"])
    schedule.load_state_dict(progress["schedule"])
    _restore_strategies(progress.get("strategies", {}), state.model.stepping())
    state.step = progress["step"]
    before = len(progress["random"])
    if before != state.world.size and state.world.leads:
        log.warning(
            "%d processes so far, %d now: the order of samples and dropout go on differently", before, state.world.size
        )
    if state.world.rank < before:
        randomness.restore(progress["random"][state.world.rank], state.world.device)


def _restore_strategies(saved: Mapping[str, Any], strategies: Mapping[str, Tuning]) -> None:
    for place, strategy in strategies.items():
        if place in saved:
            strategy.load_state_dict(saved[place])
        elif type(strategy).load_state_dict is not Tuning.load_state_dict:
            raise CheckpointError(
                f"the checkpoint holds no state of tuning.{place} ({type(strategy).__name__}) to go on from; start a new run "
                "with init_from"
            )


class Follower:
    """Called by the trainer after each step.

    Args:
        trainer: how often to log, evaluate and save.
        writer: of checkpoints.
        lines: writes ``metrics.jsonl``.
        judge: evaluates the model on so many samples (None: all) and gives flat keys to numbers.
        counts: what ``progress`` of the checkpoint to continue from holds; empty at the start of a run.
    """

    def __init__(
        self,
        trainer: Trainer,
        schedule: Schedule,
        writer: Writer,
        lines: Recorder,
        judge: Callable[[int | None], dict[str, float]],
        counts: Mapping[str, float],
    ) -> None:
        self.trainer, self.schedule, self.writer, self.lines, self.judge = trainer, schedule, writer, lines, judge
        self.world = writer.world
        mine = counts if self.world.leads else {}  # they are sums over all processes
        self.samples, self.refused = int(mine.get("samples", 0)), int(mine.get("refused", 0))
        self.loss_sum = self._zero() + mine.get("loss_sum", 0.0)
        self.num_labels = self._zero() + counts.get("num_labels", 0.0)
        self.seconds = counts.get("seconds", 0.0)
        self.logged = self.samples  # how many the last line has seen
        self.begun = self.since = time.monotonic()

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.world.device)

    def __call__(self, state: TrainState, facts: Mapping[str, Tensor]) -> None:
        """Count; log, evaluate and save where it is time to. Where the end was announced there is no time but to save."""
        self._count(state, facts)
        last = state.step == self.trainer.max_steps
        if state.step % self.trainer.log_every == 0 or last:
            self._log(state, float(facts["grad_norm"]))
        with self._not_training():
            if self.trainer.eval_every and state.step % self.trainer.eval_every == 0 and not (last or state.ending):
                results = self.judge(self.trainer.eval_limit)
                self.lines.write(state.step, {f"eval/{key}": value for key, value in results.items()})
            if state.step % self.trainer.save_every == 0 or last or state.ending:
                self._save(state)

    def _count(self, state: TrainState, facts: Mapping[str, Tensor]) -> None:
        """Add up; sums stay on the device, so that nothing waits for it."""
        self.loss_sum += facts["loss_sum"]
        self.num_labels += facts["num_labels"]
        self.refused += sum(batch.refused for batch in state.batches)
        self.samples += sum(len(batch.ids) for batch in state.batches)
        now = time.monotonic()
        self.seconds, self.begun = self.seconds + now - self.begun, now
        self.lines.advance(state.step)

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Stop the clocks."""
        stopped = time.monotonic()
        yield
        pause = time.monotonic() - stopped
        self.begun, self.since = self.begun + pause, self.since + pause

    def _counts(self) -> dict[str, float]:
        """Sums over all processes."""
        own = torch.stack([self.loss_sum, *(self._zero() + n for n in (self.samples, self.refused, self.logged))])
        loss_sum, samples, refused, logged = distributed.total(own, self.world).tolist()
        return {
            "loss_sum": loss_sum,
            "num_labels": float(self.num_labels),
            "samples": samples,
            "refused": refused,
            "unlogged": samples - logged,
            "seconds": self.seconds,
        }

    def _log(self, state: TrainState, grad_norm: float) -> None:
        counts = self._counts()
        values = {
            "loss": counts["loss_sum"] / counts["num_labels"],
            "grad_norm": grad_norm,
            **{f"lr/{group['name']}": float(group["lr"]) for group in state.optimizer.param_groups},
            **self.schedule.readings(),
            **self._readings(state),
            "samples_per_second": counts["unlogged"] / (time.monotonic() - self.since),
            "seconds": self.seconds,
            "refused": counts["refused"],
            "peak_memory_bytes": float(recorder.peak_memory_bytes(self.world.device)),
        }
        self.lines.write(state.step, values)
        self.loss_sum, self.num_labels, self.logged = self._zero(), self._zero(), self.samples
        self.since = time.monotonic()

    def _readings(self, state: TrainState) -> dict[str, float]:
        """What strategies say, by their places."""
        said = {place: strategy.readings() for place, strategy in state.model.stepping().items()}
        return {f"tuning/{place}/{key}": value for place, values in said.items() for key, value in values.items()}

    def _save(self, state: TrainState) -> None:
        self.lines.flush()  # what a checkpoint follows must not be lost when the machine stops
        progress = {
            "step": state.step,
            "optimizer": distributed.optimizer_state(state.model, state.optimizer, self.world),
            "schedule": self.schedule.state_dict(),
            "strategies": {place: strategy.state_dict() for place, strategy in state.model.stepping().items()},
            "random": distributed.gather(randomness.snapshot(self.world.device), self.world),
            "counts": self._counts(),
        }
        self.writer.save(state.model, progress)

    def summary(self, state: TrainState) -> dict[str, float]:
        """The training part of the report; evaluating and saving are not in the time. To be called in every process."""
        counts = self._counts()
        saved = runs.folder_of(self.writer.run, state.step) / "model.safetensors"
        return {
            "train/steps": float(state.step),
            "train/seconds": self.seconds,
            "train/samples_per_second": counts["samples"] / self.seconds if self.seconds else 0.0,
            "train/refused": counts["refused"],
            "parameters/total": float(sum(p.numel() for p in state.model.parameters())),
            "parameters/trainable": float(sum(p.numel() for p in state.model.parameters() if p.requires_grad)),
            "checkpoint_bytes": float(saved.stat().st_size) if saved.exists() else float("nan"),
            "peak_memory_bytes": float(recorder.peak_memory_bytes(self.world.device)),
        }
