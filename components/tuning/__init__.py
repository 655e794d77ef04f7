"""Tuning strategies: how one part learns."""

from mllm_factory.components.tuning import frozen as frozen
from mllm_factory.components.tuning import full as full
from mllm_factory.components.tuning import lora as lora
