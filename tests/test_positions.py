"""Which positions are steered: every selection against brute force, and on batches against the map."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from steered import built, samples

from mllm_factory import AUDIO, IGNORE_INDEX, TEXT, VISION, Batch, Message, Sample
from mllm_factory.components.tuning.positions import Positions, evenly, parse
from mllm_factory.types import ASSISTANT, PAD, SYSTEM, USER


def pick(text: str, count: int, seed: int = 0) -> list[int]:
    selection = parse(text, seed)
    return selection.pick(count, selection.share(False)).tolist()


def test_a15_both_ends_of_728_tokens() -> None:
    assert pick("f4+l5", 728) == [0, 1, 2, 3, 723, 724, 725, 726, 727]
    assert pick("f4", 728) == pick("first:4", 728) == [0, 1, 2, 3]
    assert pick("l5", 728) == pick("last:5", 728) == [723, 724, 725, 726, 727]
    assert pick("f9+l0", 728) == pick("first:9", 728)
    assert pick("all", 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 10])
def test_a15_short_segments_are_taken_once(count: int) -> None:
    """The released code repeats the first position instead."""
    assert pick("f4+l5", count) == sorted({*range(min(4, count)), *range(max(0, count - 5), count)})
    assert pick("last:100", count) == pick("uniform:100", count) == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 5, 9, 64, 576, 728, 1000])
@pytest.mark.parametrize("n", [1, 2, 3, 9, 182, 364, 500, 728])
def test_a15_uniform_is_distinct_spread_and_reaches_both_ends(n: int, count: int) -> None:
    found = pick(f"uniform:{n}", count)
    assert len(found) == len(set(found)) == min(n, count)
    assert found == sorted(found)
    if min(n, count) >= 2:
        assert (found[0], found[-1]) == (0, count - 1)
        gaps = [b - a for a, b in zip(found, found[1:], strict=False)]
        assert max(gaps) - min(gaps) <= 1
        exact = [i * (count - 1) / (len(found) - 1) for i in range(len(found))]
        assert found == [math.floor(x + 0.5) for x in exact]


def test_uniform_of_one_is_the_middle() -> None:
    assert [evenly(1, c).tolist() for c in (1, 2, 3, 9)] == [[0], [0], [1], [4]]
    assert evenly(3, 0).tolist() == []


@pytest.mark.parametrize(
    ("share", "count", "n"), [("0.01", 728, 7), ("0.01", 750, 8), ("0.01", 3, 1), ("1", 7, 7), (".5", 7, 4)]
)
@pytest.mark.parametrize("form", ["ratio", "random"])
def test_a15_shares_are_rounded_half_up_and_at_least_one(form: str, share: str, count: int, n: int) -> None:
    found = pick(f"{form}:{share}", count)
    assert len(found) == len(set(found)) == n
    if form == "ratio":
        assert found == pick(f"uniform:{n}", count)


def test_random_follows_its_seed_alone_and_every_token_has_its_chance() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert pick("random:0.25", 100, 5) == pick("random:0.25", 100, 5)
    assert pick("random:0.25", 100, 5) != pick("random:0.25", 100, 6)
    assert set(pick("random:0.25", 100)) < set(pick("random:0.5", 100))
    assert torch.equal(torch.get_rng_state(), before)
    seen = Counter(i for seed in range(400) for i in pick("random:0.25", 20, seed))
    assert set(seen) == set(range(20))
    assert all(60 < count < 145 for count in seen.values())  # 100 expected, 8.7 the deviation


def test_a_range_is_drawn_while_learning_and_its_middle_is_taken_otherwise() -> None:
    selection = parse("ratio:0.1-0.5", 0)
    torch.manual_seed(3)
    drawn = [selection.share(True) for _ in range(200)]
    assert all(0.1 <= share <= 0.5 for share in drawn)
    assert min(drawn) < 0.15
    assert max(drawn) > 0.45
    state = torch.get_rng_state()
    assert selection.share(False) == pytest.approx(0.3)
    assert parse("ratio:0.3", 0).share(True) == 0.3
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("frist:4", "did you mean 'first:n'"),
        ("", "no selection"),
        ("f4l5", "no selection"),
        ("+l5", "no selection"),
        ("f4+", "no selection"),
        ("f0+l0", "selects nothing"),
        ("first:0", "1 or more"),
        ("uniform:x", "whole number"),
        ("uniform:-3", "whole number"),
        ("ratio:0", "outside"),
        ("ratio:1.5", "outside"),
        ("ratio:-0.1", "needs a share"),
        ("random:0.5-0.1", "outside"),
        ("ratio:nan", "needs a share"),
    ],
)
def test_bad_selections_say_what_there_is(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse(text, 0)
    assert str(caught.value).startswith("positions: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("modalities", [[], ["visoin"], ["vision", "vision"], ""])
def test_bad_modalities(modalities: Any) -> None:
    with pytest.raises(ValueError, match="modalities: "):
        Positions("all", modalities, 0)


# ---------------------------------------------------------------- on batches


def batch_of(modality: list[list[int]], role: list[list[int]], labels: list[list[int]]) -> Batch:
    roles = torch.tensor(role)
    ids = torch.zeros_like(roles)
    return Batch(ids, torch.tensor(labels), roles != PAD, torch.tensor(modality), roles, {}, {})


def spots(batch: Batch, text: str, modalities: Any) -> list[tuple[int, int]]:
    places = Positions(text, modalities, 0).places(batch, False)
    return list(zip(places.rows.tolist(), places.columns.tolist(), strict=True))


def test_each_row_and_each_modality_is_counted_by_itself() -> None:
    t, v, a, x = TEXT, VISION, AUDIO, IGNORE_INDEX
    modality = [[t, v, v, v, t, v, a, a], [t, t, t, t, t, t, t, t], [v, v, t, a, a, a, t, t]]
    role = [[SYSTEM, *[USER] * 7], [USER] * 8, [*[USER] * 6, PAD, PAD]]
    batch = batch_of(modality, role, [[x] * 8] * 3)
    assert spots(batch, "f1+l1", "vision") == [(0, 1), (0, 5), (2, 0), (2, 1)]  # pictures of a row are counted through
    assert spots(batch, "first:1", ["audio", "vision"]) == [(0, 6), (2, 3), (0, 1), (2, 0)]
    assert spots(batch, "all", "text") == [(0, 0), (0, 4), *((1, i) for i in range(8)), (2, 2)]
    assert spots(batch, "last:1", "text") == [(0, 4), (1, 7), (2, 2)]  # padding is no text


def test_text_is_the_prompt_before_the_last_answer() -> None:
    s, u, a, p, x = SYSTEM, USER, ASSISTANT, PAD, IGNORE_INDEX
    role = [[s, u, a, s, u, s, a, a, s], [s, u, s, a, s, p, p, p, p]]
    labels = [[x, x, 5, x, x, x, 5, 5, x], [x, x, x, 5, x, x, x, x, x]]
    batch = batch_of([[TEXT] * 9] * 2, role, labels)
    assert spots(batch, "all", "text") == [(0, 0), (0, 1), (0, 3), (0, 4), (0, 5), (1, 0), (1, 1), (1, 2)]


def test_training_and_generation_select_the_same_tokens() -> None:
    _, collator = built()
    turns = ("user", "<image>which colour?"), ("assistant", "red"), ("user", "and now?"), ("assistant", "blue, yes")
    picture = samples(1)[0].media
    talks = [Sample("two", tuple(Message(*turn) for turn in turns), picture), *samples(3, text_every=2)]
    whole, prompts = collator(talks), collator.prompts(talks)
    for text, modalities in (("f3+l4", "text"), ("all", ["text", "vision"]), ("ratio:0.3", "text")):
        chosen = []
        for batch in (whole, prompts):
            assert batch.labels.shape == batch.modality.shape
            lead = (~batch.attention_mask).long().argmin(1) if batch is prompts else torch.zeros(4, dtype=torch.long)
            padding = (batch.attention_mask.long().argmax(1) if batch is prompts else lead).tolist()
            found = spots(batch, text, modalities)
            chosen.append([(row, column - padding[row], int(batch.input_ids[row, column])) for row, column in found])
        assert chosen[0] == chosen[1]


def test_beams_and_wider_hidden_states() -> None:
    batch = batch_of([[VISION, TEXT], [TEXT, VISION]], [[USER] * 2] * 2, [[IGNORE_INDEX] * 2] * 2)
    places = Positions("all", "vision", 0).places(batch, False)
    assert places.flat(2, 2).tolist() == [0, 3]
    assert places.flat(2, 5).tolist() == [0, 6]
    assert places.flat(6, 2).tolist() == [0, 2, 4, 7, 9, 11]  # rows 0 0 0 1 1 1
    with pytest.raises(ValueError, match="3 rows reach the decoder but the batch in flight has 2"):
        places.flat(3, 2)


def test_positions_travel_to_other_processes() -> None:
    positions = Positions("f2+l1", "vision", 0)
    again = pickle.loads(pickle.dumps(positions))  # noqa: S301 - as a spawned process gets it
    batch = batch_of([[VISION] * 6], [[USER] * 6], [[IGNORE_INDEX] * 6])
    assert again.places(batch, False).columns.tolist() == positions.places(batch, False).columns.tolist() == [0, 1, 5]
