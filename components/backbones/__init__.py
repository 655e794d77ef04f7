"""Backbones: decoder-only language models that start from embeddings."""

from mllm_factory.components.backbones import hf as hf
