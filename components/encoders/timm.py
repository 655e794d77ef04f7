"""Any timm model as an image encoder: patches of a vision transformer, or the cells of a convolutional feature map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from mllm_factory.components.encoders import towers
from mllm_factory.components.encoders.pixels import pixels_of


@register("timm")
class Timm(Encoder):
    """One feature level of a timm model, one token a patch or cell, row by row.

    The final norm is not applied, and what lies behind the chosen level is cut off, so every parameter has influence.

    Args:
        architecture: name in timm's list of models.
        pretrained: None for random weights, else a hub id, a local folder or file, or ``pkg://package``.
        match: how weights find their tensors: ``name``, with timm's own conversions (other position grids, other
            libraries' names), or ``order``, for a port of the same architecture that names its tensors differently.
        image_size: pixels of a side.
        layer: index into timm's list of feature levels; negative from the end.
        prefix_tokens: keep class and register tokens, in front of the patches.
        layout: ``square`` (squash), ``pad`` (mean colour around) or ``anyres`` (overview and tiles, an item each).
        tiles: most tiles of ``anyres``.

    Raises:
        ValueError: unknown architecture or layout, no such layer, a size the architecture cannot take, no prefix tokens to
            keep, or timm is not installed.
    """

    modality = "vision"

    def __init__(
        self,
        architecture: str,
        pretrained: str | None = None,
        match: str = "name",
        image_size: int = 224,
        layer: int = -1,
        prefix_tokens: bool = False,
        layout: str = "square",
        tiles: int = 4,
    ) -> None:
        super().__init__()
        towers.require_library("timm", "timm")
        self.prefix_tokens = prefix_tokens
        model = _create(architecture, pretrained, match, image_size)
        if prefix_tokens and not getattr(model, "num_prefix_tokens", 0):
            raise ValueError(
                f"architecture: '{architecture}' has no class or register tokens; set prefix_tokens: false"
            )
        self.layer = towers.level_of(layer, len(model.feature_info), architecture)
        model.prune_intermediate_layers([self.layer], prune_norm=True)
        self.model = model
        self.transform = pixels_of(layout, tiles, image_size, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
        self.num_tokens, self.dim = towers.probe(self, image_size).shape[1:]

    def forward(self, items: Tensor) -> Tensor:
        """[n, 3, image_size, image_size] -> [n, num_tokens, dim]"""
        wanted: dict[str, Any] = {"indices": [self.layer], "intermediates_only": True}
        if not self.prefix_tokens:
            return towers.cells(self.model.forward_intermediates(items, **wanted)[-1])
        patches, prefix = self.model.forward_intermediates(items, return_prefix_tokens=True, **wanted)[-1]
        return torch.cat([prefix, towers.cells(patches)], dim=1)


def _create(architecture: str, pretrained: str | None, match: str, image_size: int) -> Any:
    import timm

    towers.require_picture(image_size)
    if not timm.is_model(architecture):
        raise ValueError(f"architecture: timm has no '{architecture}'{_near(architecture)}")
    if match not in ("name", "order"):
        raise ValueError(f"match: '{match}'{hint(match, ['name', 'order'])}")
    config: Any = timm.get_pretrained_cfg(architecture)
    size: dict[str, Any] = {"img_size": image_size} if config.fixed_input_size else {}
    source = None if pretrained is None else locate(pretrained)
    if isinstance(source, Path):
        source = weights_file(source)
    if source is None or on_meta():
        model = timm.create_model(architecture, **size)
    elif match == "order":
        model = timm.create_model(architecture, **size)
        load_matching(model, _read(source), "order")
    else:
        model = _created_with(architecture, _read(source), str(source), size)
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"architecture: timm's '{architecture}' gives no feature levels (it has no forward_intermediates)"
        )
    return model


def _near(architecture: str) -> str:
    import timm

    named = timm.list_models(f"*{architecture}*")[:5] or timm.list_models(f"*{architecture.partition('_')[0]}*")
    return f"{towers.near(architecture, named or timm.list_models())}; timm.list_models('*vit*') lists names"


def _read(source: Path | str) -> dict[str, Tensor]:
    if isinstance(source, Path):
        return read_weights(source)
    from timm.models import load_state_dict_from_hf

    return load_state_dict_from_hf(source, weights_only=True)


def _created_with(architecture: str, weights: dict[str, Tensor], source: str, size: dict[str, Any]) -> nn.Module:
    """The model filled by timm, which converts names and position grids; a classifier is as wide as the weights' own."""
    import timm

    config: Any = timm.get_pretrained_cfg(architecture)
    classes = config.num_classes
    if f"{config.classifier}.weight" in weights:
        classes = len(weights[f"{config.classifier}.weight"])
    elif (
        f"{config.first_conv}.weight" in weights
    ):  # timm's own names, so the classifier is missing, not named differently
        classes = 0
    overlay = {"state_dict": weights, "num_classes": classes, "label_offset": 0}  # equal numbers make timm strict
    try:
        return timm.create_model(
            architecture, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **size
        )
    except (RuntimeError, KeyError) as error:
        reason = one_line(error)
        raise ConfigError(
            f"{source} does not fit '{architecture}': {reason[:300]}; is it another architecture?"
        ) from error
