"""The open_clip encoder against open_clip used directly: features, weights in its own format, every model of its list."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from mllm_factory import ConfigError, Encoder, build
from mllm_factory.components.encoders import towers

SMALL = {  # embed_dim, vision_cfg: written as a configuration of its own where a test needs a fast tower
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
TIMM = {
    **SMALL,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
}
RESNET = {**SMALL, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}}


@pytest.fixture
def listed(tmp_path: Path) -> Any:
    """Three small models in open_clip's list."""
    before = list(open_clip.factory._MODEL_CONFIG_PATHS)
    for name, config in {"small-vit": SMALL, "small-timm": TIMM, "small-resnet": RESNET}.items():
        (tmp_path / "configs").mkdir(exist_ok=True)
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    yield
    open_clip.factory._MODEL_CONFIG_PATHS[:] = before
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._rescan_model_configs()


def encoder(architecture: str | None, **options: Any) -> Any:
    torch.manual_seed(0)
    return build(Encoder, {"name": "open_clip", "architecture": architecture, **options}).eval()


def whole(architecture: str, **options: Any) -> Any:
    """The whole CLIP model, with its text tower, of another seed."""
    torch.manual_seed(7)
    logging.getLogger().setLevel(logging.ERROR)
    return open_clip.create_model(architecture, load_weights=False, **options).eval()


def pictures(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def saved(model: Any, folder: Path, config: dict[str, Any] | None = None) -> str:
    """A folder as open_clip's own ``push_to_hf_hub`` writes it, other libraries' files included."""
    folder.mkdir()
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    torch.save({"not": torch.zeros(1)}, folder / "pytorch_model.bin")
    if config:
        preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return str(folder)


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_a_layer_is_the_output_of_that_block(listed: Any, tmp_path: Path, layer: int) -> None:
    model = whole("small-vit")
    ours = encoder("small-vit", pretrained=saved(model, tmp_path / "clip"), layer=layer)
    seen: list[torch.Tensor] = []
    model.visual.transformer.resblocks[layer].register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        model.encode_image(pictures())
        assert torch.equal(ours(pictures()), seen[0][:, 1:])
        both = encoder("small-vit", pretrained=str(tmp_path / "clip"), layer=layer, prefix_tokens=True)
        assert torch.equal(both(pictures()), seen[0])
    assert (ours.num_tokens, both.num_tokens, ours.dim) == (16, 17, 64)


@pytest.mark.parametrize(
    ("name", "size", "layer", "shape"),
    [
        ("small-vit", 32, -2, (16, 64)),
        ("small-timm", 160, -2, (100, 64)),
        ("small-resnet", 64, -1, (4, 256)),
        ("small-resnet", 64, -2, (16, 128)),
        ("small-resnet", 64, 0, (256, 8)),
    ],
)
def test_every_kind_of_tower_gives_tokens_and_trains(
    listed: Any, name: str, size: int, layer: int, shape: tuple[int, int]
) -> None:
    ours = encoder(name, layer=layer)
    assert (ours.num_tokens, ours.dim) == shape
    out = ours.train()(pictures(size))
    assert out.shape == (2, *shape)
    out.square().sum().backward()
    assert [n for n, p in ours.named_parameters() if p.grad is None] == []


def test_a_resnet_gives_the_cells_in_front_of_its_pooling(listed: Any, tmp_path: Path) -> None:
    model = whole("small-resnet")
    ours = encoder("small-resnet", pretrained=saved(model, tmp_path / "clip"), layer=-1)
    seen: list[torch.Tensor] = []
    model.visual.attnpool.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.encode_image(pictures(64))
        assert torch.equal(ours(pictures(64))[:, 2], seen[0][:, :, 1, 0])


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("file", ["", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_weights_from_a_folder_or_file(listed: Any, tmp_path: Path, file: str) -> None:
    model = whole("small-timm")
    ours = encoder("small-timm", pretrained=str(Path(saved(model, tmp_path / "clip")) / file))
    with torch.no_grad():
        wanted = model.visual.trunk.forward_intermediates(pictures(160), indices=[-2 % 6], intermediates_only=True)[0]
        assert torch.equal(ours(pictures(160)), wanted.flatten(2).transpose(1, 2))


def test_weights_of_data_parallel_training(listed: Any, tmp_path: Path) -> None:
    model = whole("small-vit")
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt")
    ours = encoder("small-vit", pretrained=str(tmp_path / "epoch_3.pt"))
    assert torch.equal(ours.model.conv1.weight, model.visual.conv1.weight)


def test_the_folder_says_architecture_and_pixels(listed: Any, tmp_path: Path) -> None:
    model = whole("small-vit")
    source = saved(model, tmp_path / "clip", SMALL)
    ours = encoder(None, pretrained=source)
    assert torch.equal(ours.model.conv1.weight, model.visual.conv1.weight)
    assert [round(float(m), 4) for m in ours.transform.shift / ours.transform.scale / 255] == [0.1, 0.2, 0.3]
    assert encoder("small-vit", pretrained=source).num_tokens == 16
    with pytest.raises(ConfigError, match="has timm_model_name None where architecture 'small-timm' says 'test_vit'"):
        encoder("small-timm", pretrained=source)
    with pytest.raises(ConfigError, match="has quick_gelu True where architecture 'small-vit' says False"):
        encoder("small-vit", pretrained=saved(model, tmp_path / "quick", {**SMALL, "quick_gelu": True}))


@pytest.mark.parametrize(("name", "size"), [("small-vit", 48), ("small-timm", 96)])
def test_another_picture_size_resizes_the_positions(listed: Any, tmp_path: Path, name: str, size: int) -> None:
    """As open_clip does when it is told another size (``force_image_size``)."""
    source = saved(whole(name), tmp_path / "clip")
    model = whole(name, force_image_size=size)
    if name == "small-timm":
        model = whole(name)
        model.visual.set_input_size(size)
    else:
        open_clip.load_checkpoint(model, f"{source}/open_clip_model.safetensors")
    ours = encoder(name, pretrained=source, image_size=size)
    with torch.no_grad():
        wanted = model.visual.forward_intermediates(pictures(size), intermediates_only=True)["image_intermediates"][-2]
        assert torch.equal(ours(pictures(size)), wanted.flatten(2).transpose(1, 2))
    assert ours.num_tokens == 36
    native = encoder(name)
    assert native.num_tokens != ours.num_tokens


def test_weights_of_another_architecture_are_refused(listed: Any, tmp_path: Path) -> None:
    source = saved(whole("small-vit"), tmp_path / "clip")
    with pytest.raises(ConfigError, match=r"has no 'trunk\.cls_token'"):
        encoder("small-timm", pretrained=source)
    state = whole("small-vit").state_dict()
    torch.save({**state, "visual.conv1.weight": torch.zeros(64, 3, 4, 4)}, tmp_path / "patch.pt")
    with pytest.raises(
        ConfigError, match=r"has 'conv1\.weight' \[64, 3, 4, 4\] where the architecture has \[64, 3, 8, 8\]"
    ):
        encoder("small-vit", pretrained=str(tmp_path / "patch.pt"))
    torch.save({**state, "visual.extra": torch.zeros(1)}, tmp_path / "extra.pt")
    with pytest.raises(ConfigError, match="1 tensors that the architecture lacks, such as 'extra'"):
        encoder("small-vit", pretrained=str(tmp_path / "extra.pt"))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"has no 'visual\.' tensors but 'weight'"):
        encoder("small-vit", pretrained=str(tmp_path / "other.pt"))


def test_on_meta_nothing_is_read_and_nobody_asked(listed: Any, tmp_path: Path) -> None:
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"never read")
    with torch.device("meta"):
        for source in (str(tmp_path), "nobody/never-downloaded"):
            part = encoder("small-vit", pretrained=source)
            assert {p.device.type for p in part.parameters()} == {"meta"}
            assert (part.num_tokens, part.dim) == (16, 64)
        with pytest.raises(ConfigError, match="does not say it"):
            encoder(None, pretrained="nobody/never-downloaded")


# ---------------------------------------------------------------- the list, and refusals


def test_published_sizes_of_real_models() -> None:
    """Patches, width and pixels of the papers; parameters of ViT-L/14-336 by formula, without the last block and head."""
    d, patches, layers = 1024, 24 * 24, 23
    block = 4 * d * d + 4 * d + 8 * d * d + 5 * d + 4 * d  # attention, MLP, two norms
    by_hand = 3 * 14 * 14 * d + d + (patches + 1) * d + 2 * d + layers * block
    with torch.device("meta"):
        for name, tokens, dim, mean in [
            ("ViT-B-32", 49, 768, 0.48145466),
            ("ViT-L-14-336-quickgelu", 576, 1024, 0.48145466),
            ("ViT-SO400M-14-SigLIP-384", 729, 1152, 0.5),
            ("EVA02-B-16", 196, 768, 0.48145466),
            ("convnext_base_w", 256, 512, 0.48145466),
            ("RN50", 196, 1024, 0.48145466),
        ]:
            part = encoder(name)
            assert (part.num_tokens, part.dim) == (tokens, dim), name
            assert abs(float(part.transform.shift[0] / part.transform.scale[0] / 255) - mean) < 1e-6, name
            if name.startswith("ViT-L"):
                assert sum(p.numel() for p in part.parameters()) == by_hand == 290_909_184


@pytest.mark.slow
def test_every_model_of_the_list_is_built() -> None:
    seen: set[str] = set()
    refused: dict[str, str] = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = {**config["vision_cfg"], "image_size": 0}
        vision["timm_model_name"] = re.sub(r"_\d{3}$", "", vision.get("timm_model_name", ""))
        tower = json.dumps([config["embed_dim"], vision], sort_keys=True)
        if tower in seen:  # the same tower with another text tower, or for another picture size
            continue
        seen.add(tower)
        try:
            with torch.device("meta"):
                part = encoder(name)
        except ConfigError as error:
            refused[name] = str(error)
            continue
        assert part.num_tokens >= 16, name
        assert part.dim >= 64, name
    assert len(seen) > 60
    assert refused == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ViT-B-32", "coca_base", "ViT-B-16-SigLIP2", "EVA02-B-16", "ViTamin-S", "RN50", "convnext_tiny", "PE-Core-T-16-384",
             "MobileCLIP-S1", "MobileCLIP2-S3", "swin_base_patch4_window7_224", "vit_medium_patch16_gap_256", "ViT-L-14-CLIPA"]
)  # fmt: skip
def test_no_parameter_is_without_influence(name: str) -> None:
    with torch.device("meta"):
        part = encoder(name)
    shape, unused = towers.traced(part, part.transform.size)
    assert shape == (1, part.num_tokens, part.dim)
    assert unused == set()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "ViT-B32"}, r"open_clip has no 'ViT-B32'; did you mean 'ViT-B-32'\?"),
        ({"architecture": "Vit-L-14-336"}, r"did you mean 'ViT-L-14-336'\?"),
        ({"architecture": None}, "architecture: nothing does not say it"),
        ({"layer": 12}, r"layer: 12 is out of range, 'ViT-B-32' has 12 feature levels \(0 to 11\)"),
        ({"layer": -13}, "layer: -13 is out of range"),
        ({"architecture": "RN50", "prefix_tokens": True}, "prefix_tokens: 'RN50' has no class or register tokens"),
        ({"architecture": "ViT-B-16-SigLIP", "prefix_tokens": True}, "has no class or register tokens"),
        ({"image_size": 0}, "image_size: 0 pixels hold no picture"),
        ({"image_size": 8}, "image_size"),
        ({"architecture": "swin_base_patch4_window7_224", "image_size": 3}, "image_size"),
        ({"layout": "padd"}, r"layout: 'padd'; did you mean 'pad'\?"),
        ({"pretrained": "./no_such.safetensors"}, "does not exist"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=says) as caught:
        encoder(**{"architecture": "ViT-B-32", **options})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "package"), [("open_clip", "open_clip_torch"), ("timm", "timm"), ("hf_vision", "transformers")]
)
def test_a_missing_library_is_named_with_its_package(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, {"hf_vision": "transformers"}.get(name, name), None)
    with pytest.raises(ConfigError, match=f"pip install {package}$") as caught:
        build(Encoder, {"name": name, "architecture": "vit"})
    assert "\n" not in str(caught.value)
