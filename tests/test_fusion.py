"""Several encoders as one, against loops over tokens; and in the places where an encoder is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys
import yaml
from PIL import Image
from torch import Tensor, nn

from mllm_factory import ConfigError, DataError, Encoder, build
from mllm_factory.assemble import build_collator, build_model, build_source
from mllm_factory.features import cache_features
from mllm_factory.registry import find, validate

ROOT = Path(__file__).parent.parent
WIDE = {"name": "toys:Patches", "dim": 8}
NARROW = {"name": "toys:NormedPatches", "dim": 6}
FINE = {"name": "test_fusion:Grid", "side": 3, "dim": 5}
GRID = {"name": "test_fusion:Grid", "side": 2, "dim": 5}


class Cells:
    """A picture -> [m, 3, side, side] in [0, 1]; ``tiles`` copies of it if it is wide."""

    def __init__(self, side: int, tiles: int) -> None:
        self.side, self.tiles = side, tiles

    def __call__(self, picture: Image.Image) -> Tensor:
        small = np.asarray(picture.resize((self.side, self.side)), np.float32) / 255
        copies = self.tiles if picture.width > picture.height else 1
        return torch.from_numpy(small.transpose(2, 0, 1).copy())[None].repeat(copies, 1, 1, 1)


class Grid(Encoder):
    """side x side cells, or ``extra`` tokens more; its weights differ from seed to seed."""

    modality = "vision"

    def __init__(self, side: int = 2, dim: int = 5, tiles: int = 1, extra: int = 0) -> None:
        super().__init__()
        self.dim, self.num_tokens, self.transform = dim, side * side + extra, Cells(side, tiles)
        self.extra, self.linear = extra, nn.Linear(3, dim)

    def forward(self, items: Tensor) -> Tensor:
        """[n, 3, side, side] -> [n, num_tokens, dim]"""
        cells = self.linear(items.view(len(items), 3, -1).transpose(1, 2))  # view: needs contiguous items
        return torch.cat([cells[:, : self.extra], cells], dim=1)


class Loudness:
    """([channels, time], rate) -> [1, frames] or, doubled, a type of its own."""

    def __init__(self, frames: int, double: bool) -> None:
        self.frames, self.double = frames, double

    def __call__(self, raw: tuple[Tensor, int]) -> Tensor:
        loud = F.adaptive_avg_pool1d(raw[0].mean(0, keepdim=True).abs(), self.frames)
        return loud.double() if self.double else loud


class Frames(Encoder):
    """One token a frame: its loudness times a weight."""

    modality = "audio"

    def __init__(self, frames: int = 4, dim: int = 5, double: bool = False) -> None:
        super().__init__()
        self.dim, self.num_tokens, self.transform = dim, frames, Loudness(frames, double)
        self.linear = nn.Linear(1, dim)

    def forward(self, items: Tensor) -> Tensor:
        """[n, frames] -> [n, frames, dim]"""
        return self.linear(items[..., None])


def fused(mode: str = "interleave", resize: bool = True, **encoders: dict[str, Any]) -> Any:
    return build(Encoder, {"name": "fusion", "encoders": encoders, "mode": mode, "resize": resize}).eval()


def picture(seed: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def both(fusion: Any, *pictures: Any) -> tuple[Tensor, list[Tensor]]:
    """The fusion's features, and those of its encoders each by itself."""
    with torch.no_grad():
        together = fusion(torch.cat([fusion.transform(p) for p in pictures]))
        alone = [e(torch.cat([e.transform(p) for p in pictures])) for e in fusion.encoders.values()]
    assert together.shape == (len(pictures), fusion.num_tokens, fusion.dim)
    return together, alone


def bilinear(grid: Tensor, side: int) -> Tensor:
    """[h, h, d] -> [side, side, d] with the centres of the outer cells' areas aligned, by the formula."""
    h = grid.shape[0]
    at = [min(max((i + 0.5) * h / side - 0.5, 0), h - 1) for i in range(side)]
    rows = []
    for y in at:
        for x in at:
            t, left, down, right = int(y), int(x), min(int(y) + 1, h - 1), min(int(x) + 1, h - 1)
            a, b = y - t, x - left
            top = (1 - b) * grid[t, left] + b * grid[t, right]
            rows.append((1 - a) * top + a * ((1 - b) * grid[down, left] + b * grid[down, right]))
    return torch.stack(rows).view(side, side, -1)


# ---------------------------------------------------------------- the three modes


def test_interleaved_tokens_take_turns_and_narrow_ones_end_in_zeros() -> None:
    fusion = fused("interleave", a=NARROW, b=WIDE, c=GRID)
    together, alone = both(fusion, picture(0), picture(1))
    assert (fusion.num_tokens, fusion.dim) == (12, 8)
    for t in range(12):
        token = alone[t % 3][:, t // 3]
        assert torch.equal(together[:, t, : token.shape[1]], token)
        assert not together[:, t, token.shape[1] :].any()


def test_channels_stand_side_by_side() -> None:
    fusion = fused("channel", a=NARROW, b=WIDE)
    together, alone = both(fusion, picture(0), picture(1))
    assert (fusion.num_tokens, fusion.dim) == (4, 14)
    for t in range(4):
        assert torch.equal(together[:, t], torch.cat([alone[0][:, t], alone[1][:, t]], dim=-1))


def test_a_sequence_is_one_encoder_after_the_other() -> None:
    fusion = fused("sequence", resize=False, a=FINE, b=WIDE)
    together, alone = both(fusion, picture(0))
    assert (fusion.num_tokens, fusion.dim) == (13, 8)
    assert torch.equal(together[:, :9, :5], alone[0])
    assert torch.equal(together[:, 9:], alone[1])
    assert not together[:, :9, 5:].any()


@pytest.mark.parametrize(("first", "other", "side"), [(GRID, FINE, 2), (FINE, GRID, 3)])
@pytest.mark.parametrize("mode", ["channel", "interleave"])
def test_grids_of_the_others_are_resized_to_the_first(
    mode: str, first: dict[str, Any], other: dict[str, Any], side: int
) -> None:
    fusion = fused(mode, a=first, b=other)
    together, alone = both(fusion, picture(0), picture(1))
    old = int(alone[1].shape[1] ** 0.5)
    for n in range(2):
        expected = bilinear(alone[1][n].view(old, old, 5), side).view(side * side, 5)
        given = together[n, :, 5:] if mode == "channel" else together[n, 1::2]
        torch.testing.assert_close(given, expected)
    torch.testing.assert_close(together[:, :, :5] if mode == "channel" else together[:, ::2], alone[0])


def test_recordings_are_resized_along_time() -> None:
    three, six = {"name": "test_fusion:Frames", "frames": 3}, {"name": "test_fusion:Frames", "frames": 6}
    fusion = fused("interleave", a=three, b=six)
    assert (fusion.modality, fusion.num_tokens) == ("audio", 6)
    together, alone = both(fusion, (torch.randn(2, 600), 8000))
    pairs = alone[1].view(1, 3, 2, 5).mean(2)  # half as many frames: each lies in the middle of two
    torch.testing.assert_close(together[:, 1::2], pairs)


# ---------------------------------------------------------------- items


def test_an_item_is_the_encoders_items_one_behind_the_other() -> None:
    fusion = fused(a=GRID, b=WIDE)
    raw = picture(3)
    packed = fusion.transform(raw)
    assert packed.shape == (1, 3 * 2 * 2 + 3 * 8 * 8)
    expected = [e.transform(raw).flatten() for e in fusion.encoders.values()]
    assert torch.equal(packed[0], torch.cat(expected))


def test_several_items_of_one_picture_stay_in_order() -> None:
    fusion = fused(a={**GRID, "tiles": 3}, b={**FINE, "tiles": 3})
    items = fusion.transform(picture(0))
    assert len(items) == 3
    assert torch.equal(items[0], items[2])


def test_different_numbers_of_items_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"different items of one picture or recording \(a: 1, b: 3\)"):
        fused(a=GRID, b={**FINE, "tiles": 3})
    fusion = fused(a=GRID, b=FINE)
    fusion.transform.transforms["b"] = Cells(3, 4)
    assert len(fusion.transform(picture(0, (10, 20)))) == 1
    with pytest.raises(DataError, match=r"\(a: 1, b: 4\); give them one layout"):
        fusion.transform(picture(0, (20, 10)))


# ---------------------------------------------------------------- what cannot be fused


@pytest.mark.parametrize(
    ("encoders", "options", "says"),
    [
        ({}, {}, "encoders: 0 given, but a fusion needs two"),
        ({"a": GRID}, {}, "encoders: 1 given, but a fusion needs two .* as the part itself"),
        ({"a": GRID, "b": {"name": "test_fusion:Frames"}}, {}, r"different modalities \(a: vision, b: audio\)"),
        ({"a": GRID, "b": FINE}, {"resize": False}, r"different token counts \(a: 4, b: 9\); set resize: true"),
        ({"a": {**GRID, "extra": 1}, "b": GRID}, {}, r"the 5 tokens of a are no square grid.*\(a: 5, b: 4\).*prefix"),
        ({"a": GRID, "b": {**GRID, "extra": 1}}, {"mode": "channel"}, "the 5 tokens of b are no square grid"),
        ({"a": GRID, "keys": FINE}, {}, "'keys' cannot name an encoder"),
        ({"a": GRID, "b.c": FINE}, {}, "'b.c' cannot name an encoder"),
        ({"a": GRID, 2: FINE}, {}, "'2' cannot name an encoder"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(encoders: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        build(Encoder, {"name": "fusion", "encoders": encoders, **options})
    assert "\n" not in str(caught.value)


def test_items_of_two_types_are_refused() -> None:
    frames = {"name": "test_fusion:Frames"}
    with pytest.raises(ConfigError, match=r"different items of a type \(a: torch.float32, b: torch.float64\)"):
        fused(a=frames, b={**frames, "double": True})


def test_equal_counts_that_are_no_grid_need_no_resizing() -> None:
    odd = {**GRID, "extra": 1}
    assert fused(a=odd, b=odd).num_tokens == 10
    assert fused("sequence", a=odd, b=FINE).num_tokens == 14


def test_nested_errors_name_the_encoder() -> None:
    node = {"name": "fusion", "encoders": {"a": {"name": "timn"}, "b": {**WIDE, "dimm": 3}}, "mode": "both"}
    problems = {p.key: p.message for p in validate("Encoder", node, "vision")[1]}
    assert set(problems) == {"vision.encoders.a.name", "vision.encoders.b.dimm", "vision.mode"}
    assert "did you mean 'timm'" in problems["vision.encoders.a.name"]


# ---------------------------------------------------------------- in a model

STRATEGIES = {"frozen": 0, "full": 4, "lora": 2 + 2}
"""Trainable tensors of two encoders with one linear layer each: none, all, the factors."""


def model_of(strategy: str, **vision: Any) -> Any:
    node = {"name": "fusion", "encoders": {"a": GRID, "b": WIDE}, **vision}
    lora = {"rank": 2} if strategy == "lora" else {}
    return build_model(toys.tree(vision=node, tuning__vision={"name": strategy, **lora}))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_is_tuned_as_one_part(strategy: str) -> None:
    model = model_of(strategy).train()
    learning = [n for n, p in model.encoders["vision"].named_parameters() if p.requires_grad]
    assert len(learning) == STRATEGIES[strategy]
    tree = toys.tree()
    source = build_source(tree, "train", {"vision"})
    batch = build_collator(tree, model)([source[0], source[1]])
    assert (batch.modality == 1).sum() == 2 * 8
    assert batch.media["vision"].shape == (2, 12 + 192)
    model(batch).loss_sum.backward()
    assert [n for n in learning if model.encoders["vision"].get_parameter(n).grad is None] == []


def test_its_features_can_be_cached(tmp_path: Path) -> None:
    encoder = model_of("frozen").encoders["vision"]
    items = torch.cat([encoder.transform(picture(i)) for i in (0, 1, 0)])
    expected = encoder(items)
    assert cache_features(encoder, tmp_path / "features.bin")
    torch.testing.assert_close(encoder(items), expected)
    assert len(encoder.forward.places) == 2


def test_the_adapters_of_its_encoders_are_the_projectors() -> None:
    node = {"name": "fusion", "encoders": {"a": GRID, "b": WIDE}}
    model: Any = build_model(toys.tree(vision=node, projector={"name": "mof_mlp", "encoders": 2}))
    encoder, projector = model.encoders["vision"], model.projectors["vision"]
    items = encoder.transform(picture(0))
    given = model.features("vision", items)
    for place, name in enumerate(("a", "b")):
        alone = encoder.encoders[name]
        features = alone(alone.transform(picture(0)))
        first, gelu, last = projector.adapters[place]
        own = features @ first.weight[:, : alone.dim].T + first.bias  # the zeros never meet a weight
        torch.testing.assert_close(given[:, place::2], last(gelu(own)))


def test_pictures_and_recordings_have_projectors_of_their_own() -> None:
    changes: dict[str, Any] = {
        "audio": {"name": "fusion", "encoders": {k: {"name": "test_fusion:Frames", "frames": 8} for k in "ab"}},
        "audio_projector": {"name": "pool", "kind": "conv", "stride": 4, "depth": 1},
        "tuning__audio": {"name": "frozen"},
    }
    model: Any = build_model(toys.tree(**changes))
    assert {name: type(p).__name__ for name, p in model.projectors.items()} == {"vision": "Mlp", "audio": "Pool"}
    assert model.tokens_per_item == {"vision": 4, "audio": 4}
    shared: Any = build_model(toys.tree(**{**changes, "audio_projector": None}))
    assert {name: type(p).__name__ for name, p in shared.projectors.items()} == {"vision": "Mlp", "audio": "Mlp"}
    assert shared.projectors["vision"] is not shared.projectors["audio"]


def test_a_fusion_of_the_wrong_modality_is_refused_by_its_slot() -> None:
    frames = {"name": "test_fusion:Frames"}
    with pytest.raises(ConfigError, match="vision.name: Fusion encodes audio, not vision"):
        build_model(toys.tree(vision={"name": "fusion", "encoders": {"a": frames, "b": frames}}))


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("name", ["fusion_tiny", "mof"])
def test_the_encoders_of_a_preset_list_every_option(name: str) -> None:
    node = yaml.safe_load((ROOT / "conf" / "vision" / f"{name}.yaml").read_text())
    for child in node["encoders"].values():
        assert set(child) - {"name"} == set(find("Encoder", child["name"]).params)


def test_mof_has_the_sizes_of_the_paper() -> None:
    """2 x 24 x 24 tokens; a CLIP ViT-L/14 without its last layer and head, and a DINOv2 ViT-L/14."""
    node = yaml.safe_load((ROOT / "conf" / "vision" / "mof.yaml").read_text())
    with torch.device("meta"):
        fusion: Any = build(Encoder, node)
        items = torch.empty(1, sum(int(np.prod(shape)) for shape in fusion.shapes))
        assert fusion(items).shape == (1, 1152, 1024)
    assert (fusion.num_tokens, fusion.dim) == (1152, 1024)
    d, layer = 1024, 12 * 1024**2 + 13 * 1024
    clip = d * 3 * 14**2 + d + (24 * 24 + 1) * d + 2 * d + 23 * layer
    count = {name: sum(p.numel() for p in e.parameters()) for name, e in fusion.encoders.items()}
    assert count["clip"] == clip
    dino = d * 3 * 14**2 + d + d + (24 * 24 + 1) * d + 24 * (layer + 2 * d)
    assert count["dino"] == dino
