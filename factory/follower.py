"""What happens after a step of training: log, evaluate, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mllm_factory import checkpoint, distributed, recorder
from mllm_factory.distributed import World
from mllm_factory.interfaces import Schedule
from mllm_factory.recorder import Recorder
from mllm_factory.trainer import Trainer, TrainState


def random_state(world: World) -> dict[str, torch.Tensor]:
    """The state of this process's random generators."""
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(start: Path, state: TrainState, schedule: Schedule) -> float:
    """Put optimizer, schedule, step and random state of this process back; the seconds trained so far."""
    progress = checkpoint.read_progress(start)
    distributed.load_optimizer(state.model, state.optimizer, progress["optimizer"])
    schedule.load_state_dict(progress["schedule"])
    state.step = progress["step"]
    if state.world.rank < len(progress["random"]):
        mine = progress["random"][state.world.rank]
        torch.set_rng_state(mine["cpu"])
        if state.world.device.type == "cuda" and "cuda" in mine:
            torch.cuda.set_rng_state(mine["cuda"])
    return float(progress["seconds"])


class Follower:
    """Called by the trainer after each step.

    Args:
        judge: evaluates the model on so many samples (None: all) and gives flat keys to numbers.
        seconds: trained in earlier attempts.
        step: where this attempt starts.
    """

    def __init__(
        self,
        tree: Mapping[str, Any],
        folder: Path,
        trainer: Trainer,
        schedule: Schedule,
        lines: Recorder,
        judge: Callable[[int | None], dict[str, float]],
        seconds: float,
    ) -> None:
        self.tree, self.folder, self.trainer, self.schedule = tree, folder, trainer, schedule
        self.lines, self.judge = lines, judge
        self.seconds, self.begun = seconds, time.monotonic()
        self.samples = self.refused = 0
        self._clear()

    def _clear(self) -> None:
        self.loss_sum, self.num_labels, self.recent, self.since = torch.zeros(()), torch.zeros(()), 0, time.monotonic()

    def __call__(self, state: TrainState, facts: dict[str, Any]) -> None:
        """Log, evaluate and save where it is time to."""
        self._count(state, facts)
        last = state.step == self.trainer.max_steps
        if state.step % self.trainer.log_every == 0 or last:
            self.lines.write(state.step, self._line(state, facts))
            self._clear()
        if self.trainer.eval_every and state.step % self.trainer.eval_every == 0 and not last:
            self._evaluate(state.step)
        if state.step % self.trainer.save_every == 0 or last:
            self._save(state)

    def _count(self, state: TrainState, facts: dict[str, Any]) -> None:
        self.loss_sum = self.loss_sum + distributed.total(facts["loss_sum"].double(), state.world).cpu()
        self.num_labels = self.num_labels + facts["num_labels"].cpu()
        count = sum(len(batch.ids) for batch in state.batches) * state.world.size
        self.samples, self.recent = self.samples + count, self.recent + count
        self.refused += sum(batch.refused for batch in state.batches)
        self.seconds, self.begun = self.seconds + time.monotonic() - self.begun, time.monotonic()
        self.lines.advance(state.step)

    def _line(self, state: TrainState, facts: dict[str, Any]) -> dict[str, float]:
        return {
            "loss": float(self.loss_sum / self.num_labels),
            "grad_norm": float(facts["grad_norm"]),
            **{f"lr/{group['name']}": float(group["lr"]) for group in state.optimizer.param_groups},
            "samples_per_second": self.recent / (time.monotonic() - self.since),
            "seconds": self.seconds,
            "refused": float(self.refused),
            "peak_memory_bytes": float(recorder.peak_memory_bytes(state.world.device)),
        }

    def _evaluate(self, step: int) -> None:
        results = self.judge(self.trainer.eval_limit)
        self.lines.write(step, {f"eval/{key}": value for key, value in results.items()})
        self.since = self.begun = time.monotonic()  # judging is not training

    def _save(self, state: TrainState) -> None:
        progress = {
            "step": state.step,
            "optimizer": distributed.optimizer_state(state.model, state.optimizer),
            "schedule": self.schedule.state_dict(),
            "random": distributed.gather(random_state(state.world), state.world),
            "seconds": self.seconds,
        }
        checkpoint.save(self.folder, self.tree, state.model, progress, state.world, self.trainer.keep)

    def summary(self, state: TrainState) -> dict[str, float]:
        """The training part of the report. Speed counts this attempt's steps, without evaluations."""
        saved = self.folder / "checkpoints" / f"step_{state.step:06d}" / "model.safetensors"
        done = state.step * self.trainer.batch_size * self.trainer.accumulate * state.world.size
        return {
            "train/steps": float(state.step),
            "train/seconds": self.seconds,
            "train/samples_per_second": done / self.seconds if self.seconds else 0.0,
            "train/refused": float(self.refused),
            "parameters/total": float(sum(p.numel() for p in state.model.parameters())),
            "parameters/trainable": float(sum(p.numel() for p in state.model.parameters() if p.requires_grad)),
            "checkpoint_bytes": float(saved.stat().st_size) if saved.exists() else float("nan"),
            "peak_memory_bytes": float(recorder.peak_memory_bytes(state.world.device)),
        }
