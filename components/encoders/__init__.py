"""Encoders: media items to features."""

from mllm_factory.components.encoders import beats as beats
from mllm_factory.components.encoders import fusion as fusion
from mllm_factory.components.encoders import hf_audio as hf_audio
from mllm_factory.components.encoders import hf_vision as hf_vision
from mllm_factory.components.encoders import mel_conv as mel_conv
from mllm_factory.components.encoders import open_clip as open_clip
from mllm_factory.components.encoders import patch as patch
from mllm_factory.components.encoders import rnnt as rnnt
from mllm_factory.components.encoders import timm as timm
from mllm_factory.components.encoders import torchaudio as torchaudio
