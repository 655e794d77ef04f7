"""The built-in parts. Importing this package registers them; it is found through the entry point, like any other pack."""

from mllm_factory.components import backbones as backbones
from mllm_factory.components import encoders as encoders
from mllm_factory.components import metrics as metrics
from mllm_factory.components import projectors as projectors
from mllm_factory.components import schedules as schedules
from mllm_factory.components import sources as sources
from mllm_factory.components import tuning as tuning
