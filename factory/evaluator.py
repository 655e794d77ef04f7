"""One pass over a data set for all metrics at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch

from mllm_factory.data import Collator
from mllm_factory.errors import ConfigError
from mllm_factory.interfaces import Metric, Source
from mllm_factory.loader import eval_batches
from mllm_factory.model import MultimodalModel
from mllm_factory.types import Output, Sample


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
    """Feed every metric; the model's mode and the random state are as before afterwards.

    Answers are generated once, as long as the longest that a metric asks for. Samples come in an order mixed by ``seed``, so
    that neighbours in a batch are strangers. Too long samples are left out and counted as ``refused``.

    Args:
        limit: evaluate so many samples only; None: all.
        on_batch: told the number of samples after each batch.

    Returns:
        Flat keys to numbers: every metric's, ``samples`` and ``refused``.

    Raises:
        ConfigError: two metrics report the same key.
    """
    generating = [m for m in metrics.values() if m.max_new_tokens > 0]
    forced = [m for m in metrics.values() if m.teacher_forced]
    longest = max((m.max_new_tokens for m in generating), default=0)
    training, samples, refused = model.training, 0, 0
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(), autocast:
        for prompts, whole in eval_batches(
            source,
            _Both(collator, bool(generating), bool(forced)),
            batch_size=batch_size,
            seed=seed,
            limit=limit,
            length=lambda i: collator.length(source[i]),
            workers=workers,
            pin=device.type == "cuda",
        ):
            if prompts is not None and prompts.ids:
                batch = prompts.to(device)
                output = Output(texts=model.generate(batch, longest))
                for metric in generating:
                    metric.update(model, batch, output)
            if whole is not None:
                batch = whole.to(device)
                output = model(batch, logits=True)
                for metric in forced:
                    metric.update(model, batch, output)
            seen = prompts if prompts is not None else whole
            samples += len(seen.ids) if seen is not None else 0
            refused += seen.refused if seen is not None else 0
            on_batch(len(seen.ids) if seen is not None else 0)
    model.train(training)
    return {**_merged(metrics), "samples": float(samples), "refused": float(refused)}


class _Both:
    """Collate samples as prompts, as whole conversations, or both, in a loader worker."""

    def __init__(self, collator: Collator, prompts: bool, whole: bool) -> None:
        self.collator, self.prompts, self.whole = collator, prompts, whole or not prompts

    def __call__(self, samples: list[Sample]):  # type: ignore[no-untyped-def] - a pair of batches or Nones
        return (
            self.collator.prompts(samples) if self.prompts else None,
            self.collator(samples) if self.whole else None,
        )


def _merged(metrics: Mapping[str, Metric]) -> dict[str, float]:
    result: dict[str, float] = {}
    for label, metric in metrics.items():
        for key, value in metric.compute().items():
            if key in result:
                raise ConfigError(f"metrics.{label}: the key '{key}' is reported twice; remove one of the metrics")
            result[key] = value
    return result
