"""Data sets of conversations."""

from mllm_factory.components.sources import easy_vqa as easy_vqa
from mllm_factory.components.sources import exchanged as exchanged
from mllm_factory.components.sources import hf_dataset as hf_dataset
from mllm_factory.components.sources import llava_json as llava_json
from mllm_factory.components.sources import mixture as mixture
from mllm_factory.components.sources import sounds as sounds
from mllm_factory.components.sources import sounds_and_shapes as sounds_and_shapes
from mllm_factory.components.sources import toy_balance as toy_balance
from mllm_factory.components.sources import webdataset as webdataset
