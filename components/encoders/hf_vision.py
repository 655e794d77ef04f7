"""The vision transformers of transformers as image encoders: CLIP, SigLIP, DINOv2, DINOv3, ViT, BEiT and their like.

``layer`` and ``select`` mean what they mean in LLaVA (Liu et al. 2023, arXiv 2304.08485): hidden states [L + 1] of the tower,
[0] the embeddings, [-2] those behind the last but one block; ``patch`` without and ``cls_patch`` with what stands in front.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mllm_factory import Encoder, hint, locate, register
from mllm_factory.components.encoders import hf_source, towers
from mllm_factory.components.encoders.pixels import pixels_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@register("hf_vision")
class HFVision(Encoder):
    """One hidden state of a vision transformer of transformers, one token a patch, row by row.

    Blocks, final norm and pooling are found by structure. A hidden state is what it is in transformers: before the final
    norm; the last one (``layer: -1``) is the tower's own output, after the final norm where the library applies it to patches
    (SigLIP and DINOv2 do, CLIP does not). What lies behind the hidden state is cut off, so every parameter has influence.

    Args:
        architecture: model type of a vision tower (``clip_vision_model``, ``siglip_vision_model``, ``dinov2``, ...); None to
            read it from ``pretrained``.
        sizes: config values of that architecture; the others have transformers' defaults.
        pretrained: None for random weights, else a hub id, a local folder or ``pkg://package``; of a whole CLIP or SigLIP
            model the vision tower is taken.
        image_size: pixels of a side; None for that of the model. Another one interpolates the position embedding.
        layer: which hidden state: 0 the embeddings, negative from the end.
        select: ``patch``, or ``cls_patch`` to keep the class token (and registers) in front of the patches.
        layout: ``square`` (squash), ``pad`` (mean colour around) or ``anyres`` (overview and tiles, an item each).
        tiles: most tiles of ``anyres``.

    Raises:
        ValueError: unknown architecture, size, layer, select or layout; a picture size that the model cannot take; a tower
            that gives no patch tokens; or weights of another architecture or other sizes.
    """

    modality = "vision"

    def __init__(
        self,
        architecture: str | None = None,
        sizes: dict[str, Any] | None = None,
        pretrained: str | None = None,
        image_size: int | None = None,
        layer: int = -2,
        select: str = "patch",
        layout: str = "square",
        tiles: int = 4,
    ) -> None:
        super().__init__()
        towers.require_library("transformers", "transformers")
        if select not in ("patch", "cls_patch"):
            raise ValueError(f"select: '{select}'{hint(select, ['patch', 'cls_patch'])}")
        source = None if pretrained is None else locate(pretrained)
        config = hf_source.configured(architecture, sizes or {}, source)
        native, patch = _side(config, "image_size"), _side(config, "patch_size")
        size = native if image_size is None else image_size
        if size < patch:
            raise ValueError(f"image_size: {size} pixels are less than one patch of {patch}; use {native}")
        states = 1 + config.num_hidden_layers
        if not -states <= layer < states:
            raise ValueError(
                f"layer: {layer} is out of range, '{config.model_type}' has {states} hidden states (0 to {states - 1})"
            )
        self.model, lacking = hf_source.made(config, source)
        self.options = _options(self.model, size != native)
        self.patches, self.skipped = (size // patch) ** 2, 0
        _cut(self.model, layer % states, last=layer % states == states - 1)
        shape, unused = towers.traced(self, size)
        self._measure(shape, select)
        self._drop(unused)
        hf_source.require_filled(self.model, lacking, source)
        self.transform = pixels_of(layout, tiles, size, *hf_source.statistics(config, source))

    def forward(self, items: Tensor) -> Tensor:
        """[n, 3, image_size, image_size] -> [n, num_tokens, dim]"""
        return self.model(pixel_values=items, **self.options).last_hidden_state[:, self.skipped :]

    def _drop(self, names: set[str]) -> None:
        """Remove parameters without influence: pooling heads, a norm of the class token alone, mask tokens."""
        for name, child in self.model.named_children():
            held = {f"model.{name}.{inner}" for inner, _ in child.named_parameters()}
            if held and held <= names:
                setattr(self.model, name, nn.Identity())
                names -= held
        for name in names:  # the code may still touch what has no influence, so it stays as a constant
            path, _, leaf = name.rpartition(".")
            owner, value = self.get_submodule(path), self.get_parameter(name).detach()
            delattr(owner, leaf)
            owner.register_buffer(leaf, value, persistent=False)

    def _measure(self, shape: tuple[int, ...], select: str) -> None:
        """Count tokens in the [1, tokens, dim] that the tower gives."""
        name = self.model.config.model_type
        prefix = shape[1] - self.patches if len(shape) == 3 else -1
        if prefix < 0:
            raise ValueError(
                f"architecture: '{name}' gives {list(shape[1:])} for {self.patches} patches, so it has no token of each "
                "patch; use a plain vision transformer, or the encoder timm"
            )
        if select == "cls_patch" and not prefix:
            raise ValueError(f"select: '{name}' has no class token; use select: patch")
        self.skipped = prefix if select == "patch" else 0
        self.num_tokens, self.dim = shape[1] - self.skipped, shape[2]


def _side(config: PretrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    side = sides.pop()
    if sides or not isinstance(side, int):
        raise ValueError(
            f"architecture: '{config.model_type}' has {name} {value}, so it does not take square pictures of a fixed size; "
            "use a plain vision transformer"
        )
    return side


def _options(model: nn.Module, other_size: bool) -> dict[str, Any]:
    """What the tower is called with; some interpolate their positions only when told to."""
    parameters = inspect.signature(model.forward).parameters
    free = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [
        name for name, p in parameters.items() if p.default is p.empty and p.kind not in free and name != "pixel_values"
    ]
    if needed or "pixel_values" not in parameters:
        raise ValueError(
            f"architecture: {type(model).__name__} needs {', '.join(needed) or 'no pixel_values'}, not a square picture "
            "alone; use a plain vision transformer"
        )
    if "noise" in parameters:
        raise ValueError(
            f"architecture: {type(model).__name__} hides patches at random and changes their order; use vit with its weights"
        )
    told = other_size and "interpolate_pos_encoding" in parameters
    return {"interpolate_pos_encoding": True} if told else {}


def _blocks(model: Any) -> str:
    """Name of the list that holds the transformer blocks, found by its length."""
    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return str(name)
    raise ValueError(
        f"architecture: {type(model).__name__} keeps its {count} blocks in no ModuleList, so its layers cannot be told apart"
    )


def _cut(model: Any, kept: int, last: bool) -> None:
    """Keep the first blocks; before the last hidden state also drop the norm and head behind them."""
    blocks = _blocks(model)
    del model.get_submodule(blocks)[kept:]
    model.config.num_hidden_layers = kept
    behind = False
    for name, child in model.named_children():
        if behind and not last and next(child.parameters(), None) is not None:
            setattr(model, name, nn.Identity())
        behind = behind or name == blocks.partition(".")[0]
