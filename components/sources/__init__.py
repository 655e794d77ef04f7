"""Data sets of conversations."""

from mllm_factory.components.sources import easy_vqa as easy_vqa
from mllm_factory.components.sources import llava_json as llava_json
