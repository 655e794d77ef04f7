"""Exact match of generated answers."""

from __future__ import annotations

from mllm_factory import Batch, DataError, Metric, MultimodalModel, Output, register


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


@register("exact_match")
class ExactMatch(Metric):
    """Share of samples whose generated answer equals the reference after normalising case, white space and a final full stop.

    Range [0, 1]. It cannot tell a near miss from nonsense, nor whether the answer came from the picture (see ``ablation``).

    Args:
        max_new_tokens: longest answer to generate.

    Raises:
        ValueError: ``max_new_tokens`` below 1.
    """

    def __init__(self, max_new_tokens: int = 16) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.max_new_tokens = max_new_tokens
        self.right = self.seen = 0

    def update(self, model: MultimodalModel, batch: Batch, output: Output) -> None:
        """Compare ``output.texts`` with ``batch.references``.

        Raises:
            DataError: a sample without a reference.
        """
        for sample, text, reference in zip(batch.ids, output.texts or [], batch.references, strict=True):
            if not reference.strip():
                raise DataError(f"sample '{sample}' ends without an answer to compare with; leave it out of data.eval")
            self.right += normalise(text) == normalise(reference)
            self.seen += 1

    def compute(self) -> dict[str, float]:
        """``exact_match``; NaN where nothing was seen."""
        return {"exact_match": self.right / self.seen if self.seen else float("nan")}
