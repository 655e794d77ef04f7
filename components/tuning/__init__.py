"""Tuning strategies: how one part learns."""

from mllm_factory.components.tuning import adalora as adalora
from mllm_factory.components.tuning import adapter as adapter
from mllm_factory.components.tuning import frozen as frozen
from mllm_factory.components.tuning import full as full
from mllm_factory.components.tuning import ia3 as ia3
from mllm_factory.components.tuning import layers as layers
from mllm_factory.components.tuning import lora as lora
from mllm_factory.components.tuning import mores as mores
from mllm_factory.components.tuning import oft as oft
from mllm_factory.components.tuning import prefix as prefix
from mllm_factory.components.tuning import reft as reft
from mllm_factory.components.tuning import vera as vera
