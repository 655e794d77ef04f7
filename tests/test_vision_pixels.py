"""Picture layouts against the padding of LLaVA-1.5 written out, and against transformers' image processor of LLaVA-NeXT."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from mllm_factory import ConfigError, Encoder, build
from mllm_factory.components.encoders.pixels import SquarePixels, best_grid, pixels_of

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EXTREMES = [(1, 1), (20000, 2), (2, 20000), (3, 1), (1, 5)]


def picture(w: int, h: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


def levels(items: torch.Tensor) -> torch.Tensor:
    """Back from normalised values to 0..255."""
    return (items * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255


def expanded(image: Image.Image) -> Image.Image:
    """The square that LLaVA-1.5 makes: mean colour, picture in the middle."""
    w, h = image.size
    square = Image.new("RGB", (max(w, h),) * 2, tuple(int(255 * m) for m in MEAN))
    square.paste(image, ((max(w, h) - w) // 2, (max(w, h) - h) // 2))
    return square


@pytest.mark.parametrize("size", [(50, 71), (71, 50), (40, 40), (300, 20), (7, 200), (32, 9), (1, 1)])
def test_pad_is_that_of_llava(size: tuple[int, int]) -> None:
    image = picture(*size)
    out = pixels_of("pad", 4, 32, MEAN, STD)(image)
    wanted = np.asarray(expanded(image).resize((32, 32), Image.Resampling.BICUBIC), np.float32)
    assert out.shape == (1, 3, 32, 32)
    difference = (levels(out)[0].permute(1, 2, 0) - torch.from_numpy(wanted)).abs().max()
    assert difference <= (1.01 if size[1] > size[0] else 0.01)  # axes in another order round differently by one level


def test_a_square_picture_is_the_same_in_every_layout_without_tiles() -> None:
    image = picture(40, 40)
    square = pixels_of("square", 4, 32, MEAN, STD)(image)
    assert torch.equal(pixels_of("pad", 4, 32, MEAN, STD)(image), square)
    assert torch.equal(
        pixels_of("anyres", 4, 32, MEAN, STD)(picture(32, 32)), SquarePixels(32, MEAN, STD)(picture(32, 32))
    )


def test_the_grid_is_the_one_transformers_selects() -> None:
    draw, compared = random.Random(0), 0
    size = 336
    for tiles in (2, 4, 6, 9):
        grids = pixels_of("anyres", tiles, size, MEAN, STD).grids
        assert all(rows * cols <= tiles for rows, cols in grids)
        assert len(grids) == sum(tiles // rows for rows in range(1, tiles + 1))
        for _ in range(300):
            w, h = (int(2 ** draw.uniform(0, 13)) for _ in range(2))
            if min(w, h) * max(min(rows * size / h, cols * size / w) for rows, cols in grids) < 1:
                continue  # less than a pixel wide on every grid: transformers takes the first one
            theirs = select_best_resolution((h, w), [(rows * size, cols * size) for rows, cols in grids])
            ours = best_grid(w, h, size, grids)
            assert (ours[0] * size, ours[1] * size) == theirs, (w, h, tiles)
            compared += 1
    assert compared > 1000
    assert best_grid(20000, 2, size, grids) == (1, 9)
    assert best_grid(2, 20000, size, grids) == (9, 1)


@pytest.mark.parametrize("size", [(640, 300), (300, 640), (500, 500), (900, 200), (97, 61), (70, 64)])
def test_tiles_are_those_of_llava_next(size: tuple[int, int]) -> None:
    s, image = 48, picture(*size)
    ours = pixels_of("anyres", 4, s, MEAN, STD)
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": s},
        crop_size={"height": s, "width": s},
        image_mean=list(MEAN),
        image_std=list(STD),
        image_grid_pinpoints=[[rows * s, cols * s] for rows, cols in ours.grids],
    )
    wanted = theirs(images=image, return_tensors="pt")["pixel_values"][0]
    out = ours(image)
    assert out.shape == wanted.shape
    assert len(out) > 1
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=0)


def test_the_overview_comes_first_and_tiles_go_row_by_row() -> None:
    s = 16
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    image = Image.new("RGB", (2 * s, 2 * s))
    for i, colour in enumerate(colours):
        image.paste(colour, ((i % 2) * s, (i // 2) * s, (i % 2 + 1) * s, (i // 2 + 1) * s))
    out = levels(pixels_of("anyres", 4, s, MEAN, STD)(image))
    assert out.shape == (5, 3, s, s)
    for tile, colour in zip(out[1:], colours, strict=True):
        torch.testing.assert_close(tile, torch.tensor(colour).float()[:, None, None].expand_as(tile), atol=0.01, rtol=0)
    torch.testing.assert_close(out[0, :, 1, 1], torch.tensor(colours[0]).float(), atol=0.01, rtol=0)


@pytest.mark.parametrize("size", EXTREMES)
@pytest.mark.parametrize("layout", ["square", "pad", "anyres"])
def test_extreme_pictures(layout: str, size: tuple[int, int]) -> None:
    made = pixels_of(layout, 4, 32, MEAN, STD)
    out = made(picture(*size))
    assert out.shape[1:] == (3, 32, 32)
    assert out.isfinite().all()
    assert len(out) == (5 if layout == "anyres" and max(size) == 20000 else 1)  # 1 x 4 or 4 x 1 tiles
    assert torch.equal(out, pickle.loads(pickle.dumps(made))(picture(*size)))  # noqa: S301 - as a loader's worker does


def test_every_vision_encoder_takes_a_layout() -> None:
    part = build(
        Encoder, {"name": "patch", "image_size": 16, "patch_size": 8, "dim": 4, "layout": "anyres", "tiles": 2}
    )
    items = part.transform(picture(40, 20))
    assert items.shape == (3, 3, 16, 16)
    assert part(items).shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layout": "sqare"}, "layout: 'sqare'; did you mean 'square'?"),
        ({"layout": "anyres", "tiles": 1}, "tiles: 1 make no grid"),
        ({"image_size": 20, "patch_size": 8}, "image_size: 20 pixels are no whole number of patches of 8"),
        ({"image_size": 8, "patch_size": 16}, "no whole number"),
        ({"patch_size": 0}, "no whole number"),
        ({"dim": 0}, "dim: 0 is no width"),
    ],
)
def test_bad_options(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")) as caught:
        build(Encoder, {"name": "patch", **options})
    assert "\n" not in str(caught.value)


def test_patch_is_a_linear_map_of_each_patch_plus_its_position() -> None:
    torch.manual_seed(0)
    part = build(Encoder, {"name": "patch", "image_size": 12, "patch_size": 4, "dim": 5})
    x = torch.randn(2, 3, 12, 12)
    weight, bias = part.project.weight.flatten(1), part.project.bias
    for i in range(9):
        row, col = divmod(i, 3)
        cut = x[:, :, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4].flatten(1)
        torch.testing.assert_close(part(x)[:, i], cut @ weight.T + bias + part.positions[0, i])
