"""Recordings to what an audio model of transformers takes, by the library's own feature extractor."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_factory import hint, one_line
from mllm_factory.components.encoders.sound import Windows
from mllm_factory.components.encoders.towers import require_agreement

SHORTEST = 0.1
"""Seconds; shorter windows are continued with silence first, because a spectrum needs a few frames."""

FILES = ("preprocessor_config.json", "processor_config.json")


class LibraryFeatures:
    """A recording to model inputs: windows of at most ``seconds``, each through a feature extractor of transformers.

    An extractor of fixed length (Whisper, AST, CLAP) fills a shorter window up in its own way: Whisper and AST with silence,
    CLAP with repetitions. Raw waveforms (wav2vec 2.0 and its relatives) are filled with silence by the extractor, too, and
    normalised with it, or without it where ``return_attention_mask`` is true. Other extractors are given whole windows.

    Args:
        extractor: the library's feature extractor.
        seconds: length of a window.
        max_windows: most windows of one recording; None for any number.

    Raises:
        ValueError: a window that is longer than the extractor takes, or of no length.
    """

    def __init__(self, extractor: Any, seconds: float, max_windows: int | None) -> None:
        self.windows = Windows(extractor.sampling_rate, seconds, max_windows)
        self.extractor, self.fixed = extractor, fixed_seconds(extractor)
        if self.fixed is not None and seconds > self.fixed:
            raise ValueError(
                f"seconds: {seconds:g} s are more than the {self.fixed:g} s that this model takes at once; a longer "
                "recording becomes several windows"
            )

    def __call__(self, recording: tuple[Tensor, int]) -> Tensor:
        """([channels, time], Hz) -> [m, *item_shape] float32

        Raises:
            DataError: see ``Windows.chunks``.
        """
        return torch.cat([self._items(chunk) for chunk in self.windows.chunks(recording)])

    def _items(self, chunk: Tensor) -> Tensor:
        rate, options = self.windows.rate, {}
        raw = self.fixed is None and self.extractor.feature_size == 1
        shortest = round(SHORTEST * rate) if raw or self.fixed is not None else self.windows.samples
        chunk = F.pad(chunk, (0, max(0, min(shortest, self.windows.samples) - len(chunk))))
        if raw:
            options = {"padding": "max_length", "max_length": self.windows.samples}
        made = self.extractor(chunk.numpy(), sampling_rate=rate, return_tensors="pt", **options)
        return made[self.extractor.model_input_names[0]].float()


def fixed_seconds(extractor: Any) -> float | None:
    """The length that an extractor brings every recording to, or None."""
    for samples in ("n_samples", "nb_max_samples"):
        if hasattr(extractor, samples):
            return getattr(extractor, samples) / extractor.sampling_rate
    if hasattr(extractor, "num_mel_bins") and hasattr(extractor, "max_length"):
        return extractor.max_length / 100  # Kaldi's frames, 10 ms apart
    return None


# ---------------------------------------------------------------- building


def make_extractor(config: Any, source: Path | str | None, features: dict[str, Any] | None) -> Any:
    """The extractor of a folder or hub id, or a new one of the architecture's class.

    Args:
        config: the model's configuration.
        source: where the extractor's own configuration may lie; None for nowhere.
        features: values of it; where the source brings the whole, they must agree. Sizes that the model fixes follow from
            ``config`` unless they are given.

    Raises:
        ValueError: a value that the class does not have, or a source without an extractor while no values are given.
        ConfigError: a value that differs from the source's.
    """
    with torch.device(
        "cpu"
    ):  # sound is data, also while sizes are checked; torchaudio makes constants when it is imported
        found = None if source is None else _stored(source)
        if found is not None:
            require_agreement(features or {}, vars(found), source, "features")
            return found
        if source is not None and features is None:
            raise ValueError(
                f"features: {source} has no {FILES[0]}; save the feature extractor there, or give its values ({{}} for the "
                "library's defaults)"
            )
        return _new_extractor(config, features or {})


def _stored(source: Path | str) -> Any:
    from transformers import AutoFeatureExtractor

    local = isinstance(source, Path)
    if isinstance(source, Path) and not any((source / name).is_file() for name in FILES):
        return None
    try:
        return AutoFeatureExtractor.from_pretrained(source, local_files_only=local)
    except Exception as error:
        reason = one_line(error, 300)
        raise ValueError(
            f"pretrained: no feature extractor can be loaded from {source} ({type(error).__name__}: {reason})"
        ) from error


def _new_extractor(config: Any, features: dict[str, Any]) -> Any:
    import transformers
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES

    made_by = getattr(transformers, FEATURE_EXTRACTOR_MAPPING_NAMES[config.model_type])
    known = {name for name, p in inspect.signature(made_by.__init__).parameters.items() if p.kind != p.VAR_KEYWORD}
    for name in features:
        if name not in known - {"self"}:
            raise ValueError(f"features: {made_by.__name__} has no '{name}'{hint(name, known - {'self'})}")
    values = {**_following(getattr(config, "audio_config", config), known, features), **features}
    try:
        return made_by(**values)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        reason = one_line(error, 200)
        raise ValueError(f"features: {made_by.__name__} cannot be built with these values ({reason})") from error


def _following(config: Any, known: set[str], features: dict[str, Any]) -> dict[str, Any]:
    """Values of an extractor that a model's sizes leave no choice about."""
    same = [name for name in ("num_mel_bins", "max_length") if name in known and hasattr(config, name)]
    values: dict[str, Any] = {name: getattr(config, name) for name in same}
    if "num_mel_bins" not in known and hasattr(config, "num_mel_bins"):
        values["feature_size"] = config.num_mel_bins
    if "truncation" in known and hasattr(config, "enable_fusion"):
        values["truncation"] = "fusion" if config.enable_fusion else "rand_trunc"  # CLAP's two kinds of spectrogram
    if "chunk_length" in known - set(features) and hasattr(config, "max_source_positions"):
        positions = config.max_source_positions  # two frames of 10 ms to each
        if positions % 50:
            raise ValueError(
                f"sizes: max_source_positions: {positions} are {positions / 50:g} s, but the extractor takes whole seconds; "
                "use a multiple of 50"
            )
        values["chunk_length"] = positions // 50
    return values
