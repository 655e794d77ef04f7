"""The encoders of torchaudio's RNN-T recognisers, without what turns their frames into words.

Emformer: Shi et al. 2021, arXiv:2010.10759; Conformer: Gulati et al. 2020, arXiv:2005.08100. Spectrogram, sizes and the names
of tensors are those of torchaudio's pipeline and of its LibriSpeech recipes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mllm_factory import (
    BUNDLE,
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
from mllm_factory.components.encoders.audio_cut import chosen_layer
from mllm_factory.components.encoders.downloads import HOST, Download, awaited
from mllm_factory.components.encoders.rnnt_models import RECIPES, Bands, Recipe

PREFIX = "transcriber."
"""What names begin with in the file of a whole recogniser."""

STATISTICS = "global_stats*.json"
"""The file with the mean of each band and one over its standard deviation, as torchaudio's recipes write it."""


@register("rnnt")
class Rnnt(Encoder):
    """Log-mel frames, four of them a token, through Emformer or Conformer: a token for 40 ms.

        x = (l - mean) / std,  l the frames of ``Bands``, mean and std of each band over the training data

    Emformer reads segments of 160 ms; each of its layers looks back 1.2 s, none further ahead than 40 ms behind the segment, so
    that later sound changes no token. Conformer reads the whole window. With ``pretrained``, mean and std come from the
    ``global_stats*.json`` beside the weights; with random weights they are 0 and 1.

    Args:
        architecture: ``emformer_rnnt_base`` or ``conformer_rnnt_base``.
        sizes: changes to its sizes, such as ``encoding_dim``; None for none.
        pretrained: None for random weights, ``bundle`` for torchaudio's own (Emformer; downloaded once), or a local folder or
            file with a ``state_dict`` of the recogniser or of its transcriber.
        layer: which layer; negative from the end. The last one is the encoder's own output, behind its linear layer and norm;
            any other is the layer's bare output, and what lies behind it is cut off.
        seconds: length of a window; a longer recording becomes several items.
        max_windows: most windows of one recording; None for any number.

    Raises:
        ValueError: unknown architecture or size, no such layer, sizes that do not fit together, or a window too short.
        ConfigError: weights or statistics that cannot be found or are of another architecture.
    """

    modality = "audio"
    mean: Tensor
    invstddev: Tensor

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
        if architecture not in RECIPES:
            raise ValueError(
                f"architecture: torchaudio has no recogniser '{architecture}'{hint(architecture, RECIPES)}"
            )
        self.recipe = RECIPES[architecture]
        values = _sizes(self.recipe, sizes or {}, architecture)
        self.transform = Bands(values["input_dim"], seconds, max_windows)
        self.model = _made(self.recipe, values)
        self.register_buffer("mean", torch.zeros(values["input_dim"]))
        self.register_buffer("invstddev", torch.ones(values["input_dim"]))
        self._fill(pretrained, architecture)
        self._cut(chosen_layer(layer, len(self.recipe.layers(self.model)), architecture))
        self.num_tokens, self.dim = self._probe(values).shape[1:]

    def forward(self, items: Tensor) -> Tensor:
        """[n, frames, bands] -> [n, num_tokens, dim]"""
        return self.recipe.run(self.model, (items - self.mean) * self.invstddev)

    def _fill(self, pretrained: str | None, architecture: str) -> None:
        """Weights and statistics, or on the meta device a word on what is awaited."""
        if pretrained is None:
            return
        downloads = [Download(f"{HOST}/{path}", f"torchaudio/{path}") for path in self.recipe.assets]
        if pretrained == BUNDLE:
            if not downloads:
                raise ConfigError(f"pretrained: torchaudio offers no weights of '{architecture}'; give a file, or null")
            if on_meta():
                self.absent = awaited(downloads)
                return
            weights, statistics = (download.fetched() for download in downloads)
        else:
            found = locate(pretrained)
            if not isinstance(found, Path):
                raise ConfigError(
                    f"pretrained: '{pretrained}' is no local file, and such weights are on no hub; give a path"
                )
            if on_meta():
                return
            weights = weights_file(found)
            statistics = _statistics_beside(weights)
        state = read_weights(weights)
        whole = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        load_matching(self.model, whole or state)
        mean, invstddev = _read_statistics(statistics, len(self.mean))
        self.mean.copy_(mean)
        self.invstddev.copy_(invstddev)

    def _cut(self, layer: int) -> None:
        """Take away what lies behind a layer; nothing behind the last."""
        layers = self.recipe.layers(self.model)
        if layer < len(layers) - 1:
            del layers[layer + 1 :]
            self.model.output_linear = self.model.layer_norm = nn.Identity()

    def _probe(self, values: dict[str, Any]) -> Tensor:
        """[1, tokens, dim] without values."""
        transform = cast(Bands, self.transform)
        with torch.device("meta"), torch.no_grad():
            empty: Any = _made(self.recipe, {**values, self.recipe.depth: 1})
            if isinstance(self.model.output_linear, nn.Identity):
                empty.output_linear = empty.layer_norm = nn.Identity()
            try:
                found = self.recipe.run(empty, torch.zeros(1, transform.frames, transform.mels))
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"seconds: {transform.windows.seconds:g} s do not fit these sizes ({one_line(error, 200)})"
                ) from error
        if found.shape[1] < 1:
            raise ValueError(f"seconds: {transform.windows.seconds:g} s give no token with these sizes; use 1 or more")
        return found


def _sizes(recipe: Recipe, sizes: dict[str, Any], architecture: str) -> dict[str, Any]:
    for name in sizes:
        if name not in recipe.sizes:
            raise ValueError(f"sizes: '{architecture}' has no '{name}'{hint(name, recipe.sizes)}")
    values = {**recipe.sizes, **sizes}
    if values[recipe.depth] < 1:
        raise ValueError(f"sizes: {recipe.depth}: {values[recipe.depth]} layers are none; use 1 or more")
    return values


def _made(recipe: Recipe, values: dict[str, Any]) -> Any:
    try:
        return recipe.make(**values)
    except (RuntimeError, ValueError, TypeError, AssertionError, ZeroDivisionError) as error:
        raise ValueError(f"sizes: they do not fit together ({one_line(error, 200)})") from error


# ---------------------------------------------------------------- statistics


def _statistics_beside(weights: Path) -> Path:
    found = sorted(weights.parent.glob(STATISTICS))
    if len(found) != 1:
        raise ConfigError(
            f"pretrained: {len(found)} files {STATISTICS} lie beside {weights}, one is needed: the weights were trained on bands "
            "of mean 0 and variance 1; put the one of their training data there"
        )
    return found[0]


def _read_statistics(file: Path, bands: int) -> list[Tensor]:
    """Mean and one over the standard deviation, [bands] each."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        found = [torch.tensor(saved[name], dtype=torch.float32) for name in ("mean", "invstddev")]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"pretrained: {file} holds no mean and invstddev ({one_line(error, 200, kind=True)})"
        ) from error
    if any(value.shape != (bands,) or not value.isfinite().all() for value in found):
        raise ConfigError(
            f"pretrained: mean and invstddev in {file} are no lists of {bands} numbers, one for each band"
        )
    return found
