"""What the recognisers of torchaudio differ in, and the spectrogram that they share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_factory.components.encoders.sound import Windows

RATE, HOP, LENGTH = 16000, 160, 400
"""Samples a second, of a step and of a frame."""

GAIN = 32767.0**2
"""The power of a whole number of 16 bits over that of the same sound between -1 and 1."""


class Bands:
    """A recording to the log-mel frames that the recognisers read, one for 10 ms.

        l = log v above e, v / e below,  v = 32767^2 mel(|STFT(x)|^2)    Hann window of 25 ms, HTK's mel scale

    Args:
        mels: bands.
        seconds: length of a window.
        max_windows: most windows of one recording; None for any number.

    Attributes:
        frames: of a window: 1 + samples // 160, as frames are centred on their time.

    Raises:
        ValueError: a length or number that is not positive.
    """

    def __init__(self, mels: int, seconds: float, max_windows: int | None) -> None:
        import torchaudio

        self.windows, self.mels = Windows(RATE, seconds, max_windows), mels
        if self.windows.samples <= LENGTH // 2:
            raise ValueError(f"seconds: {seconds:g} s hold no frame of 25 ms; use 0.1 or more")
        if mels < 1:
            raise ValueError(f"sizes: input_dim: {mels} bands hold no sound; use 1 or more, such as 80")
        self.frames = 1 + self.windows.samples // HOP
        with torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the lowest of 80 bands are empty; the recognisers were trained so
            self.mel = torchaudio.transforms.MelSpectrogram(RATE, n_fft=LENGTH, n_mels=mels, hop_length=HOP)

    def __call__(self, recording: tuple[Tensor, int]) -> Tensor:
        """([channels, time], Hz) -> [m, frames, mels] float32

        Raises:
            DataError: see ``Windows.chunks``.
        """
        with torch.device("cpu"):  # sound is data, also while sizes are checked
            v = GAIN * self.mel(self.windows(recording)).transpose(1, 2)
            return torch.where(v > math.e, v.clamp(min=math.e).log(), v / math.e)


@dataclass(frozen=True)
class Recipe:
    """One kind of recogniser.

    Attributes:
        make: its encoder with random weights, from ``sizes``.
        sizes: of the one that torchaudio trains on LibriSpeech.
        depth: which of them is the number of layers.
        layers: the encoder's layers.
        run: the encoder and frames [n, T, bands] to tokens [n, num_tokens, dim].
        assets: addresses at torchaudio of weights and statistics; none where it offers none.
    """

    make: Callable[..., nn.Module]
    sizes: dict[str, Any]
    depth: str
    layers: Callable[[Any], nn.ModuleList]
    run: Callable[[Any, Tensor], Tensor]
    assets: tuple[str, ...] = field(default=())


# ---------------------------------------------------------------- Emformer


def _emformer(**sizes: Any) -> nn.Module:
    """The transcriber of torchaudio's recogniser; the rest is made as small as it can be, and dropped."""
    from torchaudio.models import emformer_rnnt_model

    rest = {"num_symbols": 1, "symbol_embedding_dim": 1, "num_lstm_layers": 0, "lstm_dropout": 0.0}
    norm = {"lstm_layer_norm": False, "lstm_layer_norm_epsilon": 1e-3}
    return emformer_rnnt_model(**sizes, **rest, **norm).transcriber


def _run_emformer(model: Any, frames: Tensor) -> Tensor:
    """Each item by itself, as for a batch torchaudio would ask for the lengths' values; vmap makes one pass of them."""
    right = model.transformer.right_context_length * model.time_reduction.stride
    return torch.vmap(partial(_emformer_item, model), randomness="different")(F.pad(frames, (0, 0, 0, right)))


def _emformer_item(model: Any, frames: Tensor) -> Tensor:
    """[T + right context, bands] -> [num_tokens, dim]"""
    lengths = torch.full((1,), len(frames), device=frames.device)
    reduced, _ = model.time_reduction(model.input_linear(frames[None]), lengths)
    output, _ = model.transformer(reduced, lengths)
    return model.layer_norm(model.output_linear(output))[0]


# ---------------------------------------------------------------- Conformer


class ConformerTranscriber(nn.Module):
    """``stride`` frames as one, a linear layer, Conformer, a linear layer and a norm, as in torchaudio's recipe.

    Args:
        input_dim: bands.
        encoding_dim: width of a token.
        time_reduction_stride: frames of a token.
        conformer_input_dim, conformer_ffn_dim, conformer_num_layers, conformer_num_heads,
            conformer_depthwise_conv_kernel_size, conformer_dropout: of ``torchaudio.models.Conformer``.
    """

    def __init__(
        self,
        input_dim: int,
        encoding_dim: int,
        time_reduction_stride: int,
        conformer_input_dim: int,
        conformer_ffn_dim: int,
        conformer_num_layers: int,
        conformer_num_heads: int,
        conformer_depthwise_conv_kernel_size: int,
        conformer_dropout: float,
    ) -> None:
        from torchaudio.models import Conformer

        super().__init__()
        self.stride = time_reduction_stride
        self.input_linear = nn.Linear(input_dim * time_reduction_stride, conformer_input_dim)
        self.conformer = Conformer(
            conformer_input_dim,
            conformer_num_heads,
            conformer_ffn_dim,
            conformer_num_layers,
            conformer_depthwise_conv_kernel_size,
            conformer_dropout,
            use_group_norm=True,
            convolution_first=True,
        )
        self.output_linear = nn.Linear(conformer_input_dim, encoding_dim)
        self.layer_norm = nn.LayerNorm(encoding_dim)

    def forward(self, frames: Tensor) -> Tensor:
        """[n, T, bands] -> [n, T // stride, encoding_dim]; every frame is heard."""
        tokens = frames.shape[1] // self.stride
        x = self.input_linear(frames[:, : tokens * self.stride].reshape(len(frames), tokens, -1)).transpose(0, 1)
        for layer in self.conformer.conformer_layers:
            x = layer(x, None)
        return self.layer_norm(self.output_linear(x.transpose(0, 1)))


def _run_conformer(model: Any, frames: Tensor) -> Tensor:
    return model(frames)


RECIPES = {
    "emformer_rnnt_base": Recipe(
        make=_emformer,
        sizes={
            **{"input_dim": 80, "encoding_dim": 1024, "segment_length": 16, "right_context_length": 4},
            **{"time_reduction_input_dim": 128, "time_reduction_stride": 4, "transformer_num_heads": 8},
            **{"transformer_ffn_dim": 2048, "transformer_num_layers": 20, "transformer_dropout": 0.1},
            **{"transformer_activation": "gelu", "transformer_left_context_length": 30},
            **{"transformer_max_memory_size": 0, "transformer_weight_init_scale_strategy": "depthwise"},
            **{"transformer_tanh_on_mem": True},
        },
        depth="transformer_num_layers",
        layers=lambda model: model.transformer.emformer_layers,
        run=_run_emformer,
        assets=("models/emformer_rnnt_base_librispeech.pt", "pipeline-assets/global_stats_rnnt_librispeech.json"),
    ),
    "conformer_rnnt_base": Recipe(
        make=ConformerTranscriber,
        sizes={
            **{"input_dim": 80, "encoding_dim": 1024, "time_reduction_stride": 4, "conformer_input_dim": 256},
            **{"conformer_ffn_dim": 1024, "conformer_num_layers": 16, "conformer_num_heads": 4},
            **{"conformer_depthwise_conv_kernel_size": 31, "conformer_dropout": 0.1},
        },
        depth="conformer_num_layers",
        layers=lambda model: model.conformer.conformer_layers,
        run=_run_conformer,
    ),
}
"""By the names of torchaudio's functions that build the recognisers."""
