"""A train step of ours against transformers' ``LlavaForConditionalGeneration`` in its ``Trainer``: time and memory.

Same sizes, same samples of mixed lengths, same optimizer, fp32. Each side trains in a process of its own, in turns.
Theirs gets its samples tokenised and decoded beforehand; ours does both in its collator, as it always does.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Result, compare
from benchmarks.sides import Report, Side, Turns

LR = 1e-4
FASTER = {"everything": 3.5, "projector": 4.5}
MEMORY = 0.4
SAME = 1e-5
WARM_UP = 2


def train_ours(turns: Turns, sizes: Any, tokenizer: str, mode: str, seed: int) -> None:
    """Our side: `Trainer.fit` on length-bucketed batches."""
    import torch

    from benchmarks.llava import conversations, our_model
    from mllm_factory import build
    from mllm_factory.distributed import World
    from mllm_factory.interfaces import Schedule
    from mllm_factory.loader import Order, train_batches
    from mllm_factory.trainer import Trainer

    source = conversations(sizes)
    model, collator = our_model(sizes, Path(tokenizer), mode)
    trainer = Trainer(max_steps=10**9, batch_size=sizes.batch, device="cpu", bucket=16)
    order = Order(len(source), trainer.batch_size, seed, lambda i: collator.length(source[i]), trainer.bucket)
    batches = train_batches(source, collator, order, first=0, world=1, rank=0, workers=0, pin=False)
    schedule = build(Schedule, {"name": "constant", "lr": LR}, "schedule")
    turns.begin()
    wrapped, state = trainer.prepare(model, World(0, 1, torch.device("cpu")))

    def on_step(state: Any, facts: Any) -> None:
        masks = [batch.attention_mask for batch in state.batches]
        turns.step(tokens=sum(int(m.sum()) for m in masks), padded=sum(m.numel() for m in masks))

    trainer.fit(wrapped, state, schedule, batches, on_step)


def train_theirs(turns: Turns, sizes: Any, tokenizer: str, mode: str, seed: int) -> None:
    """The other side: transformers' Trainer with its own sampler and a padding collator."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from benchmarks.llava import conversations, our_model, their_collator, their_model, their_sample

    _, collator = our_model(sizes, Path(tokenizer), mode)
    rows = [their_sample(collator([sample]), sizes.vocabulary - 1) for sample in conversations(sizes).samples]
    del collator, _
    torch.manual_seed(seed)
    model = their_model(sizes, mode)
    pad = their_collator(sizes.vocabulary - 2)
    masks: list[torch.Tensor] = []

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = pad(rows)
        masks.append(batch["attention_mask"])
        return batch

    class Turning(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            mask = masks.pop(0)  # the loader collates ahead of the step
            turns.step(tokens=int(mask.sum()), padded=mask.numel())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=10**6,
            per_device_train_batch_size=sizes.batch,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
            seed=seed,
            dataloader_drop_last=True,
        )
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[Turning()])
        turns.begin()
        trainer.train()


def losses(sizes: Any, tokenizer: Path, mode: str) -> dict[str, float]:
    """Mean loss and gradient norm of both sides for the same weights and the same batch, and the largest relative gap."""
    import torch

    from benchmarks.llava import conversations, copy_weights, our_model, their_collator, their_model, their_sample

    ours, collator = our_model(sizes, tokenizer, mode)
    theirs = their_model(sizes, mode)
    copy_weights(ours, theirs)
    samples = conversations(sizes).samples[: sizes.batch]
    rows = [their_sample(collator([sample]), sizes.vocabulary - 1) for sample in samples]
    output = ours.train()(collator(samples))
    mine = output.loss_sum / output.num_labels
    other = theirs.train()(**their_collator(sizes.vocabulary - 2)(rows)).loss
    found: dict[str, float] = {}
    for name, model, loss in (("ours", ours, mine), ("other", theirs, other)):
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        found |= {f"{name} loss": loss.item(), f"{name} gradient norm": norm.item()}
    gaps = [abs(found[f"ours {k}"] / found[f"other {k}"] - 1) for k in ("loss", "gradient norm")]
    return {**found, "difference": max(gaps)}


def data_facts(sizes: Any, tokenizer: Path) -> dict[str, Any]:
    """What the samples are like."""
    from benchmarks.llava import conversations, our_model

    source = conversations(sizes)
    _, collator = our_model(sizes, tokenizer, "projector")
    lengths = sorted(collator.length(sample) for sample in source.samples)
    labels = sum(int(collator([sample]).num_labels) for sample in source.samples)
    return {
        "samples": len(source),
        "tokens": {"mean": sum(lengths) / len(lengths), "low": lengths[0], "high": lengths[-1]},
        "answers' share": labels / sum(lengths),
    }


def run(runs: int | None, small: bool) -> Result:
    """Both modes. A run is a turn of 16 steps (a bucketing window) of each side; three pairs of processes share the runs."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from benchmarks.llava import MODES, SMALL, Sizes

    sizes = SMALL if small else Sizes()
    runs = runs or 3
    pairs = min(3, runs)
    result = Result("step", "transformers' LLaVA with its Trainer")
    with tempfile.TemporaryDirectory() as folder:
        from benchmarks.llava import write_tokenizer

        write_tokenizer(Path(folder), sizes)
        result.facts |= data_facts(sizes, Path(folder))
        for mode in MODES:
            found = losses(sizes, Path(folder), mode)
            result.facts[f"{mode}: same weights and batch"] = found
            result.checks[f"{mode}: losses equal to {SAME:g}"] = found["difference"] <= SAME
            steps = 2 if small else 16
            _measure(result, sizes, folder, mode, f"{mode} trained", pairs, runs, steps)
            _measure(result, replace(sizes, spread=0.0), folder, mode, f"{mode} trained, equal lengths", 1, 1, steps)
    return result


def _measure(
    result: Result, sizes: Any, tokenizer: str, mode: str, case: str, pairs: int, runs: int, steps: int
) -> None:
    times: tuple[list[Report], list[Report]] = ([], [])
    peaks: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        sides = [Side(train, sizes, tokenizer, mode, pair) for train in (train_ours, train_theirs)]
        for side in sides:
            side.turn(WARM_UP)
        for _ in range(max(1, runs // pairs)):
            for side, reports in zip(sides, times, strict=True):
                reports.append(side.turn(steps))
        for side, reports, peak in zip(sides, times, peaks, strict=True):
            peak.append(reports[-1]["extra"] / 1e6)
            side.close()
    ours, other = times

    def each(reports: list[Report], name: str, factor: float) -> list[float]:
        return [report[name] * factor for report in reports]

    marks = (FASTER[mode], MEMORY) if sizes.spread else (None, None)
    for unit, name, mark in (("ms a step", "seconds", marks[0]), ("CPU ms a step", "cpu", None)):
        result.rows.append(
            compare(case, unit, each(ours, name, 1e3 / steps), each(other, name, 1e3 / steps), ">=", mark)
        )
    useful = [[report["tokens"] / report["seconds"] for report in reports] for reports in times]
    result.rows.append(compare(case, "useful tokens/s", useful[0], useful[1]))
    result.rows.append(compare(case, "MB above idle", peaks[0], peaks[1], "<=", marks[1]))
    share = [sum(r["tokens"] for r in reports) / sum(r["padded"] for r in reports) for reports in times]
    result.facts[f"{case}: tokens that are not padding"] = {"ours": share[0], "other": share[1]}
