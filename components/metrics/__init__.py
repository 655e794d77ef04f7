"""Metrics: what an evaluation reports."""

from mllm_factory.components.metrics import (
    ablation,
    answer_loss,
    attention,
    counterfactual,
    exact_match,
    rouge_l,
    route_effect,
    scale_slope,
)

__all__ = [
    "ablation",
    "answer_loss",
    "attention",
    "counterfactual",
    "exact_match",
    "rouge_l",
    "route_effect",
    "scale_slope",
]
