"""Teacher-forced loss on the answers."""

from __future__ import annotations

from mllm_factory import Batch, Metric, MultimodalModel, Output, register


@register("answer_loss")
class AnswerLoss(Metric):
    """Cross-entropy of the reference answers in nats a token: sum over all label positions / their number.

    Range [0, inf); exp of it is the perplexity. It cannot tell whether a free generation would be right.
    """

    teacher_forced = True

    def __init__(self) -> None:
        self.loss_sum, self.num_labels = 0.0, 0

    def update(self, model: MultimodalModel, batch: Batch, output: Output) -> None:
        """Add up ``output.loss_sum`` and ``output.num_labels``."""
        if output.loss_sum is not None and output.num_labels is not None:
            self.loss_sum += float(output.loss_sum)
            self.num_labels += int(output.num_labels)

    def compute(self) -> dict[str, float]:
        """``answer_loss``; NaN where nothing was seen."""
        return {"answer_loss": self.loss_sum / self.num_labels if self.num_labels else float("nan")}
