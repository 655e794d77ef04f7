"""Metrics: what an evaluation reports."""

from mllm_factory.components.metrics import ablation, answer_loss, exact_match

__all__ = ["ablation", "answer_loss", "exact_match"]
