"""Where an image encoder of transformers comes from: its config, its weights, and the mean and std of its pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mllm_factory import on_meta, one_line
from mllm_factory.components.encoders import towers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
"""Mean and std of ImageNet: DINOv2 was trained with them, though transformers' default for it is another."""


def configured(architecture: str | None, sizes: dict[str, Any], source: Path | str | None) -> PretrainedConfig:
    """The config of a vision tower.

    Raises:
        ValueError: no such architecture or size, nothing that says which architecture, or ``source`` is of another one or
            of other sizes.
    """
    from transformers import CONFIG_MAPPING

    found = _found(source)
    if architecture is None:
        if found is None:
            raise ValueError(
                f"architecture: {source or 'random weights'} cannot say it here; give a model type, such as clip_vision_model"
            )
        if sizes:
            raise ValueError("sizes: they belong to architecture; give it too, or remove them (sizes: {})")
        return found
    _require_known(architecture)
    config_class: Any = CONFIG_MAPPING[architecture]
    config = config_class()
    for name in sizes:
        if name not in {*config.to_dict(), *config.attribute_map}:
            known = [*config.to_dict(), *config.attribute_map]
            raise ValueError(f"sizes: the config of '{architecture}' has no '{name}'{towers.near(name, known)}")
    if found is not None:
        towers.require_agreement({"model_type": architecture}, {"model_type": found.model_type}, source, "architecture")
        towers.require_agreement(sizes, {name: getattr(found, name) for name in sizes}, source, "sizes")
        return found
    try:
        asked: PretrainedConfig = config_class(**sizes)
    except Exception as error:  # strict configs raise types of their own
        raise ValueError(f"sizes: '{architecture}' refuses them ({one_line(error, 200, kind=True)})") from error
    return asked


def _require_known(architecture: str) -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_MAPPING_NAMES, MODEL_MAPPING_NAMES

    tower = f"{architecture}_vision_model"
    if tower in MODEL_MAPPING_NAMES:
        raise ValueError(f"architecture: '{architecture}' is a whole model; its vision tower is '{tower}'")
    if architecture not in MODEL_MAPPING_NAMES or architecture not in CONFIG_MAPPING:
        known = {*MODEL_FOR_IMAGE_MAPPING_NAMES, *(name for name in MODEL_MAPPING_NAMES if "vision" in name)}
        near = towers.near(architecture, sorted(known))
        raise ValueError(
            f"architecture: transformers has no vision tower '{architecture}'{near}; known are clip_vision_model, "
            "siglip_vision_model, dinov2, dinov2_with_registers, dinov3_vit, vit, beit and others"
        )


def _found(source: Path | str | None) -> PretrainedConfig | None:
    """The vision config of a folder or hub id; None where there is none or nobody may be asked."""
    from transformers import AutoConfig

    if source is None or (isinstance(source, str) and on_meta()):
        return None
    if isinstance(source, Path) and not source.is_dir():
        raise ValueError(f"pretrained: {source} is a file; give the folder that holds config.json and the weights")
    try:
        whole = AutoConfig.from_pretrained(source, local_files_only=isinstance(source, Path))
    except Exception as error:  # the hub's client and the readers have errors of their own
        raise ValueError(
            f"pretrained: no config can be read from {source} ({one_line(error, 200, kind=True)})"
        ) from error
    return getattr(whole, "vision_config", whole)


# ---------------------------------------------------------------- model


def made(config: PretrainedConfig, source: Path | str | None) -> tuple[Any, set[str]]:
    """The vision tower in float32, and the names of tensors that ``source`` does not fill.

    Raises:
        ValueError: transformers has no such tower, or cannot build or read it.
    """
    from transformers import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"architecture: '{config.model_type}' is no vision tower that transformers builds by itself")
    model_class: Any = MODEL_MAPPING[type(config)]
    if source is None or on_meta():
        return _new(model_class, config), set()
    local = isinstance(source, Path)
    try:
        with _quiet(bar=not local):
            model, report = model_class.from_pretrained(
                source, config=config, local_files_only=local, output_loading_info=True, dtype=torch.float32
            )
    except Exception as error:  # readers raise types of their own
        raise ValueError(f"pretrained: {source} cannot be loaded ({one_line(error, 200, kind=True)})") from error
    return model, {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}


def _new(model_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    try:
        model: PreTrainedModel = model_class._from_config(config, dtype=torch.float32)
    except Exception as error:  # sizes that do not fit together end in many ways
        raise ValueError(
            f"sizes: '{config.model_type}' cannot be built with them ({one_line(error, 200, kind=True)})"
        ) from error
    return model


@contextmanager
def _quiet(bar: bool) -> Iterator[None]:
    """Without transformers' report of left-over tensors (the whole text tower), and without a progress ``bar`` or with it."""
    from transformers.utils import logging

    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bar:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def require_filled(model: nn.Module, lacking: set[str], source: Path | str | None) -> None:
    """Refuse weights that leave tensors of the kept part unfilled.

    Raises:
        ValueError: names the first of them.
    """
    left = sorted(lacking & set(model.state_dict()))
    if left:
        raise ValueError(
            f"pretrained: {source} does not fill {len(left)} tensors of {type(model).__name__}, such as {left[0]}; is it "
            "another model?"
        )


# ---------------------------------------------------------------- pixels


def statistics(config: PretrainedConfig, source: Path | str | None) -> tuple[list[float], list[float]]:
    """Mean and std of each channel: of the folder's image processor, else of the family's."""
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    mean, std = _of_family(config.model_type)
    if source is None or (isinstance(source, str) and on_meta()):
        return mean, std
    found = get_image_processor_config(source, local_files_only=isinstance(source, Path))
    return found.get("image_mean", mean), found.get("image_std", std)


def _of_family(model_type: str) -> tuple[list[float], list[float]]:
    """Those of the image processor that transformers lists under the longest beginning of the model type."""
    from transformers.models.auto.image_processing_auto import (
        IMAGE_PROCESSOR_MAPPING_NAMES,
        get_image_processor_class_from_name,
    )

    words = model_type.split("_")
    for count in range(len(words), 0, -1):
        names = IMAGE_PROCESSOR_MAPPING_NAMES.get("_".join(words[:count]), {})
        processor: Any = get_image_processor_class_from_name(names["pil"]) if names.get("pil") else None
        mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
        if mean and std and words[0] != "dinov2":
            return list(mean), list(std)
    return IMAGENET
