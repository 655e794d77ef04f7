"""BEATs: a transformer over the patches of a spectrogram, trained to predict the marks of an acoustic tokenizer.

Chen et al. 2022, arXiv:2212.09058. The model is the authors' code as the package openbeats carries it (Bharadwaj et al. 2025,
arXiv:2507.14129), without what it has for training and for recordings of several lengths in one batch.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mllm_factory import (
    ConfigError,
    Encoder,
    hint,
    load_matching,
    locate,
    on_meta,
    one_line,
    read_weights,
    register,
    weights_file,
)
from mllm_factory.components.encoders.audio_cut import chosen_layer, cut_away, unused
from mllm_factory.components.encoders.sound import Windows

RATE, LENGTH, HOP, BANDS = 16000, 400, 160, 128
"""Samples a second, of a frame and of a step; bands of a frame."""

RELEASED: dict[str, Any] = {
    **{"input_patch_size": 16, "embed_dim": 512, "conv_bias": False},
    **{"encoder_layers": 12, "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072, "encoder_attention_heads": 12},
    **{"activation_fn": "gelu", "layer_norm_first": False, "deep_norm": True},
    **{"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "dropout_input": 0.0},
    **{"conv_pos": 128, "conv_pos_groups": 16},
    **{"relative_position_embedding": True, "num_buckets": 320, "max_distance": 800, "gru_rel_pos": True},
    **{"fbank_mean": 15.41663, "fbank_std": 6.55582},
}
"""Sizes of the models that the authors released, BEATs_iter1 to BEATs_iter3+."""


class Fbank:
    """A recording to log-mel frames as Kaldi computes them, one for 10 ms, 128 bands.

    Args:
        seconds: length of a window.
        max_windows: most windows of one recording; None for any number.

    Attributes:
        frames: of a window: 1 + (samples - 400) // 160, as each lies within the window.

    Raises:
        ValueError: a length or number that is not positive.
    """

    def __init__(self, seconds: float, max_windows: int | None) -> None:
        self.windows = Windows(RATE, seconds, max_windows)
        self.frames = 1 + (self.windows.samples - LENGTH) // HOP

    def __call__(self, recording: tuple[Tensor, int]) -> Tensor:
        """([channels, time], Hz) -> [m, frames, 128] float32

        Raises:
            DataError: see ``Windows.chunks``.
        """
        from torchaudio.compliance.kaldi import fbank

        with torch.device("cpu"):  # sound is data, also while sizes are checked
            windows = 2.0**15 * self.windows(recording)  # whole numbers of 16 bits
            return torch.stack([fbank(w[None], num_mel_bins=BANDS, sample_frequency=RATE) for w in windows])


@register("beats")
class Beats(Encoder):
    """A layer of BEATs: one token for a patch of 160 ms and 16 bands, eight for each 160 ms, by time first.

    A shorter recording is followed by silence, which the model hears. What lies behind the layer is cut off, and no layer is
    dropped at random.

    Args:
        sizes: changes to the sizes of the released models, such as ``encoder_layers``; None for none.
        pretrained: None for random weights, else a local folder or file of the authors or of OpenBEATs.
        layer: which transformer layer; negative from the end. The last one is the model's own output.
        seconds: length of a window; a longer recording becomes several items.
        max_windows: most windows of one recording; None for any number.

    Raises:
        ValueError: openbeats is not installed, an unknown size, no such layer, sizes that do not fit together, or a window
            shorter than a patch.
        ConfigError: weights that cannot be found or are of another architecture.
    """

    modality = "audio"

    def __init__(
        self,
        sizes: dict[str, Any] | None = None,
        pretrained: str | None = None,
        layer: int = -1,
        seconds: float = 10.0,
        max_windows: int | None = None,
    ) -> None:
        super().__init__()
        values = _values(sizes or {})
        self.transform = fbank = Fbank(seconds, max_windows)
        if fbank.frames < values["input_patch_size"]:
            raise ValueError(f"seconds: {seconds:g} s hold no patch of {values['input_patch_size']} frames; use more")
        self._mean, self._scale = values["fbank_mean"], 2 * values["fbank_std"]
        depth = values["encoder_layers"]
        chosen = chosen_layer(layer, depth, "beats")
        self.layer = None if chosen == depth - 1 else chosen
        with torch.device("meta"), torch.enable_grad():
            self.model = _model(values)
            del self.model.encoder.layers[chosen + 1 :]
            features = self._probe(fbank.frames)
        self.num_tokens, self.dim = features.shape[1:]
        spare = unused(self.model, features)
        source = _source(pretrained)
        if not on_meta():
            self.model = _model(values)
            if source is not None:
                _load(self.model, source, values)
            del self.model.encoder.layers[chosen + 1 :]
        cut_away(self.model, spare)

    def forward(self, items: Tensor) -> Tensor:
        """[n, frames, 128] -> [n, num_tokens, dim]"""
        x = (items - self._mean) / self._scale
        x = self.model.patch_embedding(x[:, None]).flatten(2).transpose(1, 2)  # [n, num_tokens, embed_dim]
        x = self.model.layer_norm(x)
        if self.model.post_extract_proj is not None:
            x = self.model.post_extract_proj(x)
        return self.model.encoder(self.model.dropout_input(x), layer=self.layer)[0]

    def _probe(self, frames: int) -> Tensor:
        try:
            return self(torch.zeros(1, frames, BANDS))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(f"sizes: they do not fit together ({one_line(error, 200)})") from error


def _values(sizes: dict[str, Any]) -> dict[str, Any]:
    if find_spec("openbeats") is None:
        raise ValueError("beats: the package openbeats, which holds the model, is not installed; pip install openbeats")
    for name in sizes:
        if name not in RELEASED:
            raise ValueError(f"sizes: BEATs has no '{name}'{hint(name, RELEASED)}")
    values = {**RELEASED, **sizes}
    if values["encoder_layers"] < 1:
        raise ValueError(f"sizes: encoder_layers: {values['encoder_layers']} layers are none; use 1 or more")
    if values["fbank_std"] <= 0:
        raise ValueError(f"sizes: fbank_std: {values['fbank_std']} scales nothing; use a number above 0")
    return values


def _library() -> Any:
    """The class of the library's encoder, imported with the CPU as default device: the modules behind it hold tensors."""
    with torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from openbeats.beats_encoder import BeatsEncoder

    return BeatsEncoder


class _CopiesStayOnMeta(TorchFunctionMode):
    """The library draws its weights on the CPU; without values there is nothing to bring there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cpu and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def _model(values: dict[str, Any]) -> Any:
    """The encoder, random, without the convolutions that measure padding.

    Its positions are normed by torch's present means, as those of its own time cannot be copied.
    """
    make = _library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            with _CopiesStayOnMeta():
                model = make(0, beats_config=values)
        except (RuntimeError, ValueError, TypeError, AssertionError, ZeroDivisionError) as error:
            raise ValueError(f"sizes: they do not fit together ({one_line(error, 200)})") from error
        conv = model.encoder.pos_conv[0]
        nn.utils.remove_weight_norm(conv)
    nn.utils.parametrizations.weight_norm(conv, dim=2)
    del model.patch_embedding_pad, model.raw2fbank_pad
    return model


# ---------------------------------------------------------------- weights


def _source(pretrained: str | None) -> Path | None:
    if pretrained is None:
        return None
    found = locate(pretrained)
    if isinstance(found, Path):
        return found
    raise ConfigError(
        f"pretrained: '{pretrained}' is no local file; download the file of BEATs or OpenBEATs (.pt) and give its path"
    )


def _load(model: nn.Module, source: Path, values: dict[str, Any]) -> None:
    file = weights_file(source)
    _require_agreement(file, values)
    state = read_weights(file)
    if "patch_embedding.weight" not in state:  # a fine-tuned model of ESPnet
        state = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    for ours, theirs in (("original0", "weight_g"), ("original1", "weight_v")):
        value = state.pop(f"encoder.pos_conv.0.{theirs}", None)
        if value is not None:
            state[f"encoder.pos_conv.0.parametrizations.weight.{ours}"] = value
    load_matching(model, state)


def _require_agreement(file: Path, values: dict[str, Any]) -> None:
    """Compare the sizes with those that the file states; dropout is anybody's choice.

    Raises:
        ConfigError: names the first that differs.
    """
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # safetensors, or damaged: reading it says so
        return
    stated = saved.get("cfg") if isinstance(saved, dict) else None
    for name, value in values.items():
        if isinstance(stated, dict) and "dropout" not in name and stated.get(name, value) != value:
            raise ConfigError(
                f"pretrained: {file} was made with {name} {stated[name]}, not {value}; set sizes.{name}: {stated[name]}"
            )
