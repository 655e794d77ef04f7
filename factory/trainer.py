"""The training loop. Everything else has an owner: data (loader), what trains (tuning), how fast (schedule), files (run)."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mllm_factory import distributed
from mllm_factory.distributed import World
from mllm_factory.errors import ConfigError, DataError, hint
from mllm_factory.interfaces import Schedule, Stepping
from mllm_factory.model import MultimodalModel, learns
from mllm_factory.packing import require_packable
from mllm_factory.types import Batch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
STRATEGIES = ("ddp", "fsdp")


class TrainingError(DataError):
    """Training cannot go on: no label, no gradient, or a value that is not finite."""


@dataclass
class TrainState:
    """All that a schedule, or a strategy with steps, may look at.

    Attributes:
        step: optimizer steps done so far.
        batches: the batches of the step in flight, of this process, as they came from the loader.
        num_labels: [] labels of the step over all batches and processes.
        clip: largest gradient norm of the step to come; None does not clip.
        notice: the signal that announces the end of this process, 0 where none came.
        ending: such a signal, here or in another process, once the step in flight is the last one; else 0.
    """

    model: MultimodalModel
    optimizer: torch.optim.Optimizer
    max_steps: int
    world: World
    step: int = 0
    batches: list[Batch] = field(default_factory=list)
    num_labels: Tensor = field(default_factory=lambda: torch.zeros(()))
    clip: float | None = None
    notice: Callable[[], int] = lambda: 0
    ending: int = 0


class Trainer:
    """Minimise the mean label loss of each step: sum over all its batches and processes / their label count.

    Args:
        max_steps: optimizer steps.
        batch_size: samples of one forward pass of one process.
        accumulate: forward passes summed into one optimizer step.
        eval_batch_size: samples of one forward pass of an evaluation.
        weight_decay: AdamW's, on parameters of two or more dimensions.
        betas: AdamW's two averaging factors.
        clip: largest gradient norm over all trainable parameters; None does not clip.
        precision: ``fp32``, or ``bf16`` autocast (weights stay as they are).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<n>``.
        strategy: for several processes, ``ddp`` or ``fsdp``.
        timeout: seconds that a process waits for the others.
        gradient_checkpointing: recompute decoder layers in the backward pass.
        cache_features: keep a frozen encoder's features on disk in the run's folder.
        packing: let the samples of a batch share rows in the backbone, each by itself in attention and positions.
        bucket: windows of so many batches are sorted by length; 1 does not sort.
        workers: data loader processes.
        log_every, eval_every, save_every: in optimizer steps; ``eval_every`` None evaluates at the end only.
        eval_limit: samples of an evaluation while training; None: all.
        keep: newest checkpoints kept; None: all.
        tensorboard: also write event files.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        max_steps: int = 1000,
        batch_size: int = 32,
        accumulate: int = 1,
        eval_batch_size: int = 64,
        weight_decay: float = 0.01,
        betas: list[float] | None = None,
        clip: float | None = 1.0,
        precision: str = "fp32",
        device: str = "auto",
        strategy: str = "ddp",
        timeout: float = 1800.0,
        gradient_checkpointing: bool = False,
        cache_features: bool = False,
        packing: bool = False,
        bucket: int = 16,
        workers: int = 0,
        log_every: int = 10,
        eval_every: int | None = None,
        eval_limit: int | None = 512,
        save_every: int = 200,
        keep: int | None = 2,
        tensorboard: bool = False,
    ) -> None:
        self.max_steps, self.batch_size, self.accumulate = max_steps, batch_size, accumulate
        self.eval_batch_size, self.weight_decay, self.clip = eval_batch_size, weight_decay, clip
        self.betas = [0.9, 0.99] if betas is None else betas
        self.precision, self.device, self.strategy, self.timeout = precision, device, strategy, timeout
        self.gradient_checkpointing, self.cache_features = gradient_checkpointing, cache_features
        self.packing, self.bucket, self.workers = packing, bucket, workers
        self.log_every, self.eval_every, self.eval_limit = log_every, eval_every, eval_limit
        self.save_every, self.keep, self.tensorboard = save_every, keep, tensorboard
        self._validate()

    def _validate(self) -> None:
        for name, choices in (("precision", PRECISIONS), ("strategy", STRATEGIES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} cannot be '{getattr(self, name)}'{hint(getattr(self, name), choices)}")
        at_least_one = (
            "max_steps batch_size accumulate eval_batch_size bucket log_every eval_every eval_limit save_every keep"
        )
        for name in at_least_one.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        for name in ("workers", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("clip", "timeout"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are two numbers in [0, 1), got {self.betas}")

    def prepare(self, model: MultimodalModel, world: World) -> tuple[nn.Module, TrainState]:
        """Put a model on its device, wrap it for its processes and make its optimizer.

        Raises:
            ConfigError: nothing is trainable, or ``packing`` with a backbone that mixes up packed samples.
        """
        if not learns(model):
            self.refuse_nothing_to_train()
        if self.packing:
            require_packable(model.backbone)
        if self.gradient_checkpointing:
            model.checkpoint_activations()
        wrapped = distributed.wrap(model.train(), world, self.strategy)
        groups = parameter_groups(model, self.weight_decay)
        betas, fused = (self.betas[0], self.betas[1]), self.strategy == "ddp" or world.size == 1
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=fused)
        return wrapped, TrainState(model, optimizer, self.max_steps, world, clip=self.clip)

    def refuse_nothing_to_train(self) -> NoReturn:
        """Say that no part learns."""
        raise ConfigError(
            "nothing is trainable: every part's tuning is frozen; choose another, such as tuning=projector_only"
        )

    def fit(
        self,
        wrapped: nn.Module,
        state: TrainState,
        schedule: Schedule,
        batches: Iterator[Batch],
        on_step: Callable[[TrainState, dict[str, Tensor]], None],
    ) -> None:
        """Train from ``state.step`` to ``max_steps``, or to the end of the step in which ``state.notice`` tells any process.

        ``on_step`` is told of each step: ``loss_sum`` of this process, ``num_labels`` of all, and ``grad_norm``.

        Raises:
            TrainingError: a step without labels, a trainable tensor without gradient in the first step, or a loss or
                gradient norm that is not finite.
        """
        first, parameters = state.step, [p for p in state.model.parameters() if p.requires_grad]
        watching: list[Stepping] = [*state.model.stepping().values(), schedule]
        while state.step < self.max_steps and not state.ending:
            state.batches = [next(batches) for _ in range(self.accumulate)]
            state.num_labels = self._count_labels(state)
            losses = torch.stack([self.backward(wrapped, state, i) for i in range(self.accumulate)])
            if state.step == first:
                require_gradients(state.model)
            for one in watching:
                one.before_step(state)
            norm = distributed.whole(nn.utils.clip_grad_norm_(parameters, self.clip or float("inf")))
            self._agree(state, losses, norm)
            state.optimizer.step()
            for one in watching:
                one.after_step(state)
            state.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            on_step(state, {"loss_sum": losses.double().sum(), "num_labels": state.num_labels, "grad_norm": norm})

    def backward(self, wrapped: nn.Module, state: TrainState, i: int) -> Tensor:
        """Gradients of the i-th batch of the step; its loss sum, detached.

        The loss is divided by the labels of the whole step and multiplied by the number of processes, because wrappers
        average gradients over processes: accumulation and data parallelism are exact.
        """
        with distributed.unsynced(wrapped, last=i == len(state.batches) - 1):
            with self.autocast(state.world):
                output = wrapped(state.batches[i].to(state.world.device))
            (output.loss_sum * (state.world.size / state.num_labels)).backward()
        return output.loss_sum.detach()

    def autocast(self, world: World) -> AbstractContextManager[Any]:
        """The precision's context."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(world.device.type, PRECISIONS[self.precision])

    def _count_labels(self, state: TrainState) -> Tensor:
        """[] labels of the step over all batches and processes, on the device."""
        here = torch.stack(
            [batch.num_labels for batch in state.batches]
        ).sum()  # batches are still on the CPU: no waiting
        everywhere = distributed.total(here, state.world)
        if int(everywhere) == 0:
            raise TrainingError(
                f"step {state.step + 1}: no label token in the samples {_shortened(_ids(state.batches))}; raise data.max_length or look at them"
            )
        return everywhere.to(state.world.device, non_blocking=True)

    def _agree(self, state: TrainState, losses: Tensor, norm: Tensor) -> None:
        """Let all processes know whether the step is sound, and whether it is the last one.

        The one place of a step that waits for the device: no weight may change if this fails.
        """
        bad = ~torch.isfinite(losses.sum() + norm)
        told = bad.new_tensor(state.notice() != 0)
        unsound, announced = distributed.total(torch.stack([bad, told]).int(), state.world).tolist()
        state.ending = (state.notice() or signal.SIGTERM) if announced else 0
        if unsound:
            culprits = [b for b, loss in zip(state.batches, losses.tolist(), strict=True) if not math.isfinite(loss)]
            everywhere = [name for here in distributed.gather(_ids(culprits), state.world) for name in here]
            loss_sum = float(distributed.total(losses.sum(), state.world))
            raise TrainingError(
                f"step {state.step + 1}: the loss sum is {loss_sum} and the gradient norm {float(norm)}; no weight was changed; "
                f"lower the learning rate or look at the samples {_shortened(everywhere or _ids(state.batches))}"
            )


def parameter_groups(model: MultimodalModel, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: for each part one with weight decay (matrices) and one without.

    ``part`` is the part's name, ``name`` the one that rates go by: both projectors share theirs.
    """
    groups: list[dict[str, Any]] = []
    seen: set[int] = set()  # what two parts share learns once, with the first
    for part, module in model.parts().items():
        trainable = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen |= set(map(id, trainable))
        for matrices, decay in ((True, weight_decay), (False, 0.0)):
            params = [p for p in trainable if (p.ndim >= 2) == matrices]
            if params:
                name = "projector" if part.endswith("projector") else part
                groups.append({"name": name, "part": part, "params": params, "weight_decay": decay})
    return groups


def require_gradients(model: nn.Module) -> None:
    """Refuse trainable tensors that no gradient reaches.

    Raises:
        TrainingError: names them.
    """
    dead = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if dead:
        raise TrainingError(
            f"{len(dead)} trainable tensors got no gradient in the first step: {_shortened(dead)}; "
            "freeze them, or repair the part that does not use them"
        )


def _ids(batches: Iterable[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.ids]


def _shortened(words: list[str]) -> str:
    return ", ".join(words[:8]) + (f", ... ({len(words)} in all)" if len(words) > 8 else "")
