"""Metrics against numbers worked out by hand, and against brute force where there is chance."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toys import COLOURS, Colours, tree

from mllm_factory.assemble import build_collator, build_model
from mllm_factory.components.metrics.exact_match import normalise
from mllm_factory.components.metrics.interventions import derangement, identities, select
from mllm_factory.data import Collator
from mllm_factory.errors import ConfigError, DataError
from mllm_factory.interfaces import Metric
from mllm_factory.model import MultimodalModel
from mllm_factory.registry import build
from mllm_factory.types import IGNORE_INDEX, Batch, Output

NAMES = list(COLOURS)


def metric(**node: Any) -> Metric:
    return build(Metric, node, "metrics.m")  # type: ignore[type-abstract]


def made() -> tuple[MultimodalModel, Collator]:
    node = tree()
    model = build_model(node)
    return model.eval(), build_collator(node, model)


def prompts(collator: Collator, *numbers: int, **options: Any) -> Batch:
    source = Colours(1000, **options)
    return collator.prompts([source[i] for i in numbers])


# ---------------------------------------------------------------- exact_match and answer_loss


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("yes", "yes", True),
        ("Yes.", "yes", True),
        ("  YES \n", "yes", True),
        ("almost   white", "almost white", True),
        ("a .", "a", True),
        ("yes", "yes.", True),
        ("yes, it is", "yes", False),
        ("", "yes", False),
        ("yes!", "yes", False),
        ("1.5", "1.5", True),
        ("15", "1.5", False),
        ("e.g..", "e.g.", False),
        ("STRASSE", "strasse", True),
    ],
)
def test_exact_match_forgives_case_blanks_and_a_full_stop(text: str, reference: str, right: bool) -> None:
    _, collator = made()
    batch = replace(prompts(collator, 1), references=(reference,))
    score = metric(name="exact_match")
    score.update(None, batch, Output(texts=[text]))  # type: ignore[arg-type]
    assert score.compute() == {"exact_match": float(right)}
    assert (normalise(text) == normalise(reference)) == right


def test_exact_match_is_the_share_of_right_answers() -> None:
    _, collator = made()
    score = metric(name="exact_match", max_new_tokens=3)
    assert math.isnan(score.compute()["exact_match"]) and score.max_new_tokens == 3
    score.update(None, prompts(collator, 0, 1), Output(texts=["red", "red"]))  # type: ignore[arg-type]
    score.update(None, prompts(collator, 2), Output(texts=["Blue."]))  # type: ignore[arg-type]
    assert score.compute() == {"exact_match": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="zip"):
        score.update(None, prompts(collator, 0, 1), Output(texts=["red"]))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="sample 'colour 1' ends without an answer"):
        score.update(None, replace(prompts(collator, 1), references=("",)), Output(texts=["red"]))  # type: ignore[arg-type]


def test_answer_loss_is_the_mean_over_all_labels() -> None:
    model, collator = made()
    score, total, count = metric(name="answer_loss"), 0.0, 0
    assert score.teacher_forced and score.max_new_tokens == 0 and math.isnan(score.compute()["answer_loss"])
    for numbers in (range(5), range(5, 7)):
        batch = collator([Colours(9)[i] for i in numbers])
        with torch.no_grad():
            score.update(model, batch, model(batch, logits=True))
            logits = model.backbone.model(inputs_embeds=model.embed(batch)).logits.log_softmax(-1)
        for row, labels in enumerate(batch.labels):
            for t, label in enumerate(labels[1:]):
                if label != IGNORE_INDEX:
                    total, count = total - float(logits[row, t, label]), count + 1
    assert score.compute() == {"answer_loss": pytest.approx(total / count, rel=1e-6)}


# ---------------------------------------------------------------- the exchange


def test_a_derangement_exists_exactly_where_brute_force_finds_one() -> None:
    draw, found = random.Random(0), {True: 0, False: 0}
    for n in range(7):
        for kinds in range(1, 5):
            for _ in range(15):
                identity = [draw.randrange(kinds) for _ in range(n)]
                possible = n > 0 and any(
                    all(identity[i] != identity[j] for i, j in enumerate(order)) for order in permutations(range(n))
                )
                moved = derangement(torch.tensor(identity, dtype=torch.long), torch.Generator().manual_seed(n))
                assert (moved is not None) == possible, identity
                found[possible] += 1
    assert min(found.values()) > 50


def test_a_derangement_is_a_permutation_that_moves_each_to_a_stranger() -> None:
    generator, draw = torch.Generator().manual_seed(0), random.Random(1)
    for _ in range(500):
        n = draw.randrange(2, 40)
        identity = torch.tensor([draw.randrange(draw.randrange(1, 12)) for _ in range(n)])
        moved = derangement(identity, generator)
        if moved is None:
            assert identity.bincount().max() * 2 > n
        else:
            assert sorted(moved.tolist()) == list(range(n))
            assert not (identity[moved] == identity).any()


def test_every_stranger_has_a_chance() -> None:
    identity, generator = torch.tensor([0, 0, 1, 1, 2, 3, 4, 5]), torch.Generator().manual_seed(0)
    pairs = {pair for _ in range(400) for pair in enumerate(derangement(identity, generator).tolist())}
    assert pairs == {(i, j) for i in range(8) for j in range(8) if identity[i] != identity[j]}


def test_identities_join_what_shows_the_same_or_belongs_together() -> None:
    draw = random.Random(0)
    for _ in range(60):
        n = draw.randrange(1, 12)
        content = [draw.randrange(8) for _ in range(n)]
        row = sorted(draw.randrange(5) for _ in range(n))
        groups = [{i} for i in range(n)]  # brute force: merge until nothing touches
        for _ in range(n):
            for a in range(n):
                for b in range(n):
                    if content[a] == content[b] or row[a] == row[b]:
                        groups[a] |= groups[b]
                        groups[b] |= groups[a]
        items = torch.tensor(content).float().view(-1, 1, 1).expand(n, 2, 3)
        found = identities(items, torch.tensor(row)).tolist()
        assert all((found[a] == found[b]) == (b in groups[a]) for a in range(n) for b in range(n))


def test_selected_rows_are_those_of_a_batch_of_their_own() -> None:
    _, collator = made()
    options = {"text_every": 3, "pictures": 2}
    chosen, own = select(prompts(collator, *range(7), **options), [1, 3, 5]), prompts(collator, 1, 3, 5, **options)
    assert chosen.ids == own.ids and chosen.references == own.references
    assert torch.equal(chosen.media["vision"], own.media["vision"])
    assert torch.equal(chosen.media_row["vision"], own.media_row["vision"])
    width = own.input_ids.shape[1]
    for name in ("input_ids", "labels", "attention_mask", "modality", "role"):
        assert torch.equal(getattr(chosen, name)[:, -width:], getattr(own, name)), name


# ---------------------------------------------------------------- ablation


class Reader(MultimodalModel):
    """Answers with what it reads off each row's first picture, or with what it reads in the question."""

    looks = True
    table = dict(zip(NAMES, NAMES, strict=True))

    def generate(self, batch: Batch, max_new_tokens: int, use_cache: bool = True) -> list[str]:
        if not self.looks:
            return list(batch.references)
        texts = ["nothing"] * len(batch.ids)
        for row in sorted(set(batch.media_row["vision"].tolist())):
            item = batch.media["vision"][batch.media_row["vision"] == row][0]
            colour = tuple(round(float(channel.mean()) * 255) for channel in item)
            texts[row] = self.table[next(name for name, rgb in COLOURS.items() if rgb == colour)]
        return texts


def reader() -> tuple[Reader, Collator]:
    model, collator = made()
    return Reader(model.backbone, dict(model.encoders.items()), dict(model.projectors.items())).eval(), collator


def run(model: Reader, batches: list[Batch], seed: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """The full score and the ablated one."""
    score = metric(name="exact_match")
    ablation = metric(name="ablation", score={"name": "exact_match", "max_new_tokens": 5}, seed=seed)
    assert ablation.max_new_tokens == 5
    for batch in batches:
        output = Output(texts=model.generate(batch, 5))
        score.update(model, batch, output)
        ablation.update(model, batch, output)
    return score.compute(), ablation.compute()


def test_a_model_that_does_not_look_keeps_its_score() -> None:
    model, collator = reader()
    model.looks = False
    full, ablated = run(model, [prompts(collator, *range(8))])
    assert full["exact_match"] == ablated["ablation/vision/exact_match"] == 1.0
    assert [ablated[f"ablation/vision/exact_match/drop{end}"] for end in ("", "/low", "/high")] == [0.0] * 3


def test_what_a_half_looking_model_loses_has_an_interval_by_picture() -> None:
    """It mistakes green for red: with pictures of four colours, four clusters, the interval is as wide as they differ."""
    model, collator = reader()
    model.table = {**model.table, "green": "red"}
    full, ablated = run(model, [prompts(collator, *range(i, i + 8)) for i in (0, 8, 16)])
    assert full["exact_match"] == 0.75
    drop = [ablated[f"ablation/vision/exact_match/drop{end}"] for end in ("/low", "", "/high")]
    assert drop[1] == pytest.approx(full["exact_match"] - ablated["ablation/vision/exact_match"])
    assert drop[0] < drop[1] - 0.2 and drop[0] < drop[1] < drop[2] <= 1.0


def test_a_model_that_only_looks_loses_everything() -> None:
    model, collator = reader()
    full, ablated = run(model, [prompts(collator, *range(i, i + 8)) for i in (0, 8, 16)])
    assert full["exact_match"] == 1.0
    assert ablated == {
        "ablation/vision/exact_match": 0.0,
        "ablation/vision/exact_match/drop": 1.0,
        "ablation/vision/exact_match/drop/low": 1.0,
        "ablation/vision/exact_match/drop/high": 1.0,
        "ablation/vision/samples": 24.0,
        "ablation/vision/skipped": 0.0,
    }


def test_the_ablated_score_of_a_looking_model_is_chance() -> None:
    """Two answers for four colours: each is replaced by one of three others, of which one has the same answer."""
    model, collator = reader()
    model.table = {"red": "warm", "green": "warm", "blue": "cold", "almost white": "cold"}
    batch = prompts(collator, *range(8))
    batch = replace(batch, references=tuple(model.table[name] for name in batch.references))
    scores = [run(model, [batch] * 5, seed)[1]["ablation/vision/exact_match"] for seed in range(60)]
    assert sum(scores) / len(scores) == pytest.approx(1 / 3, abs=0.04)
    assert len(set(scores)) > 5
    assert run(model, [batch] * 5, 3)[1] == run(model, [batch] * 5, 3)[1], "the seed decides"


def test_pictures_of_a_sample_do_not_replace_each_other() -> None:
    model, collator = reader()
    batch = prompts(collator, 0, 2, pictures=2)  # red + green, blue + white
    _, ablated = run(model, [batch] * 20)
    assert ablated["ablation/vision/exact_match"] == 0.0 and ablated["ablation/vision/samples"] == 40.0
    _, ablated = run(model, [prompts(collator, 0, 1, 2, pictures=2)])  # a chain of shared colours: all belong together
    assert math.isnan(ablated["ablation/vision/exact_match"])
    assert ablated["ablation/vision/samples"] == 0.0 and ablated["ablation/vision/skipped"] == 3.0


def test_text_only_samples_do_not_enter() -> None:
    model, collator = reader()
    full, ablated = run(model, [prompts(collator, *range(9), text_every=3)])
    assert full["exact_match"] == pytest.approx(6 / 9)
    assert ablated["ablation/vision/samples"] == 6.0 and ablated["ablation/vision/exact_match"] == 0.0
    assert run(model, [prompts(collator, 0, 3, text_every=3)])[1] == {}


def test_batches_without_a_stranger_are_counted() -> None:
    model, collator = reader()
    mostly_red = prompts(collator, 0, 4, 8, 1)
    assert run(model, [mostly_red])[1]["ablation/vision/skipped"] == 4.0
    _, ablated = run(model, [mostly_red, prompts(collator, 0, 1, 2, 3)])
    assert ablated == {
        "ablation/vision/exact_match": 0.0,
        "ablation/vision/exact_match/drop": 1.0,
        "ablation/vision/exact_match/drop/low": 1.0,
        "ablation/vision/exact_match/drop/high": 1.0,
        "ablation/vision/samples": 4.0,
        "ablation/vision/skipped": 4.0,
    }


def test_the_real_model_sees_the_exchanged_pictures() -> None:
    """Ablation of the toy model equals generating from the samples with their pictures exchanged by hand."""
    model, collator = made()
    batch = prompts(collator, *range(4))
    ablation = metric(name="ablation", score={"name": "exact_match", "max_new_tokens": 3}, seed=5)
    said: list[list[str]] = []
    generate = model.generate
    model.generate = lambda *args: said.append(generate(*args)) or said[-1]  # type: ignore[method-assign,func-returns-value]
    ablation.update(model, batch, Output(texts=generate(batch, 3)))
    moved = derangement(torch.arange(4), torch.Generator().manual_seed(5))
    source = Colours(4)
    mixed = [replace(source[i], media=source[int(moved[i])].media) for i in range(4)]
    assert said == [generate(collator.prompts(mixed), 3)]


def test_a_score_that_does_not_generate_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a metric on generated answers"):
        metric(name="ablation", score={"name": "answer_loss"})


def test_cross_entropy_of_nothing_is_not_a_number() -> None:
    assert float(F.cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), reduction="sum")) == 0.0
