"""Metrics: what an evaluation reports."""

from mllm_factory.components.metrics import ablation, answer_loss, attention, counterfactual, exact_match, scale_slope

__all__ = ["ablation", "answer_loss", "attention", "counterfactual", "exact_match", "scale_slope"]
