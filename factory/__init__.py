"""mllm-factory: multimodal LLMs composed from YAML.

The public names are loaded on first use, so that the command line can list, complete and refuse without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_factory.distributed import sharded as sharded
    from mllm_factory.distributed import total as total
    from mllm_factory.errors import CheckpointError as CheckpointError
    from mllm_factory.errors import ConfigError as ConfigError
    from mllm_factory.errors import DataError as DataError
    from mllm_factory.errors import UserError as UserError
    from mllm_factory.errors import hint as hint
    from mllm_factory.errors import one_line as one_line
    from mllm_factory.interfaces import Backbone as Backbone
    from mllm_factory.interfaces import Encoder as Encoder
    from mllm_factory.interfaces import Metric as Metric
    from mllm_factory.interfaces import Projector as Projector
    from mllm_factory.interfaces import Schedule as Schedule
    from mllm_factory.interfaces import Source as Source
    from mllm_factory.interfaces import Tuning as Tuning
    from mllm_factory.media import BLANK as BLANK
    from mllm_factory.model import MultimodalModel as MultimodalModel
    from mllm_factory.pretrained import BUNDLE as BUNDLE
    from mllm_factory.pretrained import load_matching as load_matching
    from mllm_factory.pretrained import locate as locate
    from mllm_factory.pretrained import on_meta as on_meta
    from mllm_factory.pretrained import read_weights as read_weights
    from mllm_factory.pretrained import weights_file as weights_file
    from mllm_factory.randomness import untouched as untouched
    from mllm_factory.registry import build as build
    from mllm_factory.registry import names as names
    from mllm_factory.registry import register as register
    from mllm_factory.silence import quiet as quiet
    from mllm_factory.template import resolve_template as resolve_template
    from mllm_factory.trainer import TrainState as TrainState
    from mllm_factory.types import ASSISTANT as ASSISTANT
    from mllm_factory.types import AUDIO as AUDIO
    from mllm_factory.types import IGNORE_INDEX as IGNORE_INDEX
    from mllm_factory.types import MODALITIES as MODALITIES
    from mllm_factory.types import PAD as PAD
    from mllm_factory.types import SYSTEM as SYSTEM
    from mllm_factory.types import TEXT as TEXT
    from mllm_factory.types import USER as USER
    from mllm_factory.types import VISION as VISION
    from mllm_factory.types import Batch as Batch
    from mllm_factory.types import Message as Message
    from mllm_factory.types import Output as Output
    from mllm_factory.types import Sample as Sample

_HOME = {
    "distributed": "sharded total",
    "errors": "CheckpointError ConfigError DataError UserError hint one_line",
    "interfaces": "Backbone Encoder Metric Projector Schedule Source Tuning",
    "media": "BLANK",
    "model": "MultimodalModel",
    "pretrained": "BUNDLE load_matching locate on_meta read_weights weights_file",
    "silence": "quiet",
    "randomness": "untouched",
    "registry": "build names register",
    "template": "resolve_template",
    "trainer": "TrainState",
    "types": "ASSISTANT AUDIO IGNORE_INDEX MODALITIES PAD SYSTEM TEXT USER VISION Batch Message Output Sample",
}
_MODULE_OF = {name: module for module, words in _HOME.items() for name in words.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mllm_factory' has no attribute '{name}'")
    value = getattr(import_module(f"mllm_factory.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
