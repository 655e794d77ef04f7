"""What the tests of counterfactual measures share: models whose use of each input is planted, and runs of the metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from toys import Colours, tree

from mllm_factory import IGNORE_INDEX, Batch, Message, Metric, MultimodalModel, Output, Sample, build
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.components.metrics.interventions import question
from mllm_factory.data import Collator
from mllm_factory.evaluator import evaluate

MEL = {"name": "mel_conv", "seconds": 0.5, "mels": 20, "dim": 12, "stride": 7}


def metric(**options: Any) -> Any:
    return build(Metric, {"name": "counterfactual", "resamples": 200, **options}, "metrics.m")


def made(audio: bool = False, loud: float = 8.0) -> tuple[MultimodalModel, Collator]:
    """A random model whose weights are large enough that answers depend on their input."""
    node = tree(audio=MEL, tuning__audio={"name": "frozen"}) if audio else tree()
    model = build_model(node).eval()
    for parameter in [*model.backbone.parameters(), *model.projectors.parameters()]:
        parameter.data.mul_(loud if parameter.ndim > 1 else 1.0)
    return model, build_collator(node, model)


def silence(model: MultimodalModel, name: str) -> MultimodalModel:
    """Whatever an item holds, its features are 0."""
    for parameter in model.projectors[name].parameters():
        parameter.data.zero_()
    return model


def run(model: MultimodalModel, collator: Collator, samples: Any, size: int = 8, **options: Any) -> dict[str, float]:
    """The metric over samples, in batches of the evaluator."""
    return run_with(metric(**options), model, collator, samples, size)


def run_with(found: Metric, model: MultimodalModel, collator: Collator, samples: Any, size: int) -> dict[str, float]:
    given = {"batch_size": size, "device": torch.device("cpu"), "autocast": nullcontext()}
    return evaluate(model.eval(), samples, collator, {"m": found}, **given)


def on(model: MultimodalModel, collator: Collator, batches: Sequence[Sequence[Sample]], **options: Any) -> Any:
    """The metric after these batches."""
    found = metric(**options)
    with torch.no_grad():
        for samples in batches:
            batch = collator(samples)
            found.update(model, batch, model(batch, logits=True))
    return found


# ---------------------------------------------------------------- planted rules

Rule = Callable[[int | None, int | None], str]
"""(what the picture says, what the question says) -> answer of one character; None where nothing is said."""


class Planted(MultimodalModel):
    """Answers by a rule from bits that it reads off the picture's red and green, and off the question's first character."""

    rule: Rule

    def features(self, name: str, items: Tensor) -> Tensor:
        """[n, 1, 3]: the mean colour."""
        return items.flatten(2).mean(2)[:, None]

    def forward(self, batch: Batch, logits: bool = False, features: Mapping[str, Tensor] | None = None) -> Output:
        """Log-odds of 10 for what the rule says."""
        given = dict(features or {}).get("vision", self.features("vision", batch.media["vision"]))
        words, keep = question(batch), batch.labels[:, 1:] != IGNORE_INDEX
        table = torch.zeros(int(keep.sum()), len(self.backbone.tokenizer))
        row = keep.nonzero()[:, 0]
        for i in range(len(batch.ids)):
            said = self.rule(_seen(given, batch.media_row["vision"], i), self._asked(batch.input_ids[i][words[i]]))
            places = (row == i).nonzero()[:, 0]
            end = int(batch.labels[i][batch.labels[i] != IGNORE_INDEX][-1])
            table[places[0], self.backbone.tokenizer(said)["input_ids"][0]] = 10.0
            table[places[1:], end] = 10.0
        targets = batch.labels[:, 1:][keep]
        loss = torch.nn.functional.cross_entropy(table, targets, reduction="sum")
        return Output(loss, keep.sum(), table if logits else None)

    def _asked(self, ids: Tensor) -> int | None:
        first = self.backbone.tokenizer.decode(ids.tolist()).strip()[:1]
        return int(first) if first.isdigit() else None


def _seen(features: Tensor, rows: Tensor, i: int) -> int | None:
    """0 for a red picture, 1 for a green one, None for neither."""
    if not bool((rows == i).any()):
        return None
    red, green = (float(x) for x in features[rows == i][0, 0, :2])
    return None if red == green else int(green > red)


def planted(rule: Rule) -> tuple[Planted, Collator]:
    model, collator = made()
    new = Planted(model.backbone, dict(model.encoders.items()), dict(model.projectors.items())).eval()
    new.rule = rule
    return new, collator


def picture(bit: int, number: int) -> Image.Image:
    """Red for 0, green for 1; no two numbers show the same."""
    return Image.new("RGB", (8, 8), (255 - number, 10, 0) if bit == 0 else (10, 255 - number, 0))


def bits(answer: Callable[[int, int], str], n: int = 16, ones: int = 2) -> list[Sample]:
    """Samples of every combination of a picture's and a question's bit; ``ones`` of four pictures show a 1."""
    result = []
    for i in range(n):
        v, q = int(i % 4 < ones), (i // 4) % 2
        messages = (Message("user", f"<image>{q} what?"), Message("assistant", answer(v, q)))
        result.append(Sample(f"bits {i}", messages, {"vision": (picture(v, i),)}))
    return result


class Both(Colours):
    """A picture and a sound in each sample."""

    def __init__(self, n: int = 8) -> None:
        super().__init__(n)
        self.modalities = frozenset({"vision", "audio"})

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        generator = torch.Generator().manual_seed(index)
        sound = (0.1 * torch.randn(1, 8000, generator=generator), 16000)
        messages = (Message("user", "<image><audio>" + "which? " * (1 + index % 3)), sample.messages[-1])
        return Sample(f"both {index}", messages, {**sample.media, "audio": (sound,)})
