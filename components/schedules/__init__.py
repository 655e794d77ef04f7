"""Schedules: learning rates per part, step by step."""

from mllm_factory.components.schedules import agm as agm
from mllm_factory.components.schedules import commit as commit
from mllm_factory.components.schedules import constant as constant
from mllm_factory.components.schedules import coordinate_descent as coordinate_descent
from mllm_factory.components.schedules import cosine as cosine
from mllm_factory.components.schedules import grad_ratio as grad_ratio
from mllm_factory.components.schedules import ogm_ge as ogm_ge
