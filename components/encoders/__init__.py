"""Encoders: media items to features."""

from mllm_factory.components.encoders import timm as timm
