"""Schedules: learning rates per part, step by step."""

from mllm_factory.components.schedules import constant, cosine

__all__ = ["constant", "cosine"]
