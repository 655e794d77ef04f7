"""A pass over a data set against a loop over single samples, and what it must leave alone."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from toys import Colours, tree

from mllm_factory.assemble import build_collator, build_metrics, build_model
from mllm_factory.components.metrics.exact_match import ExactMatch, normalise
from mllm_factory.errors import ConfigError, DataError
from mllm_factory.evaluator import evaluate
from mllm_factory.interfaces import Metric
from mllm_factory.model import MultimodalModel
from mllm_factory.types import Batch, Output

CPU = torch.device("cpu")
SCORES = {"exact_match": {"name": "exact_match", "max_new_tokens": 6}, "answer_loss": {"name": "answer_loss"}}


class Spy(Metric):
    """Keeps what it is given."""

    def __init__(self, max_new_tokens: int, teacher_forced: bool) -> None:
        self.max_new_tokens, self.teacher_forced = max_new_tokens, teacher_forced
        self.given: list[tuple[Batch, Output]] = []

    def update(self, model: MultimodalModel, batch: Batch, output: Output) -> None:
        assert not model.training and not torch.is_grad_enabled()
        random.random(), np.random.rand(), torch.rand(3)
        self.given.append((batch, output))

    def compute(self) -> dict[str, float]:
        return {}


class Says(Spy):
    """Reports something."""

    def __init__(self, said: Any) -> None:
        super().__init__(1, False)
        self.said = said

    def compute(self) -> dict[str, float]:
        return {"exact_match": self.said}


def run(metrics: dict[str, Metric], **options: Any) -> tuple[MultimodalModel, dict[str, float]]:
    node = tree(**options.pop("changes", {}))
    model = build_model(node).train()
    source = options.pop("source", Colours(10, text_every=4))
    given = {"batch_size": 3, "device": CPU, "autocast": nullcontext(), **options}
    return model, evaluate(model, source, build_collator(node, model), metrics, **given)


def test_scores_are_those_of_a_loop_over_single_samples() -> None:
    model, found = run(build_metrics({"metrics": SCORES}))
    node, source = tree(), Colours(10, text_every=4)
    collator, right, loss, labels = build_collator(node, model), 0, 0.0, 0
    model.eval()
    for i in range(10):
        right += normalise(model.generate(collator.prompts([source[i]]), 6)[0]) == source[i].reference
        with torch.no_grad():
            output = model(collator([source[i]]))
        loss, labels = loss + float(output.loss_sum), labels + int(output.num_labels)
    assert found == {
        "exact_match": right / 10,
        "answer_loss": pytest.approx(loss / labels, rel=1e-6),
        "samples": 10.0,
        "refused": 0.0,
    }


def test_loader_workers_and_batch_size_change_nothing() -> None:
    expected = run(build_metrics({"metrics": SCORES}))[1]
    for options in ({"workers": 2}, {"batch_size": 10}):
        assert run(build_metrics({"metrics": SCORES}), **options)[1] == pytest.approx(expected, rel=1e-6)


def test_metrics_get_what_they_ask_for() -> None:
    generating, forced, both = Spy(2, False), Spy(0, True), Spy(5, True)
    counted: list[int] = []
    _, found = run({"a": generating, "b": forced, "c": both}, on_batch=counted.append)
    assert sum(counted) == 10 == found["samples"]
    assert len(generating.given) == len(forced.given) == len(counted) == len(both.given) / 2
    for batch, output in generating.given:
        assert len(output.texts) == len(batch.ids) and output.loss_sum is None and not batch.num_labels
    for batch, output in forced.given:
        assert output.texts is None and len(output.logits) == batch.num_labels == output.num_labels > 0
    assert sorted(name for batch, _ in generating.given for name in batch.ids) == sorted(
        Colours(10, text_every=4)[i].id for i in range(10)
    )


def test_mode_and_random_generators_are_as_before() -> None:
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(2).tolist(), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    node = tree()
    model = build_model(node).train()
    collator = build_collator(node, model)
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    options: dict[str, Any] = {"batch_size": 3, "device": CPU, "autocast": nullcontext()}
    evaluate(model, Colours(6), collator, {"spy": Spy(1, True)}, **options)
    assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.batch is None and all(p.grad is None for p in model.parameters())


def test_a_limit_takes_a_mixture_that_the_seed_decides() -> None:
    def taken(seed: int) -> set[str]:
        spy = Spy(1, False)
        assert run({"spy": spy}, source=Colours(100), limit=12, seed=seed)[1]["samples"] == 12.0
        return {name for batch, _ in spy.given for name in batch.ids}

    assert taken(0) == taken(0) != taken(1)
    assert taken(0) != {Colours(100)[i].id for i in range(12)}


@pytest.mark.parametrize("teacher_forced", [False, True])
def test_samples_that_do_not_fit_are_counted_and_left_out(teacher_forced: bool) -> None:
    """Questions of one, two or three times the words."""
    spy = Spy(0 if teacher_forced else 1, teacher_forced)
    node = tree(data__max_length=45, data__overflow="refuse")
    model = build_model(node)
    collator, source = build_collator(node, model), Colours(12)
    long = sum(collator.length(source[i]) > 45 for i in range(12))
    assert 0 < long < 12
    _, found = run({"spy": spy}, source=source, changes={"data__max_length": 45, "data__overflow": "refuse"})
    assert found["samples"] + found["refused"] == 12 and found["refused"] >= 1
    _, found = run({"spy": spy}, source=source, changes={"data__max_length": 8, "data__overflow": "refuse"})
    assert found == {"samples": 0.0, "refused": 12.0}


def test_unusable_metrics_are_named() -> None:
    with pytest.raises(ConfigError, match=r"metrics\.lazy: Spy asks for nothing"):
        run({"lazy": Spy(0, False)})
    with pytest.raises(ConfigError, match=r"metrics\.other: the key 'exact_match' is reported twice"):
        run({"exact_match": ExactMatch(2), "other": Says(1.0)})
    with pytest.raises(ConfigError, match=r"metrics\.odd: 'exact_match' is 'good', but a metric reports numbers"):
        run({"odd": Says("good")})
    assert run({"tensor": Says(torch.tensor(0.5))})[1]["exact_match"] == 0.5


def test_errors_of_data_come_through_workers_in_one_line() -> None:
    from toys import FailsLate

    for workers in (0, 2):
        with pytest.raises(DataError, match="sample number 9 cannot be read: OSError: sample 9 is broken"):
            run({"spy": Spy(1, False)}, source=FailsLate(12), workers=workers)


def test_bf16_evaluates() -> None:
    _, found = run(build_metrics({"metrics": SCORES}), autocast=torch.autocast("cpu", torch.bfloat16))
    assert found["answer_loss"] == pytest.approx(run(build_metrics({"metrics": SCORES}))[1]["answer_loss"], rel=0.02)
