"""Projectors that merge neighbours, against loops over cells, transformers' own pixel shuffle and Honeybee's formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_factory import ConfigError, Projector, build

D, OUT = 6, 10


def projector(name: str, tokens: int, **options: Any) -> Any:
    return build(Projector, {"name": name, **options}, in_dim=D, out_dim=OUT, in_tokens=tokens)


# ---------------------------------------------------------------- pixel_shuffle


@pytest.mark.parametrize(("rows", "columns", "s"), [(6, 6, 2), (6, 6, 3), (4, 8, 2), (3, 3, 1)])
def test_neighbours_become_channels_row_by_row(rows: int, columns: int, s: int) -> None:
    part = projector("pixel_shuffle", rows * columns, factor=s, norm=False, depth=1, grid=[rows, columns])
    x = torch.randn(2, rows * columns, D)
    given = part(x)
    assert given.shape == (2, part.num_tokens, OUT) == (2, rows * columns // s**2, OUT)
    token = 0
    for i in range(rows // s):
        for j in range(columns // s):
            cells = [(s * i + a) * columns + s * j + b for a in range(s) for b in range(s)]
            merged = torch.cat([x[:, cell] for cell in cells], dim=-1)
            torch.testing.assert_close(given[:, token], part.layers(merged))
            token += 1


def test_the_order_of_channels_is_that_of_idefics3_and_internvl() -> None:
    from transformers import Idefics3Config, InternVLConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
    from transformers.models.internvl.modeling_internvl import InternVLModel

    x = torch.randn(2, 36, D)
    part = projector("pixel_shuffle", 36, factor=2, norm=False, depth=1)
    part.layers = torch.nn.Identity()
    with torch.device("meta"):
        idefics: Any = Idefics3Connector(Idefics3Config())
    torch.testing.assert_close(part(x), idefics.pixel_shuffle(x, 2))
    theirs: Any = InternVLModel.pixel_shuffle  # uses nothing of the model but its config's version
    shuffled = theirs(InternVLConfig(), x.view(2, 6, 6, D), 0.5).reshape(2, 9, 4 * D)
    torch.testing.assert_close(part(x), shuffled)


def test_the_norm_and_the_layers_are_those_of_internvl() -> None:
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    sizes = {"vision_config": SimpleNamespace(hidden_size=D), "text_config": SimpleNamespace(hidden_size=OUT)}
    config: Any = SimpleNamespace(**sizes, downsample_ratio=0.5, projector_hidden_act="gelu")
    theirs: Any = InternVLMultiModalProjector(config)
    part = projector("pixel_shuffle", 16)
    values = [p.data for p in theirs.parameters()]
    assert [v.shape for v in values] == [p.shape for p in part.parameters()]
    for ours, value in zip(part.parameters(), values, strict=True):
        ours.data.copy_(torch.randn_like(value) / 4)
        value.copy_(ours)
    merged = torch.randn(3, 5, 4 * D)
    torch.testing.assert_close(part.layers(part.norm(merged)), theirs(merged))


def test_a_factor_that_does_not_divide_names_the_possible_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"factor: 4 does not divide a grid of 6 x 6; possible: 1 \(36 tokens\), 2 \(9 "
    ):
        projector("pixel_shuffle", 36, factor=4)


# ---------------------------------------------------------------- grids


@pytest.mark.parametrize(
    "options", [{"name": "pixel_shuffle"}, {"name": "pool", "layout": "grid"}, {"name": "c_abstractor"}]
)
@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (None, "37 tokens are no square .* 6 x 6 = 36.*prefix"),
        ([6, 6], "6 x 6 cells are not the 37 tokens"),
        ([-1, -37], "grid"),
    ],
)
def test_tokens_that_are_no_grid(options: dict[str, Any], grid: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        projector(tokens=37, grid=grid, **options)


# ---------------------------------------------------------------- pool


def windows(rows: int, columns: int, high: int, wide: int) -> list[list[tuple[int, int, int]]]:
    """Per window its (place in the window, row, column) cells, row by row."""
    return [
        [(a * wide + b, i + a, j + b) for a in range(high) for b in range(wide) if i + a < rows and j + b < columns]
        for i in range(0, rows, high)
        for j in range(0, columns, wide)
    ]


@pytest.mark.parametrize("kind", ["average", "conv"])
@pytest.mark.parametrize(
    ("layout", "rows", "columns", "stride"),
    [("grid", 6, 6, 2), ("grid", 5, 7, 3), ("sequence", 12, 1, 4), ("sequence", 11, 1, 3), ("sequence", 3, 1, 3)],
)
def test_windows_against_a_loop(kind: str, layout: str, rows: int, columns: int, stride: int) -> None:
    grid = [rows, columns] if layout == "grid" else None
    part = projector("pool", rows * columns, kind=kind, stride=stride, layout=layout, grid=grid)
    x = torch.randn(2, rows * columns, D)
    given = part(x)
    parts = windows(rows, columns, stride, stride if layout == "grid" else 1)
    assert given.shape == (2, part.num_tokens, OUT) == (2, len(parts), OUT)
    for token, cells in enumerate(parts):
        at: list[tuple[int, Tensor]] = [(place, x[:, row * columns + column]) for place, row, column in cells]
        if kind == "average":
            merged = torch.stack([value for _, value in at]).mean(0)
        else:
            weights = part.conv.weight.flatten(2)  # [d, d, places]
            merged = F.gelu(sum(value @ weights[:, :, place].T for place, value in at) + part.conv.bias)
        torch.testing.assert_close(given[:, token], part.layers(merged))


@pytest.mark.parametrize("stride", [0, -1, 7])
def test_windows_that_are_too_long_name_the_possible_counts(stride: int) -> None:
    with pytest.raises(
        ConfigError, match=f"stride: {stride} is out of range; 1 to 6 give these token counts: 1, 4, 9, 36"
    ):
        projector("pool", 36, layout="grid", stride=stride)


def test_a_sequence_has_no_grid() -> None:
    with pytest.raises(ConfigError, match="grid: a sequence has no rows"):
        projector("pool", 36, grid=[6, 6])


# ---------------------------------------------------------------- c_abstractor


def norm2d(x: Tensor, layer: Any) -> Tensor:
    mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]


def block(x: Tensor, b: Any) -> Tensor:
    """One block of Honeybee on [n, d, h, w]: 1x1, 3x3 by channel, squeeze and excitation, 1x1, shortcut."""
    y = F.silu(norm2d(F.conv2d(x, b.conv1.conv.weight), b.conv1.bn))
    y = F.silu(norm2d(F.conv2d(y, b.conv2.conv.weight, padding=1, groups=y.shape[1]), b.conv2.bn))
    squeezed = F.silu(F.conv2d(y.mean((2, 3), keepdim=True), b.se.fc1.weight, b.se.fc1.bias))
    y = y * torch.sigmoid(F.conv2d(squeezed, b.se.fc2.weight, b.se.fc2.bias))
    y = norm2d(F.conv2d(y, b.conv3.conv.weight), b.conv3.bn)
    if isinstance(b.downsample, torch.nn.Identity):
        return F.silu(y + x)
    return F.silu(y + norm2d(F.conv2d(x, b.downsample.conv.weight), b.downsample.bn))


def test_the_abstractor_by_hand() -> None:
    part = projector("c_abstractor", 36, num_tokens=9, depth=2, hidden_dim=8)
    for parameter in part.parameters():
        parameter.data = torch.randn_like(parameter) / 3
    x = torch.randn(2, 36, D)
    y = (x + part.positions).transpose(1, 2).reshape(2, D, 6, 6)
    for b in part.net[0].children():
        y = block(y, b)
    y = torch.stack([y[:, :, i : i + 2, j : j + 2].mean((2, 3)) for i in (0, 2, 4) for j in (0, 2, 4)], -1).view(
        2, 8, 3, 3
    )
    for b in part.net[2].children():
        y = block(y, b)
    tokens = y.flatten(2).transpose(1, 2)
    (w1, b1), (w2, b2) = ((m.weight, m.bias) for m in (part.readout[0], part.readout[2]))
    torch.testing.assert_close(part(x), F.silu(tokens @ w1.T + b1) @ w2.T + b2, rtol=1e-4, atol=1e-5)


def honeybee_count(tokens: int, in_dim: int, d: int, out: int, depth: int, mlp: int) -> int:
    """Parameters from the structure in the authors' code."""

    def bottleneck(a: int) -> int:
        squeeze = round(a / 4)
        convolutions = a * d + 9 * d + d * d + 3 * 2 * d
        excitation = d * squeeze + squeeze + squeeze * d + d
        return convolutions + excitation + (a * d + 2 * d if a != d else 0)

    blocks = bottleneck(in_dim) + (2 * depth - 1) * bottleneck(d)
    return tokens * in_dim + blocks + d * out + out + (mlp - 1) * (out * out + out)


@pytest.mark.parametrize(("in_dim", "out", "tokens"), [(1024, 4096, 256), (1024, 5120, 576), (1152, 2560, 729)])
def test_the_abstractors_count_is_that_of_honeybee(in_dim: int, out: int, tokens: int) -> None:
    with torch.device("meta"):
        part: Any = build(Projector, {"name": "c_abstractor"}, in_dim=in_dim, out_dim=out, in_tokens=tokens)
        assert part(torch.empty(1, tokens, in_dim)).shape == (1, part.num_tokens, out)
    assert sum(p.numel() for p in part.parameters()) == honeybee_count(tokens, in_dim, 1024, out, 3, 2)
    assert part.num_tokens == {256: 64, 576: 144, 729: 196}[tokens]


@pytest.mark.parametrize("asked", [0, 5, 49])
def test_counts_out_of_the_abstractors_reach(asked: int) -> None:
    with pytest.raises(
        ConfigError, match=f"num_tokens: {asked} cannot be reached from 6 x 6; possible: 1, 4, 9, 16, 25, 36"
    ):
        projector("c_abstractor", 36, num_tokens=asked)


@pytest.mark.parametrize("option", ["depth", "hidden_dim", "mlp_depth"])
def test_sizes_below_one(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}: 0"):
        projector("c_abstractor", 36, **{option: 0})
