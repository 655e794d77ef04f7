"""The vision tower of any open_clip model (Ilharco et al. 2021; Cherti et al. 2023, arXiv 2212.07143) as an image encoder.

The architecture comes from open_clip's own list of configurations, so it is known offline; the text tower is neither built
nor needed.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mllm_factory import Encoder, locate, on_meta, one_line, read_weights, register, weights_file
from mllm_factory.components.encoders import towers
from mllm_factory.components.encoders.pixels import pixels_of

FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""How open_clip names its weights, best first; the other files of such a folder are those of other libraries."""

ONLY_IN_TRAINING = ("patch_dropout", "output_tokens", "timm_model_pretrained", "timm_drop", "timm_drop_path")
"""Values of a vision configuration that neither shape the tower nor its features."""


@register("open_clip")
class OpenClip(Encoder):
    """One level of an open_clip vision tower, one token a patch or cell, row by row.

    Levels are the blocks of a vision transformer, the stem and stages of CLIP's own ResNet, and timm's feature levels of a
    timm trunk. Neither a final norm nor a projection is applied, and what lies behind the level is cut off.

    Args:
        architecture: name in ``open_clip.list_models()``; None to read it from ``pretrained``.
        pretrained: None for random weights, else a hub id, a local folder or file, or ``pkg://package`` with a whole CLIP
            model in open_clip's format.
        image_size: pixels of a side; None for that of the architecture. Another one resizes the position embedding.
        layer: which level, negative from the end; -2 as in LLaVA.
        prefix_tokens: keep class and register tokens, in front of the patches.
        layout: ``square`` (squash), ``pad`` (mean colour around) or ``anyres`` (overview and tiles, an item each).
        tiles: most tiles of ``anyres``.

    Raises:
        ValueError: unknown architecture or layout, no such layer, a size the architecture cannot take, no prefix tokens to
            keep, weights of another architecture, or open_clip is not installed.
    """

    modality = "vision"

    def __init__(
        self,
        architecture: str | None = None,
        pretrained: str | None = None,
        image_size: int | None = None,
        layer: int = -2,
        prefix_tokens: bool = False,
        layout: str = "square",
        tiles: int = 4,
    ) -> None:
        super().__init__()
        towers.require_library("open_clip", "open_clip_torch")
        source = None if pretrained is None else locate(pretrained)
        config, pixels = _configured(architecture, source)
        name = architecture or str(source)
        if image_size is not None:
            towers.require_picture(image_size)
            config["vision_cfg"]["image_size"] = image_size
        size = _side(config["vision_cfg"].get("image_size", 224), name)
        tower = _tower(config, name)
        if source is not None and not on_meta():
            _load(tower, source)
        self.model = _resized(tower, size, image_size is not None)
        self.prefix_tokens = prefix_tokens
        if prefix_tokens and not _prefixes(self.model):
            raise ValueError(f"prefix_tokens: '{name}' has no class or register tokens; set prefix_tokens: false")
        self.level = towers.level_of(layer, _levels(self.model, name), name)
        _cut(self.model, self.level)
        self.transform = pixels_of(layout, tiles, size, pixels["mean"], pixels["std"])
        self.num_tokens, self.dim = towers.probe(self, size).shape[1:]

    def forward(self, items: Tensor) -> Tensor:
        """[n, 3, image_size, image_size] -> [n, num_tokens, dim]"""
        wanted: dict[str, Any] = {"indices": [self.level], "intermediates_only": True}
        if not self.prefix_tokens:
            return towers.cells(self.model.forward_intermediates(items, **wanted)["image_intermediates"][0])
        out = self.model.forward_intermediates(items, output_extra_tokens=True, **wanted)
        return torch.cat([out["image_intermediates_prefix"][0], towers.cells(out["image_intermediates"][0])], dim=1)


# ---------------------------------------------------------------- architecture


def _configured(architecture: str | None, source: Path | str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's model configuration and the mean and std of its pixels."""
    import open_clip

    found = _found(source)
    if architecture is None:
        if not found:
            raise ValueError(
                f"architecture: {source or 'nothing'} does not say it (no open_clip_config.json at hand); give a name "
                "of open_clip.list_models()"
            )
        return found["model_cfg"], _statistics(None, source, found)
    if architecture not in open_clip.list_models():
        near = towers.near(architecture, open_clip.list_models())
        raise ValueError(f"architecture: open_clip has no '{architecture}'{near}; open_clip.list_models() lists names")
    config: dict[str, Any] = open_clip.get_model_config(architecture)
    if found:
        theirs = found["model_cfg"]
        towers.require_agreement(_flat(config), _flat(theirs), source, f"architecture '{architecture}'")
    return config, _statistics(architecture, source, found)


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """What decides on the vision tower, with open_clip's own defaults filled in."""
    from dataclasses import asdict

    from open_clip.model import CLIPVisionCfg

    vision = {**asdict(CLIPVisionCfg()), **config["vision_cfg"]}
    keys = ["timm_model_name", *(key for key in asdict(CLIPVisionCfg()) if key not in ONLY_IN_TRAINING)]
    chosen = {key: vision[key] for key in keys}  # a timm trunk first: it overrules the values behind it
    return {**chosen, "quick_gelu": config.get("quick_gelu", False), "embed_dim": config["embed_dim"]}


def _found(source: Path | str | None) -> dict[str, Any]:
    """``open_clip_config.json`` beside the weights, or nothing where nobody may be asked for it."""
    if source is None or (isinstance(source, str) and on_meta()):
        return {}
    if isinstance(source, Path):
        return towers.json_in(source, "open_clip_config.json")
    from open_clip.factory import _get_hf_config

    try:
        downloaded: dict[str, Any] = _get_hf_config(source)
    except Exception as error:  # the hub's client has errors of its own
        reason = one_line(error, 200)
        raise ValueError(f"pretrained: {source} has no open_clip_config.json ({reason})") from error
    return downloaded


def _statistics(architecture: str | None, source: Path | str | None, found: dict[str, Any]) -> dict[str, Any]:
    """Mean and std: of the folder, else of that published model of the architecture, else of its first published one."""
    import open_clip
    from open_clip.transform import PreprocessCfg

    tags = open_clip.list_pretrained_tags_by_model(architecture) if architecture else []
    published = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    same = [entry for entry in published if source is not None and entry["hf_hub"].rstrip("/") == str(source)]
    default = PreprocessCfg()
    values = {**(same or published or [{}])[0], **found.get("preprocess_cfg", {})}
    return {"mean": values.get("mean", default.mean), "std": values.get("std", default.std)}


def _side(image_size: Any, name: str) -> int:
    sides = {image_size} if isinstance(image_size, int) else set(image_size)
    if len(sides) != 1:
        raise ValueError(f"architecture: '{name}' takes pictures of {image_size} pixels, not squares; set image_size")
    return int(sides.pop())


def _tower(config: dict[str, Any], name: str) -> Any:
    from open_clip.model import _build_vision_tower

    vision = {**config["vision_cfg"], "patch_dropout": 0.0, "timm_model_pretrained": False}
    try:
        tower = _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
    except Exception as error:  # timm trunks refuse in many ways
        reason = one_line(error, 200)
        raise ValueError(f"architecture: the vision tower of '{name}' cannot be built ({reason})") from error
    if not hasattr(getattr(tower, "trunk", tower), "forward_intermediates"):
        raise ValueError(f"architecture: the vision tower of '{name}' gives no patch tokens; choose another one")
    return tower


# ---------------------------------------------------------------- weights and cutting


def _load(tower: nn.Module, source: Path | str) -> None:
    """The ``visual.`` tensors of a whole CLIP model; open_clip resizes the position embedding to another grid."""
    from open_clip.model import resize_pos_embed

    state = read_weights(_weights_of(source))
    state = {name.removeprefix("module."): value for name, value in state.items()}
    visual = {name: value for name, value in state.items() if name.startswith("visual.")}
    if not visual:
        raise ValueError(
            f"pretrained: {source} has no 'visual.' tensors but '{next(iter(state))}'; give a CLIP model of open_clip"
        )
    resize_pos_embed(visual, SimpleNamespace(visual=tower))
    towers.fill(tower, {name.removeprefix("visual."): value for name, value in visual.items()}, source)


def _weights_of(source: Path | str) -> Path:
    if isinstance(source, str):
        from open_clip.pretrained import download_pretrained_from_hf

        try:
            return Path(download_pretrained_from_hf(source))
        except Exception as error:  # the hub's client has errors of its own
            reason = one_line(error, 200)
            raise ValueError(f"pretrained: {source} cannot be downloaded ({reason})") from error
    named = [source / file for file in FILES if (source / file).is_file()]
    return named[0] if named else weights_file(source)


def _resized(tower: Any, size: int, asked: bool) -> Any:
    """A timm trunk at another size than its own; the other towers were built for it."""
    trunk = getattr(tower, "trunk", None)
    if asked and hasattr(trunk, "set_input_size"):
        try:
            tower.set_input_size(size)
        except (RuntimeError, AssertionError, ValueError, ZeroDivisionError) as error:
            reason = one_line(error, 200)
            raise ValueError(f"image_size: the architecture cannot take {size} pixels ({reason})") from error
    return tower


def _prefixes(tower: Any) -> int:
    """Class and register tokens."""
    if hasattr(tower, "class_embedding"):
        return 1
    return int(getattr(getattr(tower, "trunk", None), "num_prefix_tokens", 0))


def _levels(tower: Any, name: str) -> int:
    if hasattr(tower, "transformer"):
        return len(tower.transformer.resblocks)
    if hasattr(tower, "trunk"):
        return len(tower.trunk.feature_info)
    return 1 + len(_stages(tower))


def _stages(tower: Any) -> list[str]:
    """The residual stages of CLIP's own ResNet; level 0 is the stem in front of them."""
    return [name for name, _ in tower.named_children() if name.startswith("layer")]


def _cut(tower: Any, level: int) -> None:
    """Remove what the level does not see."""
    if hasattr(tower, "transformer"):
        tower.prune_intermediate_layers([level], prune_norm=True)
        tower.attn_pool = None
    elif hasattr(tower, "trunk"):
        tower.trunk.prune_intermediate_layers([level], prune_norm=True)
        tower.head = nn.Identity()
    else:
        for name in _stages(tower)[level:]:
            setattr(tower, name, nn.Identity())
        tower.attnpool = None
