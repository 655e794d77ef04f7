"""ROUGE-L of generated answers (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1).

    P = LCS(x, y) / |y|,   R = LCS(x, y) / |x|,   F = (1 + beta^2) P R / (R + beta^2 P)

for a reference of words x and an answer of words y; LCS is the length of their longest common subsequence. Words and numbers
are those of the package ``rouge-score``, which has beta 1; the caption evaluation of COCO has beta 1.2.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from mllm_factory import Batch, DataError, Metric, MultimodalModel, Output, register

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case; in ASCII those of ``rouge-score`` without its stemmer."""
    return _WORD.findall(text.lower())


def lcs(x: Sequence[str], y: Sequence[str]) -> int:
    """Length of the longest sequence of words that stands in both in this order, gaps allowed: O(|x| |y|)."""
    row = [0] * (len(y) + 1)  # row[j]: of the words of x so far and the first j of y
    for word in x:
        diagonal = 0
        for j, other in enumerate(y, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def rouge_l(reference: str, answer: str, beta: float = 1.0) -> float:
    """F in [0, 1]; 0 where the two share no word."""
    x, y = words(reference), words(answer)
    common = lcs(x, y)
    if not common:
        return 0.0
    precision, recall = common / len(y), common / len(x)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


@register("rouge_l")
class RougeL(Metric):
    """Mean ROUGE-L of generated answers against the references: for captions, where words in the same order count.

    Range [0, 1]; papers print it times 100. It rewards shared words, not shared meaning. One reference a sample.

    Args:
        max_new_tokens: longest answer to generate.
        beta: weight of recall against precision: 1 as ``rouge-score``, 1.2 as COCO's captions.

    Raises:
        ValueError: ``max_new_tokens`` below 1, or a ``beta`` that is not above 0.
    """

    def __init__(self, max_new_tokens: int = 64, beta: float = 1.0) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not beta > 0:
            raise ValueError(f"beta: {beta} is no weight; use a number above 0, such as 1")
        self.max_new_tokens, self.beta = max_new_tokens, beta
        self.scores: list[float] = []

    def update(self, model: MultimodalModel, batch: Batch, output: Output) -> None:
        """Score ``output.texts`` against ``batch.references``.

        Raises:
            DataError: a sample whose reference has no word.
        """
        for sample, text, reference in zip(batch.ids, output.texts or [], batch.references, strict=True):
            if not words(reference):
                raise DataError(f"sample '{sample}' ends without a word to compare with; leave it out of data.eval")
            self.scores.append(rouge_l(reference, text, self.beta))

    def compute(self) -> dict[str, float]:
        """``rouge_l``; NaN where nothing was seen."""
        return {"rouge_l": statistics.fmean(self.scores) if self.scores else float("nan")}
