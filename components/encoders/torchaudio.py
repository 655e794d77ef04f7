"""wav2vec 2.0, HuBERT and WavLM as torchaudio builds them.

wav2vec 2.0: Baevski et al. 2020, arXiv:2006.11477; HuBERT: Hsu et al. 2021, arXiv:2106.07447; WavLM: Chen et al. 2022,
arXiv:2110.13900. The sizes of every pretrained model are those of torchaudio's own list of bundles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_factory import BUNDLE, ConfigError, Encoder, hint, load_matching, locate, on_meta, one_line, register
from mllm_factory.components.encoders.audio_cut import chosen_layer, cut_away, unused
from mllm_factory.components.encoders.downloads import HOST, Download, awaited
from mllm_factory.components.encoders.sound import Windows

IDLE = {"aux_num_out": "a classifier is never built", "encoder_layer_drop": "no layer is ever dropped"}
"""Values of a bundle that have no influence here, and why."""


@register("torchaudio")
class Torchaudio(Encoder):
    """A transformer layer of a self-supervised speech model of torchaudio, one token for 20 ms (320 samples at 16 kHz).

    The features are those of torchaudio's ``extract_features``: the output of the layer itself, without a final norm. What
    lies behind the layer is cut off, and no layer is dropped at random, so every parameter learns in every step.

    Args:
        architecture: name of a bundle in ``torchaudio.pipelines``, such as HUBERT_BASE.
        sizes: changes to the bundle's parameters, such as ``encoder_num_layers``; None for none.
        pretrained: None for random weights, ``bundle`` for torchaudio's own (downloaded once), or a local folder or file
            with a ``state_dict`` of such a model.
        layer: which transformer layer; negative from the end.
        seconds: length of a window; a longer recording becomes several items.
        max_windows: most windows of one recording; None for any number.

    Raises:
        ValueError: unknown architecture or size, no such layer, sizes that do not fit together, or a window too short for
            one token.
        ConfigError: weights that cannot be found or are of another architecture.
    """

    modality = "audio"

    def __init__(
        self,
        architecture: str,
        sizes: dict[str, Any] | None = None,
        pretrained: str | None = None,
        layer: int = -1,
        seconds: float = 10.0,
        max_windows: int | None = None,
    ) -> None:
        super().__init__()
        bundle = _bundle(architecture)
        parameters = _parameters(bundle, sizes or {}, architecture)
        self.transform = Windows(int(bundle.sample_rate), seconds, max_windows)
        self.layer = chosen_layer(layer, parameters["encoder_num_layers"], architecture)
        self._normalize = bool(bundle._normalize_waveform)
        with torch.device("meta"), torch.enable_grad():
            self.model = _model(bundle, parameters)
            features = self._probe(seconds)
            spare = unused(self.model, features)
        self.num_tokens, self.dim = features.shape[1:]
        source = _source(pretrained, bundle)
        if on_meta():
            self.absent = awaited([source]) if isinstance(source, Download) else None
        else:
            self.model = _model(bundle, parameters)
            _load(self.model, source)
        cut_away(self.model, spare)

    def forward(self, items: Tensor) -> Tensor:
        """[n, samples] -> [n, num_tokens, dim]

        Where the model was trained so, a window has zero mean and unit variance: x' = (x - mean x) / sqrt(var x + 1e-5).
        """
        if self._normalize:
            items = F.layer_norm(items, items.shape[-1:])  # each by itself; torchaudio's own wrapper mixes the batch
        return self.model.extract_features(items, num_layers=self.layer + 1)[0][-1]

    def _probe(self, seconds: float) -> Tensor:
        training, transform = self.training, cast(Any, self.transform)
        try:
            return self.eval()(torch.zeros(1, transform.samples))
        except (RuntimeError, ValueError) as error:
            reason = one_line(error, 200)
            raise ValueError(
                f"seconds: the architecture cannot take {seconds:g} s with these sizes ({reason})"
            ) from error
        finally:
            self.train(training)


def _bundle(architecture: str) -> Any:
    from torchaudio import pipelines

    known = {name: value for name, value in vars(pipelines).items() if isinstance(value, pipelines.Wav2Vec2Bundle)}
    if architecture not in known:
        raise ValueError(f"architecture: torchaudio has no bundle '{architecture}'{hint(architecture, known)}")
    return known[architecture]


def _parameters(bundle: Any, sizes: dict[str, Any], architecture: str) -> dict[str, Any]:
    known = set(bundle._params) - set(IDLE)
    for name in sizes:
        if name in IDLE:
            raise ValueError(f"sizes: '{name}' has no effect, {IDLE[name]}; remove it")
        if name not in known:
            raise ValueError(f"sizes: '{architecture}' has no '{name}'{hint(name, known)}")
    if sizes.get("encoder_num_layers", 1) < 1:
        raise ValueError(f"sizes: encoder_num_layers: {sizes['encoder_num_layers']} layers are none; use 1 or more")
    return {**bundle._params, **sizes, "aux_num_out": None, "encoder_layer_drop": 0.0}


def _model(bundle: Any, parameters: dict[str, Any]) -> Any:
    """The model of the bundle's builder, random."""
    from torchaudio import models

    builders = {"Wav2Vec2": models.wav2vec2_model, "WavLM": models.wavlm_model}
    try:
        return builders[bundle._model_type](**parameters)
    except (RuntimeError, ValueError, TypeError, AssertionError, ZeroDivisionError) as error:
        raise ValueError(f"sizes: they do not fit together ({' '.join(str(error).split())[:200]})") from error


# ---------------------------------------------------------------- weights


def _source(pretrained: str | None, bundle: Any) -> Path | Download | None:
    """Where weights come from: a path, torchaudio's own download, or nothing."""
    if pretrained is None:
        return None
    if pretrained == BUNDLE:
        return _download(bundle)
    found = locate(pretrained)
    if isinstance(found, Path):
        return found
    raise ConfigError(
        f"pretrained: '{pretrained}' is no local file, and torchaudio's weights are on no hub; use {BUNDLE} (downloads "
        f"{_download(bundle).url}) or the path of that file"
    )


def _load(model: nn.Module, source: Path | Download | None) -> None:
    if source is not None:
        load_matching(model, source if isinstance(source, Path) else source.fetched())


def _download(bundle: Any) -> Download:
    path = str(bundle._path)
    url = path if path.startswith("https") else f"{HOST}/models/{path}"
    return Download(url, f"checkpoints/{url.rpartition('/')[2]}")
