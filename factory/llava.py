"""A model as a folder of transformers' ``LlavaForConditionalGeneration``, where it is one.

Nothing is decided by names of components. Parts that keep a transformers model as ``.model`` are put together as LLaVA does
(Liu et al. 2023, arXiv 2304.08485): logits = head(decoder([E(text) with P(V(picture)) in the places of <image>])). Then both
models answer one question about one picture: unless the logits are equal, the folder is not written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mllm_factory.model import MultimodalModel

IMAGE_TOKEN = "<image>"
ACTIVATIONS: dict[type, str] = {nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh"}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest difference of logits, relative to the largest logit."""


class MisfitError(Exception):
    """Why a model is no LLaVA."""


@torch.no_grad()
def write(model: MultimodalModel, folder: Path) -> None:
    """Write model, tokenizer and processor.

    Raises:
        MisfitError: the parts do not fit LLaVA; says why.
    """
    processor, size = _processor(model)
    token = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    language = _transformers_model(model.backbone, "backbone")
    rows = language.get_input_embeddings().weight.shape[0]
    if token >= rows:
        language.resize_token_embeddings(token + 1, mean_resizing=False)
    try:
        made = _assembled(model, token)
        _require_equal(model, made, token, size)
    except MisfitError:
        if token >= rows:
            language.resize_token_embeddings(rows)
        raise
    made.save_pretrained(folder)
    processor.save_pretrained(folder)


# ---------------------------------------------------------------- weights


def _assembled(model: MultimodalModel, token: int) -> Any:
    """LLaVA with the model's own modules as its parts; only the vision tower is copied, to fill what was cut off."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    language, tower = (
        _transformers_model(model.backbone, "backbone"),
        _transformers_model(model.encoders["vision"], "vision"),
    )
    first, act, last = _two_layers(model.projectors["vision"])
    if first.out_features != model.backbone.dim:
        raise MisfitError(f"the projector is {first.out_features} wide inside, LLaVA's {model.backbone.dim}")
    prefix = _prefix_tokens(model)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=token,
        image_seq_length=model.tokens_per_item["vision"],
        projector_hidden_act=ACTIVATIONS[type(act)],
        vision_feature_select_strategy="default" if prefix else "full",
        vision_feature_layer=-1,
        multimodal_projector_bias=first.bias is not None,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    config.dtype = language.dtype
    with torch.device("meta"):
        try:
            made: Any = LlavaForConditionalGeneration(config)
        except (ValueError, KeyError) as error:
            raise MisfitError(f"transformers cannot build it as LLaVA: {error}") from error
    if type(made.model.language_model) is not type(language.get_decoder()):
        raise MisfitError(f"LLaVA knows no decoder {type(language.get_decoder()).__name__}")
    made.model.vision_tower = _filled(tower).to(language.dtype)
    made.model.multi_modal_projector = _projector(first, act, last).to(language.dtype)
    made.model.language_model, made.lm_head = language.get_decoder(), language.get_output_embeddings()
    made.generation_config = language.generation_config
    return made.eval()


def _transformers_model(part: Any, name: str) -> Any:
    from transformers import PreTrainedModel

    found = getattr(part, "model", None)
    if not isinstance(found, PreTrainedModel):
        raise MisfitError(f"{name} is {type(part).__name__}, which holds no transformers model")
    return found


def _two_layers(projector: nn.Module) -> tuple[nn.Linear, nn.Module, nn.Linear]:
    """The projector's linear layers and what stands between."""
    leaves = [m for m in projector.modules() if not list(m.children())]
    kinds = [type(m) for m in leaves]
    if len(leaves) != 3 or kinds[0] is not nn.Linear or kinds[2] is not nn.Linear or kinds[1] not in ACTIVATIONS:
        raise MisfitError(f"the projector {type(projector).__name__} is no linear layer, activation, linear layer")
    first, act, last = leaves
    if getattr(act, "approximate", "none") != "none" or (first.bias is None) != (last.bias is None):
        raise MisfitError("the projector's activation is an approximation, or one of its layers alone has a bias")
    return first, act, last  # type: ignore[return-value]


def _projector(first: nn.Linear, act: nn.Module, last: nn.Linear) -> nn.Module:
    """LLaVA's projector with copies of these layers under its names."""
    from transformers import LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config: Any = LlavaConfig(
        projector_hidden_act=ACTIVATIONS[type(act)], multimodal_projector_bias=first.bias is not None
    )
    config.vision_config.hidden_size, config.text_config.hidden_size = first.in_features, last.out_features
    made = LlavaMultiModalProjector(config)
    for ours, theirs in ((first, made.linear_1), (last, made.linear_2)):
        theirs.load_state_dict(ours.state_dict())
    return made


def _filled(tower: Any) -> Any:
    """A whole vision tower with the weights of one whose end was cut off; what lies behind the cut is not used."""
    from transformers import AutoModel

    whole = AutoModel.from_config(tower.config, dtype=tower.dtype)
    lacking = whole.load_state_dict(tower.state_dict(), strict=False)
    if lacking.unexpected_keys:
        raise MisfitError(f"the vision tower has tensors of its own, such as {lacking.unexpected_keys[0]}")
    return whole


def _prefix_tokens(model: MultimodalModel) -> bool:
    """Whether a token stands in front of the patches and is left out, as LLaVA's strategy ``default`` does."""
    encoder: Any = model.encoders["vision"]
    side = int(encoder.model.config.image_size) // int(encoder.model.config.patch_size)
    shown = encoder.model(
        pixel_values=torch.zeros(1, 3, encoder.model.config.image_size, encoder.model.config.image_size)
    )
    tokens = shown.last_hidden_state.shape[1]
    if encoder.num_tokens not in (tokens, tokens - 1) or tokens not in (side * side, side * side + 1):
        raise MisfitError(f"the encoder gives {encoder.num_tokens} of the tower's {tokens} tokens")
    return bool(encoder.num_tokens == tokens - 1)


# ---------------------------------------------------------------- text and pictures


def _processor(model: MultimodalModel) -> tuple[Any, int]:
    """LLaVA's processor, and the side of a picture in pixels.

    Raises:
        MisfitError: there is no encoder of pictures, another one besides, or no image processor does what it does.
    """
    from transformers import LlavaProcessor

    if set(model.encoders) != {"vision"}:
        raise MisfitError(
            f"LLaVA sees pictures and nothing else, this model takes {', '.join(model.encoders) or 'text'}"
        )
    tower = _transformers_model(model.encoders["vision"], "vision")
    sides = {getattr(tower.config, name, None) for name in ("image_size", "patch_size")}
    if not all(isinstance(side, int) for side in sides):
        raise MisfitError("the vision tower has no square pictures or patches")
    prefix = _prefix_tokens(model)
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    tokenizer = _with_image_token(model.backbone.tokenizer)
    processor = LlavaProcessor(
        image_processor=_image_processor(model.encoders["vision"], tower.config.image_size),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default" if prefix else "full",
        num_additional_image_tokens=model.tokens_per_item["vision"] - patches + int(prefix),
        chat_template=tokenizer.chat_template,
    )
    return processor, tower.config.image_size


def _with_image_token(tokenizer: Any) -> Any:
    from copy import deepcopy

    made = deepcopy(tokenizer)
    made.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return made


def _image_processor(encoder: Any, size: int) -> Any:
    """The image processor of transformers that treats pictures as the encoder does: squashed, or padded to a square."""
    from transformers import CLIPImageProcessor, LlavaImageProcessor

    mean, std = _statistics(encoder)
    common: dict[str, Any] = {"size": {"height": size, "width": size}, "do_center_crop": False}
    common |= {"image_mean": mean, "image_std": std}
    picture = _picture(3 * size, 2 * size)
    ours = encoder.transform(picture)
    for made in (CLIPImageProcessor(**common), LlavaImageProcessor(**common, do_pad=True)):
        theirs = made(picture, return_tensors="pt")["pixel_values"]
        if theirs.shape == ours.shape and float((theirs - ours).abs().mean()) < 0.02:
            return made
    raise MisfitError("no image processor of transformers fits pictures into squares as the encoder does")


def _statistics(encoder: Any) -> tuple[list[float], list[float]]:
    """Mean m and std s of each channel, from what becomes of black, -m / s, and of white, (1 - m) / s."""
    from PIL import Image

    black, white = (encoder.transform(Image.new("RGB", (64, 64), (v, v, v)))[0, :, 0, 0].double() for v in (0, 255))
    s = 1 / (white - black)
    return [round(float(v), 6) for v in -black * s], [round(float(v), 6) for v in s]


def _picture(width: int, height: int) -> Any:
    """A smooth picture, so that two ways to shrink it agree."""
    from PIL import Image

    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    planes = [127 + 120 * np.sin(6 * x), 255 * y, 127 + 120 * np.cos(5 * (x + y))]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


# ---------------------------------------------------------------- proof


def _require_equal(model: MultimodalModel, made: Any, token: int, size: int) -> None:
    """Compare the logits of both models on one picture and some words."""
    encoder: Any = model.encoders["vision"]
    pixels = encoder.transform(_picture(size, size))
    count = model.tokens_per_item["vision"]
    words = torch.arange(1, 6)
    ids = torch.cat([words[:2], torch.full((count,), token), words[2:]])[None]
    ours = _logits(model, pixels, words, count)
    theirs = made(input_ids=ids, pixel_values=pixels.to(made.dtype)).logits[..., : ours.shape[-1]].float()
    limit = TOLERANCE.get(made.dtype, 1e-5) * float(ours.abs().max())
    if ours.shape != theirs.shape or float((ours - theirs).abs().max()) > limit:
        raise MisfitError("LLaVA built from these parts gives other logits (a scale, a norm or positions of their own)")


def _logits(model: MultimodalModel, pixels: Tensor, words: Tensor, count: int) -> Tensor:
    """[1, 2 + count + 3, V] of two words, a picture and three words."""
    embeds = model.backbone.embed(words[None])
    features = model.features("vision", pixels).to(embeds.dtype)
    whole = torch.cat([embeds[:, :2], features, embeds[:, 2:]], dim=1)
    return model.backbone.logits(model.backbone(whole)).float()
