"""Projectors: encoder features to backbone embeddings."""

from mllm_factory.components.projectors import mlp as mlp
