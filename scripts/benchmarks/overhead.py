"""Our composite against the same model written by hand: what the abstractions cost in a train step and a forward pass.

Steps of both sides alternate in one process, and several processes share the pairs: `Trainer.fit` calls back after each of
its steps, and the other side takes one.
"""

from __future__ import annotations

import gc
import random
import string
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Result, compare
from benchmarks.plain import Plain
from mllm_factory import VISION, Batch, Message, MultimodalModel, Sample, build
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.distributed import World
from mllm_factory.interfaces import Schedule
from mllm_factory.trainer import Trainer, TrainState

LR = 1e-3
SIZES: dict[str, dict[str, Any]] = {
    "10M": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    "0.3M": {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
}
MARKS = {"10M": 1.03, "0.3M": 1.10}
BATCH = {"10M": 8, "0.3M": 32}
RUNS = {"10M": 60, "0.3M": 120}
PROCESSES = 6
SAME = 1e-6


def tree(sizes: dict[str, Any]) -> dict[str, Any]:
    """The tree of a small frozen vision transformer, a two-layer MLP and a Llama with a byte vocabulary."""
    return {
        "seed": 0,
        "vision": {"name": "timm", "architecture": "test_vit", "image_size": 96},
        "projector": {"name": "mlp", "depth": 2},
        "backbone": {"name": "hf", "architecture": "llama", "sizes": sizes, "tokenizer": "bytes"},
        "tuning": {"vision": {"name": "frozen"}, "projector": {"name": "full"}, "backbone": {"name": "full"}},
        "data": {"max_length": 512},
    }


def samples(n: int) -> list[Sample]:
    """Pictures of noise with questions of 20 to 40 letters and answers of 4 to 12."""
    from PIL import Image

    draw = random.Random(0)
    made = []
    for i in range(n):
        question, answer = (
            "".join(draw.choices(string.ascii_lowercase, k=draw.randint(*r))) for r in ((20, 40), (4, 12))
        )
        picture = Image.frombytes("RGB", (96, 96), draw.randbytes(96 * 96 * 3))
        messages = (Message("user", f"<image>{question}"), Message("assistant", answer))
        made.append(Sample(str(i), messages, {"vision": (picture,)}))
    return made


NAMES = {
    "encoders.vision.": "encoder.",
    "projectors.vision.layers.": "projector.",
    "backbone.model.model.": "",
    "backbone.model.": "",
}
"""Beginnings of our weights' names, and what the hand-written model calls them; the first that fits counts."""


def by_hand(ours: MultimodalModel, sizes: dict[str, Any]) -> Plain:
    """The hand-written model with our weights."""
    encoder = ours.encoders["vision"]
    plain = Plain(
        encoder=encoder,
        features=encoder.dim,
        vocabulary=len(ours.backbone.tokenizer),
        dim=sizes["hidden_size"],
        hidden=sizes["intermediate_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        kv_heads=sizes["num_key_value_heads"],
        positions=sizes["max_position_embeddings"],
    )
    weights = {}
    for name, tensor in ours.state_dict().items():
        start = next(start for start in NAMES if name.startswith(start))
        weights[NAMES[start] + name.removeprefix(start)] = tensor.clone()
    plain.load_state_dict(weights)
    return plain


def plain_stepper(model: Plain, batch: Batch) -> Callable[[], torch.Tensor]:
    """A train step as one writes it in a script; gives the mean loss."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99), fused=True)
    given = plain_batch(batch)

    def step() -> torch.Tensor:
        loss_sum, n = model(*given)
        loss = loss_sum / n
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def plain_batch(batch: Batch) -> tuple[torch.Tensor, ...]:
    """The same tensors as the hand-written model takes them."""
    return batch.input_ids, batch.labels, batch.modality == VISION, batch.media["vision"]


class Clock:
    """Wall and CPU milliseconds since the last look."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again."""
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def look(self) -> tuple[float, float]:
        """Milliseconds since the last reset or look."""
        wall, cpu = time.perf_counter(), time.process_time()
        spent = (wall - self.wall) * 1e3, (cpu - self.cpu) * 1e3
        self.wall, self.cpu = wall, cpu
        return spent


Times = list[tuple[float, float]]


def alternate_steps(ours: MultimodalModel, other: Callable[[], Any], batch: Batch, runs: int) -> tuple[Any, ...]:
    """Times of our steps and of the other side's, and both sides' losses, step by step. The first two steps warm up."""
    trainer = Trainer(max_steps=runs + 2, device="cpu")
    wrapped, state = trainer.prepare(ours, World(0, 1, torch.device("cpu")))
    schedule = build(Schedule, {"name": "constant", "lr": LR}, "schedule")
    clock, ours_times, other_times, losses = Clock(), [], [], []

    def on_step(state: TrainState, facts: dict[str, Any]) -> None:
        mine = clock.look()
        loss = other()
        theirs = clock.look()
        if state.step > 2:
            ours_times.append(mine)
            other_times.append(theirs)
        losses.append((float(facts["loss_sum"] / facts["num_labels"]), float(loss)))
        clock.reset()

    trainer.fit(wrapped, state, schedule, repeat(batch), on_step)
    return ours_times, other_times, losses


@torch.no_grad()
def alternate_forwards(ours: Callable[[], Any], other: Callable[[], Any], runs: int) -> tuple[Times, Times]:
    """Times of both sides' forward passes, in pairs of changing order; the first two warm up."""
    clock = Clock()
    times: tuple[Times, Times] = ([], [])
    for i in range(runs + 2):
        pair = [(ours, times[0]), (other, times[1])]
        for call, into in pair if i % 2 else reversed(pair):
            clock.reset()
            call()
            spent = clock.look()
            if i >= 2:
                into.append(spent)
    return times


def run(runs: int | None, small: bool) -> Result:
    """Both sizes: forward and step. ``small``: a tiny batch, only the small size, one process."""
    result = Result("overhead", "the same model in plain PyTorch")
    for name in SIZES:
        if small and name != "0.3M":
            continue
        _case(result, name, runs or RUNS[name], 2 if small else BATCH[name], 1 if small else PROCESSES)
    return result


def _case(result: Result, name: str, runs: int, batch_size: int, processes: int) -> None:
    """One size, its pairs shared by several processes: where weights happen to lie in memory alone makes some per cent."""
    share = max(1, runs // processes)
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        found = [pool.submit(measure, name, share, batch_size).result() for _ in range(processes)]
    for what in ("step", "forward"):
        ours, other = ([pair for one in found for pair in one[what][side]] for side in (0, 1))
        for unit, i in (("ms", 0), ("CPU ms", 1)):
            mark = None if i else MARKS[name]
            row = compare(f"{name} {what}", unit, [t[i] for t in ours], [t[i] for t in other], "<=", mark)
            result.rows.append(row)
    result.facts[f"{name} trainable"], result.facts[f"{name} batch"] = found[0]["trainable"], found[0]["batch"]
    result.facts[f"{name} pairs"] = f"{share} in each of {processes} processes"
    ours, other = found[0]["losses"][0]
    gap = max(abs(a - b) / abs(b) for a, b in (one["losses"][0] for one in found))
    result.facts[f"{name} loss"] = {"ours": ours, "other": other, "difference": gap}
    result.checks[f"{name} losses equal to {SAME:g}"] = gap <= SAME


def measure(name: str, runs: int, batch_size: int) -> dict[str, Any]:
    """One process: times of steps and forwards of both sides, the losses of their steps, and what was trained."""
    torch.manual_seed(0)
    node = tree(SIZES[name])
    ours = build_model(node)
    batch = build_collator(node, ours)(samples(batch_size))
    plain = by_hand(ours, SIZES[name])
    ours.train(), plain.train()
    ours.encoders.eval()  # the encoder is shared, and frozen on both sides
    given = plain_batch(batch)
    gc.collect()
    gc.freeze()  # else a collection of what stands around would fall on one side or the other
    forwards = alternate_forwards(lambda: ours(batch), lambda: plain(*given), runs)
    *steps, losses = alternate_steps(ours, plain_stepper(plain, batch), batch, runs)
    trainable = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    shape = list(batch.input_ids.shape)
    return {"forward": forwards, "step": steps, "losses": losses, "trainable": trainable, "batch": shape}
