"""Schedules: learning rates per part, step by step."""

from mllm_factory.components.schedules import commit as commit
from mllm_factory.components.schedules import constant as constant
from mllm_factory.components.schedules import cosine as cosine
