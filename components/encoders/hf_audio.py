"""Audio models of transformers as encoders, found by structure instead of by name.

Whisper: Radford et al. 2022, arXiv:2212.04356; AST: Gong et al. 2021, arXiv:2104.01778; CLAP: Wu et al. 2022,
arXiv:2211.06687; wav2vec 2.0: arXiv:2006.11477; HuBERT: arXiv:2106.07447; WavLM: arXiv:2110.13900.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mllm_factory import Encoder, on_meta, one_line, register
from mllm_factory.components.encoders.audio_cut import chosen_layer, cut_away, unused
from mllm_factory.components.encoders.hf_audio_build import (
    audio_part,
    empty_tower,
    filled_tower,
    find_source,
    make_config,
    name_of_layers,
)
from mllm_factory.components.encoders.hf_audio_features import LibraryFeatures, make_extractor


@register("hf_audio")
class HfAudio(Encoder):
    """The audio tower of a transformers model on what the library's own feature extractor makes of a window.

    Whisper gives 50 tokens a second, wav2vec 2.0 and its relatives one for each step of their convolutions, AST and CLAP the
    cells of a spectrogram's grid (CLAP's and AST's of the whole fixed length). Of a whole model only the tower is kept: the
    encoder of Whisper, the audio side of CLAP.

    Args:
        architecture: transformers' model type, such as whisper, wav2vec2, hubert, wavlm, audio-spectrogram-transformer,
            clap, sew or data2vec-audio; None where ``pretrained`` tells it.
        sizes: values of the architecture's configuration (of its audio part); None for its defaults.
        pretrained: None for random weights, else a folder of ``save_pretrained``, a hub id, or ``pkg://package``.
        features: values of the library's feature extractor; None for those of ``pretrained``, or else its defaults.
        layer: which transformer layer; negative from the end. The last one is the model's own last hidden state, with the
            final norm where it has one; any other is the layer's bare output, and what lies behind it is cut off.
        seconds: length of a window; a longer recording becomes several items.
        max_windows: most windows of one recording; None for any number.

    Raises:
        ValueError: an unknown name or value, no such layer, a window that the model cannot take, or a model whose output is
            no sequence.
        ConfigError: weights that cannot be found, or of another architecture.
    """

    modality = "audio"

    def __init__(
        self,
        architecture: str | None = None,
        sizes: dict[str, Any] | None = None,
        pretrained: str | None = None,
        features: dict[str, Any] | None = None,
        layer: int = -1,
        seconds: float = 10.0,
        max_windows: int | None = None,
    ) -> None:
        super().__init__()
        source = find_source(pretrained)
        config = make_config(architecture, sizes or {}, source, pretrained)
        self.transform = LibraryFeatures(make_extractor(config, source, features), seconds, max_windows)
        empty, name = empty_tower(config)
        self._layers = name_of_layers(empty)
        self.model = self._shortened(empty, layer, config.model_type)
        output = self._probe()
        spare = unused(self.model, output)
        self.num_tokens, self.dim = self._frames(output, audio_part(config)), output.shape[-1]
        if not on_meta():
            self.model = self._shortened(filled_tower(empty, name, source), layer, config.model_type)
        cut_away(self.model, spare)
        self.model.requires_grad_(True)  # Whisper's positions, too: what learns is for the tuning to say

    def forward(self, items: Tensor) -> Tensor:
        """[n, *item_shape] -> [n, num_tokens, dim]"""
        return self._encode(items)[:, : self.num_tokens]

    def _encode(self, items: Tensor) -> Tensor:
        if self.layer is None:
            output = self.model(items).last_hidden_state
        else:
            layers: Any = self.model.get_submodule(self._layers)
            output = _output_of(layers[self.layer], lambda: self.model(items))
        return output if output.ndim == 3 else output.flatten(2).transpose(1, 2)  # a grid [n, dim, height, width]

    def _shortened(self, tower: nn.Module, layer: int, architecture: str) -> nn.Module:
        """The tower without the layers behind the chosen one; sets ``self.layer``, None for the last."""
        layers: Any = tower.get_submodule(self._layers)
        chosen = chosen_layer(layer, len(layers), architecture)
        self.layer = None if chosen == len(layers) - 1 else chosen
        del layers[chosen + 1 :]
        return tower

    def _probe(self) -> Tensor:
        """[1, tokens, dim] without values, with a graph."""
        transform: Any = self.transform
        with torch.device("cpu"):
            shape = transform((torch.zeros(1, 1), transform.windows.rate)).shape
        self.model.eval().requires_grad_(True)
        try:
            with torch.device("meta"), torch.enable_grad():
                return self._encode(torch.zeros(shape))
        except Exception as error:  # the library raises whatever does not fit makes it raise
            reason = one_line(error, 200)
            raise ValueError(
                f"features: items {list(shape[1:])} do not fit {type(self.model).__name__} with this layer and length "
                f"({type(error).__name__}: {reason}); correct features, seconds or layer"
            ) from error
        finally:
            self.model.train()

    def _frames(self, output: Tensor, config: Any) -> int:
        """Tokens that lie within a window: all, unless they are positions in a fixed time that the window does not fill."""
        transform: Any = self.transform
        tokens, fixed = output.shape[1], transform.fixed
        if fixed is None or tokens != getattr(config, "max_source_positions", None):
            return tokens
        return math.ceil(tokens * transform.windows.seconds / fixed - 1e-9)


class _ReachedError(Exception):
    """Carries the output of the chosen layer out of the model: nothing behind it has to run, or to fit."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output if isinstance(output, Tensor) else output[0]


def _output_of(layer: nn.Module, run: Callable[[], object]) -> Tensor:
    """What ``layer`` gives while ``run`` runs, which ends there."""

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        raise _ReachedError(output)

    handle = layer.register_forward_hook(stop)
    try:
        run()
    except _ReachedError as reached:
        return reached.output
    finally:
        handle.remove()
    raise RuntimeError(f"{type(layer).__name__} was never called")
