"""One pass over a data set for all metrics at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from mllm_factory import distributed, randomness
from mllm_factory.assemble import length_of
from mllm_factory.data import Collator
from mllm_factory.errors import ConfigError
from mllm_factory.interfaces import Metric, Source
from mllm_factory.loader import eval_batches
from mllm_factory.model import MultimodalModel
from mllm_factory.types import Batch, Output, Sample


def evaluate(
    model: MultimodalModel,
    source: Source,
    collator: Collator,
    metrics: Mapping[str, Metric],
    *,
    batch_size: int,
    device: torch.device,
    autocast: AbstractContextManager[None],
    limit: int | None = None,
    workers: int = 0,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:
    """Feed every metric; the model's mode and the random generators are as before afterwards.

    Answers are generated once, as long as the longest that a metric asks for. Samples come in an order mixed by ``seed``, so
    that neighbours in a batch are strangers. Too long samples are left out and counted as ``refused``.

    Args:
        limit: evaluate so many samples only; None: all.
        on_batch: told the number of samples after each batch.

    Returns:
        Flat keys to numbers: every metric's, ``samples`` and ``refused``.

    Raises:
        ConfigError: a metric asks for nothing, two report the same key, or one reports something else than a number.
    """
    _require_wishes(metrics)
    generating = [metric for metric in metrics.values() if metric.max_new_tokens > 0]
    forced = [metric for metric in metrics.values() if metric.teacher_forced]
    longest = max((metric.max_new_tokens for metric in generating), default=0)
    batches = eval_batches(
        source,
        _Collate(collator, bool(generating), bool(forced)),
        batch_size=batch_size,
        seed=seed,
        limit=limit,
        length=length_of(source, collator),
        workers=workers,
        pin=device.type == "cuda",
    )
    training, samples, refused = model.training, 0, 0
    model.eval()
    with torch.no_grad(), randomness.untouched(device), autocast:
        for batch, given in batches:
            if "prompts" in batch and batch["prompts"].ids:
                prompts = batch["prompts"].to(device)
                _feed(generating, model, prompts, Output(texts=model.generate(prompts, longest)))
            if "whole" in batch:
                whole = batch["whole"].to(device)
                _feed(forced, model, whole, model(whole, logits=True))
            left_out = next(iter(batch.values())).refused
            samples, refused = samples + given - left_out, refused + left_out
            on_batch(given)
    distributed.reshard(model)
    model.train(training)
    return {**_merged(metrics), "samples": float(samples), "refused": float(refused)}


def _require_wishes(metrics: Mapping[str, Metric]) -> None:
    for label, metric in metrics.items():
        if metric.max_new_tokens < 1 and not metric.teacher_forced:
            raise ConfigError(
                f"metrics.{label}: {type(metric).__name__} asks for nothing; set max_new_tokens or teacher_forced in the class"
            )


def _feed(metrics: Sequence[Metric], model: MultimodalModel, batch: Batch, output: Output) -> None:
    for metric in metrics:
        metric.update(model, batch, output)


class _Collate:
    """Samples as prompts, as whole conversations, or both, and their number; in a loader worker."""

    def __init__(self, collator: Collator, prompts: bool, whole: bool) -> None:
        self.collates: dict[str, Callable[[Sequence[Sample]], Batch]] = {}
        if prompts:
            self.collates["prompts"] = collator.prompts
        if whole:
            self.collates["whole"] = collator

    def __call__(self, samples: Sequence[Sample]) -> tuple[dict[str, Batch], int]:
        return {name: collate(samples) for name, collate in self.collates.items()}, len(samples)


def _merged(metrics: Mapping[str, Metric]) -> dict[str, float]:
    result: dict[str, float] = {}
    for label, metric in metrics.items():
        for key, value in metric.compute().items():
            if key in result:
                raise ConfigError(f"metrics.{label}: the key '{key}' is reported twice; remove one of the metrics")
            try:
                result[key] = float(value)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"metrics.{label}: '{key}' is {value!r}, but a metric reports numbers") from error
    return result
