"""The audio tower of a transformers model: its configuration, the model itself, and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mllm_factory import ConfigError, locate, on_meta, one_line, quiet
from mllm_factory.components.encoders.towers import near, require_agreement

STILL: dict[str, Any] = {
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "apply_spec_augment": False,
}
"""Random skipping and masking, which is off: every parameter learns in every step, and no batch changes another's."""


def find_source(pretrained: str | None) -> Path | str | None:
    """A transformers folder, a hub id that may be asked, or None; on the meta device a hub id is not asked.

    Raises:
        ConfigError: it does not exist or cannot be reached.
        ValueError: a file instead of a folder.
    """
    if pretrained is None:
        return None
    found = locate(pretrained)
    if isinstance(found, Path) and not (found / "config.json").is_file():
        raise ValueError(f"pretrained: {found} has no config.json; give a folder written by save_pretrained")
    return found if isinstance(found, Path) or not on_meta() else None


# ---------------------------------------------------------------- configuration


def make_config(
    architecture: str | None, sizes: dict[str, Any], source: Path | str | None, pretrained: str | None
) -> Any:
    """The configuration of the whole model, by name and sizes or as the source has it.

    Raises:
        ValueError: unknown architecture or size, values that do not fit together, or neither architecture nor source.
        ConfigError: the source disagrees with the architecture or a size.
    """
    if architecture is not None:
        _require_known(architecture)
        _require_sizes(architecture, sizes)
    if source is not None:
        config = _stored_config(source)
        if architecture is None:
            _require_known(config.model_type)
            _require_sizes(config.model_type, sizes)
        asked = {} if architecture is None else {"model_type": architecture}
        require_agreement(asked, {"model_type": config.model_type}, source, "architecture")
        require_agreement(sizes, {name: getattr(audio_part(config), name) for name in sizes}, source, "sizes")
    elif architecture is None:
        raise ValueError(
            "architecture: needed for random weights"
            if pretrained is None
            else f"architecture: the configuration of '{pretrained}' is not on this machine; name the architecture, too"
        )
    else:
        config = _new_config(architecture, sizes)
    part = audio_part(config)
    for name in STILL:
        if hasattr(part, name):
            setattr(part, name, STILL[name])
    return config


def audio_part(config: Any) -> Any:
    """The configuration of the audio tower within that of the whole."""
    return getattr(config, "audio_config", config)


def known_architectures() -> list[str]:
    """Model types of transformers that have a feature extractor for sound and a model without a head."""
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(set(FEATURE_EXTRACTOR_MAPPING_NAMES) & set(MODEL_MAPPING_NAMES))


def _require_known(architecture: str) -> None:
    if architecture not in (known := known_architectures()):
        raise ValueError(
            f"architecture: transformers has no audio model '{architecture}'{near(architecture, known)}; such as whisper, "
            "wav2vec2, hubert, wavlm, audio-spectrogram-transformer, clap"
        )


def _require_sizes(architecture: str, sizes: dict[str, Any]) -> None:
    """Refuse what transformers would swallow: values its configuration does not know."""
    from transformers import CONFIG_MAPPING

    part = audio_part(CONFIG_MAPPING[architecture]())
    known = {name for name in (*part.to_dict(), *part.attribute_map) if not name.startswith("decoder_")}
    for name in sizes:
        if name in STILL:
            raise ValueError(f"sizes: '{name}' is always {STILL[name]} here, so that every parameter learns; remove it")
        if name not in known:
            raise ValueError(f"sizes: the configuration of '{architecture}' has no '{name}'{near(name, known)}")


def _stored_config(source: Path | str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, local_files_only=isinstance(source, Path))
    except Exception as error:
        raise ValueError(
            f"pretrained: {source} has no configuration that can be read ({one_line(error, 300, kind=True)})"
        ) from error


def _new_config(architecture: str, sizes: dict[str, Any]) -> Any:
    """The configuration with these sizes; a decoder, which is never built, gets those of its encoder so that they fit."""
    from transformers import CONFIG_MAPPING

    made_by: Any = CONFIG_MAPPING[architecture]
    composite = hasattr(made_by(), "audio_config")
    try:
        if composite:
            return made_by(audio_config=sizes)
        twins = {
            f"decoder_{name.removeprefix('encoder_')}": sizes[name] for name in sizes if name.startswith("encoder_")
        }
        return made_by(**{name: value for name, value in twins.items() if hasattr(made_by(), name)}, **sizes)
    except Exception as error:
        raise ValueError(f"sizes: they do not fit '{architecture}' ({one_line(error, 300, kind=True)})") from error


# ---------------------------------------------------------------- model


def empty_tower(config: Any) -> tuple[nn.Module, str]:
    """The audio tower without values, and its name within the whole model (empty where it is the whole)."""
    from transformers import MODEL_MAPPING

    try:
        with torch.device("meta"):
            made_by: Any = MODEL_MAPPING[type(config)]
            whole = made_by(config)
    except Exception as error:
        raise ValueError(
            f"sizes: '{config.model_type}' cannot be built with them ({one_line(error, 300, kind=True)})"
        ) from error
    for name in ("audio_tower", "audio_model"):
        if isinstance(getattr(whole, name, None), nn.Module):
            return getattr(whole, name), name
    if isinstance(getattr(whole, "encoder", None), nn.Module) and hasattr(whole, "decoder"):
        return whole.encoder, "encoder"
    return whole, ""


def filled_tower(empty: Any, name: str, source: Path | str | None) -> nn.Module:
    """The same tower with memory: random, or with the weights of the source.

    Raises:
        ValueError: the source's weights cannot be read, or lack tensors of the tower.
    """
    kind: Any = type(empty)
    if source is None:
        return kind(empty.config)
    renamed = {rf"^(?:\w+\.)?{name}\.": ""} if name else None
    try:
        with quiet():
            model, report = kind.from_pretrained(
                source,
                config=empty.config,
                dtype=torch.float32,
                key_mapping=renamed,
                local_files_only=isinstance(source, Path),
                output_loading_info=True,
            )
    except Exception as error:
        raise ValueError(f"pretrained: {source} cannot be loaded ({one_line(error, 300, kind=True)})") from error
    lacking = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if lacking:
        raise ConfigError(
            f"pretrained: {source} does not fill {len(lacking)} tensors of {kind.__name__}, such as {lacking[0]}; is it "
            "complete, and of this architecture?"
        )
    return model.train()


def name_of_layers(tower: nn.Module) -> str:
    """The name of the list of a tower's transformer layers: the largest one whose members have attention.

    Raises:
        ValueError: there is none.
    """
    lists = [(name, module) for name, module in tower.named_modules() if isinstance(module, nn.ModuleList)]
    having = [
        (sum(p.numel() for p in module.parameters()), name)
        for name, module in lists
        if len(module) and any("Attention" in type(inner).__name__ for inner in module[0].modules())
    ]
    if not having:
        raise ValueError(f"architecture: {type(tower).__name__} has no transformer layers to choose from")
    return max(having)[1]
