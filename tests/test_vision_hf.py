"""The hf_vision encoder against transformers used directly: hidden states, tokens, weights of every folder layout, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
)

from mllm_factory import ConfigError, Encoder, build

PLAIN = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
SMALL: dict[str, Any] = {**PLAIN, "intermediate_size": 32}
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {  # sizes, and tokens in front of the 16 patches
    "clip_vision_model": (SMALL, 1),
    "siglip_vision_model": (SMALL, 0),
    "dinov2": (PLAIN, 1),
    "dinov2_with_registers": ({**PLAIN, "num_register_tokens": 4}, 5),
    "dinov3_vit": ({**SMALL, "num_register_tokens": 4}, 5),
    "vit": (SMALL, 1),
    "beit": ({**SMALL, "use_relative_position_bias": True}, 1),
    "deit": (SMALL, 2),
    "aimv2_vision_model": (SMALL, 0),
    "mlcd_vision_model": (SMALL, 1),
}
WITH_POSITIONS = ["clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "vit"]
CLIP = {"name": "hf_vision", "architecture": "clip_vision_model", "sizes": SMALL}


def encoder(**options: Any) -> Any:
    torch.manual_seed(0)
    return build(Encoder, {**CLIP, **options}).eval()


def plain(model_type: str, sizes: dict[str, Any]) -> Any:
    """transformers' own model of the same seed."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**sizes)
    model_class: Any = MODEL_MAPPING[type(config)]
    return model_class._from_config(config).eval()


def pictures(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- hidden states and tokens


@pytest.mark.parametrize("layer", [-2, -1, 0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_that_hidden_state_of_transformers(family: str, layer: int) -> None:
    sizes, prefix = FAMILIES[family]
    ours = encoder(architecture=family, sizes=sizes, layer=layer)
    with torch.no_grad():
        theirs = plain(family, sizes)(pixel_values=pictures(), output_hidden_states=True)
        wanted = theirs.last_hidden_state if layer == -1 else theirs.hidden_states[layer]
        out = ours(pictures())
    assert wanted.shape == (2, prefix + 16, 16)
    assert (ours.num_tokens, ours.dim) == (16, 16)
    assert torch.equal(out, wanted[:, prefix:])
    ours.train()(pictures()).square().sum().backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None] == []


def test_the_last_layer_is_normed_where_transformers_norms_patches() -> None:
    """SigLIP's output is its last hidden state after the final norm; CLIP's norm belongs to the class token alone."""
    siglip = encoder(architecture="siglip_vision_model", layer=-1)
    clip = encoder(layer=-1)
    names = {part.model.config.model_type: {n for n, _ in part.model.named_parameters()} for part in (siglip, clip)}
    assert "post_layernorm.weight" in names["siglip_vision_model"]
    assert "post_layernorm.weight" not in names["clip_vision_model"]
    whole = plain("siglip_vision_model", SMALL)
    with torch.no_grad():
        raw = whole(pixel_values=pictures(), output_hidden_states=True).hidden_states[-1]
        assert torch.equal(siglip(pictures()), whole.post_layernorm(raw))


@pytest.mark.parametrize(("family", "prefix"), [(f, FAMILIES[f][1]) for f in FAMILIES if FAMILIES[f][1]])
def test_cls_patch_keeps_what_stands_in_front(family: str, prefix: int) -> None:
    sizes = FAMILIES[family][0]
    both, patches = (encoder(architecture=family, sizes=sizes, select=select) for select in ("cls_patch", "patch"))
    assert (both.num_tokens, patches.num_tokens) == (16 + prefix, 16)
    assert torch.equal(both(pictures())[:, prefix:], patches(pictures()))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("dinov3_vit", "mlcd_vision_model")])
def test_every_patch_has_its_token_row_by_row(family: str) -> None:
    """At the embeddings, changing one patch of the picture changes that token and no other: none is lost, none moves."""
    ours = encoder(architecture=family, sizes=FAMILIES[family][0], layer=0)
    x = pictures()[:1]
    with torch.no_grad():
        before = ours(x)
        for i in range(16):
            row, col = divmod(i, 4)
            changed = x.clone()
            changed[:, :, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8] += 1
            moved = (ours(changed) != before).any(-1)[0].nonzero().flatten().tolist()
            assert moved == [i]


@pytest.mark.parametrize(
    ("tower", "select"),
    [("clip_vision_model", "patch"), ("clip_vision_model", "cls_patch"), ("siglip_vision_model", "patch")],
)
def test_layer_and_select_mean_what_they_mean_in_llava(tower: str, select: str) -> None:
    """Against transformers' LLaVA with its projector taken out; for SigLIP LLaVA's own ``full``, which drops no patch."""
    strategy = "default" if (tower, select) == ("clip_vision_model", "patch") else "full"
    torch.manual_seed(0)
    text = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    llava: Any = LlavaModel(
        LlavaConfig(vision_config={"model_type": tower, **SMALL}, text_config={**text, "vocab_size": 99})
    )
    llava.multi_modal_projector = nn.Identity()
    ours = encoder(architecture=tower, select=select)
    kept = ours.model.state_dict()
    ours.model.load_state_dict({name: value for name, value in llava.vision_tower.state_dict().items() if name in kept})
    with torch.no_grad():
        found = llava.eval().get_image_features(
            pixel_values=pictures(), vision_feature_layer=-2, vision_feature_select_strategy=strategy
        )
        theirs = torch.stack(list(found.pooler_output if hasattr(found, "pooler_output") else found))
        assert torch.equal(ours(pictures()), theirs.reshape(2, ours.num_tokens, 16))


@pytest.mark.parametrize("family", WITH_POSITIONS)
def test_another_picture_size_interpolates_the_positions(family: str) -> None:
    sizes, prefix = FAMILIES[family]
    ours = encoder(architecture=family, sizes=sizes, image_size=48)
    told = {} if family.startswith("dinov2") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        theirs = plain(family, sizes)(pixel_values=pictures(48), output_hidden_states=True, **told).hidden_states[-2]
        assert torch.equal(ours(pictures(48)), theirs[:, prefix:])
    assert ours.num_tokens == 36
    native = encoder(architecture=family, sizes=sizes)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in native.parameters()]


def test_a_size_that_is_no_multiple_of_the_patch_counts_whole_patches() -> None:
    """As SigLIP-so400m at 384 px with patches of 14: 27 x 27 = 729 tokens."""
    ours = encoder(architecture="siglip_vision_model", sizes={**SMALL, "image_size": 35})
    assert ours.num_tokens == 16
    assert ours(pictures(35)).shape == (2, 16, 16)


# ---------------------------------------------------------------- weights


def whole_clip(folder: Path) -> Any:
    torch.manual_seed(5)
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 50,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=8))
    model.save_pretrained(folder)
    return model.eval()


def test_the_vision_tower_of_a_whole_clip_model(tmp_path: Path) -> None:
    model = whole_clip(tmp_path)
    for options in ({}, {"architecture": None, "sizes": None}):
        ours = encoder(pretrained=str(tmp_path), **options)
        with torch.no_grad():
            theirs = model.vision_model(pixel_values=pictures(), output_hidden_states=True).hidden_states[-2]
            assert torch.equal(ours(pictures()), theirs[:, 1:])


def test_names_as_the_published_files_have_them(tmp_path: Path) -> None:
    """openai/clip-vit-large-patch14-336 and its like: ``vision_model.`` before every name, and a table of positions."""
    model = whole_clip(tmp_path)
    state = {f"vision_model.{name}": value.clone() for name, value in model.vision_model.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    state |= {f"text_model.{name}": value.clone() for name, value in model.text_model.state_dict().items()}
    state["visual_projection.weight"] = model.visual_projection.weight.clone()
    (tmp_path / "model.safetensors").unlink()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    ours = encoder(pretrained=str(tmp_path))
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, state[f"vision_model.{name}"]), name
    for file in tmp_path.iterdir():
        file.unlink()
    CLIPConfig(vision_config=SMALL).save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    again = encoder(pretrained=str(tmp_path))
    assert torch.equal(again(pictures()), ours(pictures()))


def test_other_folders(tmp_path: Path) -> None:
    torch.manual_seed(5)
    siglip = SiglipModel(SiglipConfig(text_config={**SMALL, "vocab_size": 50}, vision_config=SMALL)).eval()
    siglip.save_pretrained(tmp_path / "siglip")
    classifier = ViTForImageClassification(ViTConfig(**SMALL)).eval()
    classifier.save_pretrained(tmp_path / "vit")
    with torch.no_grad():
        for name, tower in (("siglip", siglip.vision_model), ("vit", classifier.vit)):
            wanted = tower(pixel_values=pictures(), output_hidden_states=True).hidden_states[-2][:, -16:]
            assert torch.equal(
                encoder(architecture=None, sizes=None, pretrained=str(tmp_path / name))(pictures()), wanted
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = whole_clip(tmp_path / "full")
    model.to(dtype).save_pretrained(tmp_path / "half")
    ours = encoder(pretrained=str(tmp_path / "half"))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.model.embeddings.class_embedding, model.vision_model.embeddings.class_embedding.float())


def test_pixels_are_those_of_the_folder_else_of_the_family(tmp_path: Path) -> None:
    whole_clip(tmp_path)

    def mean(part: Any) -> list[float]:
        return [round(float(m), 4) for m in part.transform.shift / part.transform.scale / 255]

    assert mean(encoder(pretrained=str(tmp_path))) == [0.4815, 0.4578, 0.4082]
    settings = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "image_processor_type": "CLIPImageProcessor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    part = encoder(pretrained=str(tmp_path))
    assert mean(part) == [0.1, 0.2, 0.3]
    assert [round(float(1 / s / 255), 4) for s in part.transform.scale] == [0.4, 0.5, 0.6]
    assert mean(encoder(architecture="siglip_vision_model")) == [0.5, 0.5, 0.5]
    assert mean(encoder(architecture="dinov2", sizes=PLAIN)) == [0.485, 0.456, 0.406]


def test_weights_that_lack_a_tensor_are_refused_unless_it_is_cut_off(tmp_path: Path) -> None:
    whole_clip(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    behind = [name for name in state if "encoder.layers.2." in name and "vision" in name]
    assert behind
    save_file(
        {name: v for name, v in state.items() if name not in behind}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    encoder(pretrained=str(tmp_path))
    (needed,) = [name for name in state if name.endswith("vision_model.encoder.layers.1.mlp.fc1.weight")]
    save_file(
        {name: v for name, v in state.items() if name != needed}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(
        ConfigError, match=r"does not fill 1 tensors of CLIPVisionModel, such as encoder\.layers\.1\.mlp\.fc1"
    ):
        encoder(pretrained=str(tmp_path))


def test_weights_that_contradict_the_configuration_are_refused(tmp_path: Path) -> None:
    whole_clip(tmp_path)
    with pytest.raises(
        ConfigError, match=r"has hidden_size 16 where sizes says 32; correct sizes, or set architecture: null"
    ):
        encoder(pretrained=str(tmp_path), sizes={**SMALL, "hidden_size": 32})
    with pytest.raises(
        ConfigError, match=r"has model_type 'clip_vision_model' where architecture says 'siglip_vision_model'"
    ):
        encoder(pretrained=str(tmp_path), architecture="siglip_vision_model")
    with torch.device("meta"), pytest.raises(ConfigError, match="has image_size 32 where sizes says 64"):
        encoder(pretrained=str(tmp_path), sizes={**SMALL, "image_size": 64})


def test_on_meta_nothing_is_read_and_nobody_asked(tmp_path: Path) -> None:
    whole_clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with torch.device("meta"):
        local = encoder(pretrained=str(tmp_path))
        hub = encoder(pretrained="nobody/never-downloaded")
        with pytest.raises(ConfigError, match="architecture: nobody/never-downloaded cannot say it here"):
            encoder(architecture=None, sizes=None, pretrained="nobody/never-downloaded")
        with pytest.raises(ConfigError, match="does not exist"):
            encoder(pretrained=str(tmp_path / "gone"))
    for part in (local, hub):
        assert {p.device.type for p in part.parameters()} == {"meta"}
        assert (part.num_tokens, part.dim) == (16, 16)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "clip_vison_model"}, r"did you mean 'clip_vision_model'\?"),
        ({"architecture": "dinov22"}, r"no vision tower 'dinov22'; did you mean 'dinov2'\?"),
        ({"architecture": "clip"}, "'clip' is a whole model; its vision tower is 'clip_vision_model'"),
        ({"architecture": None, "sizes": None}, "architecture: random weights cannot say it here"),
        ({"architecture": "llama", "sizes": {}}, "'llama' has image_size None"),
        ({"architecture": "siglip2_vision_model", "sizes": {}}, "'siglip2_vision_model' has image_size None"),
        ({"architecture": "swin", "sizes": {}}, "'swin'|SwinModel"),
        ({"architecture": "vit_mae", "sizes": SMALL}, "hides patches at random"),
        ({"sizes": {"hiden_size": 8}}, r"sizes: .* no 'hiden_size'; did you mean 'hidden_size'\?"),
        ({"sizes": {**SMALL, "num_attention_heads": 3}}, "sizes: "),
        ({"layer": 4}, r"layer: 4 is out of range, 'clip_vision_model' has 4 hidden states \(0 to 3\)"),
        ({"layer": -5}, "layer: -5 is out of range"),
        ({"select": "pach"}, r"select: 'pach'; did you mean 'patch'\?"),
        ({"architecture": "siglip_vision_model", "select": "cls_patch"}, "has no class token; use select: patch"),
        ({"image_size": 4}, "image_size: 4 pixels are less than one patch of 8"),
        ({"image_size": 0}, "image_size: 0 pixels"),
        ({"layout": "wide"}, "layout: 'wide'"),
        ({"pretrained": "./no_such_folder"}, "does not exist"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        encoder(**options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_file_or_an_empty_folder_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config can be read from") as caught:
        encoder(pretrained=str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="is a file; give the folder"):
        encoder(pretrained=str(tmp_path / "model.safetensors"))
