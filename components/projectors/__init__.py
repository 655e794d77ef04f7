"""Projectors: encoder features to backbone embeddings."""

from mllm_factory.components.projectors import c_abstractor as c_abstractor
from mllm_factory.components.projectors import identity as identity
from mllm_factory.components.projectors import mlp as mlp
from mllm_factory.components.projectors import mof_mlp as mof_mlp
from mllm_factory.components.projectors import pixel_shuffle as pixel_shuffle
from mllm_factory.components.projectors import pool as pool
from mllm_factory.components.projectors import qformer as qformer
from mllm_factory.components.projectors import resampler as resampler
