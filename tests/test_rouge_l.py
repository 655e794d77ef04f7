"""ROUGE-L against the package rouge-score's published results, and the subsequence against brute force."""

from __future__ import annotations

import math
import random
from itertools import combinations
from typing import Any

import pytest

from mllm_factory import ConfigError, DataError, Metric, build
from mllm_factory.components.metrics.rouge_l import lcs, rouge_l, words
from mllm_factory.types import Batch, Output


def batch(*references: str) -> Any:
    """What the metric reads of a batch."""
    empty: Any = [None] * 5
    named = tuple(str(i) for i in range(len(references)))
    return Batch(*empty, media={}, media_row={}, ids=named, references=references, left_padded=True)


def metric(**options: Any) -> Metric:
    return build(Metric, {"name": "rouge_l", **options}, "metrics.m")


@pytest.mark.parametrize(
    ("reference", "answer", "f"),
    [
        ("testing one two", "testing one", 4 / 5),  # rouge_scorer_test.py
        ("testing one two", "testing", 1 / 2),
        ("testing one two", "", 0.0),
        ("first text", "text first", 1 / 2),
        ("police killed the gunman", "police kill the gunman", 3 / 4),  # Lin 2004, S1 and S2
        ("police killed the gunman", "the gunman kill police", 1 / 2),  # and S3
        # rouge-score 0.1.2 without a stemmer
        ("The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log.", 0.5882352941176471),
        ("People are walking, and a tram passes by.", "a tram passes while people are talking & walking", 0.375),
        ("it's a don't-care state_2", "its a dont care state 2", 0.5714285714285715),
    ],
)
def test_it_is_that_of_the_package_rouge_score(reference: str, answer: str, f: float) -> None:
    assert rouge_l(reference, answer) == pytest.approx(f, rel=1e-12)


def brute(x: list[str], y: list[str]) -> int:
    """The longest subsequence of x that is one of y, by trying them all."""

    def inside(chosen: tuple[str, ...]) -> bool:
        rest = iter(y)
        return all(word in rest for word in chosen)

    return max(n for n in range(len(x) + 1) for chosen in combinations(x, n) if inside(chosen))


def test_the_longest_common_subsequence_is_that_of_brute_force() -> None:
    draw = random.Random(0)
    found = set()
    for _ in range(200):
        x, y = (draw.choices("abc", k=draw.randint(0, 8)) for _ in range(2))
        assert lcs(x, y) == lcs(y, x) == brute(x, y), (x, y)
        found.add(lcs(x, y))
    assert found >= {0, 1, 2, 3, 4, 5}


def test_beta_weighs_recall() -> None:
    """P = 3/4, R = 3/5: with beta 1.2 as in COCO's captions 2.44 * 0.45 / (0.6 + 1.44 * 0.75)."""
    pair = ("a dog barks at night", "a dog barks loudly")
    assert rouge_l(*pair, beta=1.2) == pytest.approx(2.44 * 0.45 / (0.6 + 1.44 * 0.75), rel=1e-12)
    assert rouge_l(*pair) == pytest.approx(2 * 3 / 9, rel=1e-12)
    assert rouge_l(*pair, beta=50.0) == pytest.approx(3 / 5, rel=1e-3)


def test_words_of_any_script() -> None:
    assert words("Łódź, 2nd_street: école?") == ["łódź", "2nd", "street", "école"]


def test_the_metric_is_the_mean_over_samples_of_all_batches() -> None:
    score = metric(max_new_tokens=5)
    assert score.max_new_tokens == 5 and math.isnan(score.compute()["rouge_l"])
    score.update(None, batch("testing one two", "first text"), Output(texts=["testing one", "Text!"]))
    score.update(None, batch("yes"), Output(texts=["no"]))
    assert score.compute() == {"rouge_l": pytest.approx((4 / 5 + 2 / 3 + 0) / 3, rel=1e-12)}
    with pytest.raises(DataError, match="sample '0' ends without a word to compare with"):
        score.update(None, batch("?!"), Output(texts=["no"]))


@pytest.mark.parametrize(
    ("options", "says"), [({"max_new_tokens": 0}, "at least 1, got 0"), ({"beta": 0.0}, "beta: 0.0 is no weight")]
)
def test_options_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        metric(**options)
