"""The slope of log MDI: synthetic null models, other numbers of tokens from one encoder, and models whose slope is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_toys import left, made, samples, talk
from test_attention_metrics import uniform
from torch import nn

from mllm_factory import IGNORE_INDEX, ConfigError, Metric, Output, build
from mllm_factory.components.metrics.attention_groups import answer_rows
from mllm_factory.components.metrics.scale_slope import Resized, fixed_effects_slope, resized, scaled, with_tokens


def metric(**options: Any) -> Any:
    return build(Metric, {"name": "scale_slope", **options}, "metrics.m")


def test_a_constant_share_has_slope_one_and_equal_keys_slope_zero() -> None:
    n = torch.tensor([64.0, 256.0, 1024.0, 4096.0])
    share, n_text = torch.tensor([[0.3], [0.1], [0.6]]), torch.tensor([[30.0], [11.0], [90.0]])
    mdi = (1 - share) / share * n / n_text
    assert mdi[0].tolist() == pytest.approx([4.98, 19.91, 79.64, 318.58], abs=0.01)
    x = n.log().expand(3, -1)
    assert fixed_effects_slope(x, mdi.log()) == pytest.approx(1, abs=1e-6)
    assert fixed_effects_slope(x, torch.randn(3, 1).expand(-1, 4)) == pytest.approx(0, abs=1e-12)


def test_the_slope_is_that_of_least_squares_with_an_intercept_each() -> None:
    x, y = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    design = torch.cat([x.reshape(-1, 1), torch.eye(5).double().repeat_interleave(3, 0)], 1)
    expected = torch.linalg.lstsq(design, y.reshape(-1, 1)).solution[0]
    assert fixed_effects_slope(x, y) == pytest.approx(float(expected))
    y[2, 1] = torch.nan
    kept = ~y.reshape(-1).isnan()
    expected = torch.linalg.lstsq(design[kept], y.reshape(-1, 1)[kept]).solution[0]
    assert fixed_effects_slope(x, y) == pytest.approx(float(expected))


def test_fewer_than_two_numbers_of_tokens_have_no_slope() -> None:
    assert math.isnan(fixed_effects_slope(torch.ones(4, 3), torch.randn(4, 3)))
    lone = torch.full((2, 2), torch.nan)
    lone[:, 0] = 1
    assert math.isnan(fixed_effects_slope(torch.randn(2, 2), lone))


def test_grids_stay_square_and_rows_stay_rows() -> None:
    assert [scaled(36, s) for s in (0.25, 0.5625, 1.0, 4.0, 1e-6)] == [9, 16, 36, 144, 1]
    assert [scaled(10, s) for s in (0.25, 0.5, 3.0, 1e-6)] == [2, 5, 30, 1]
    features = torch.arange(16.0).view(1, 16, 1)
    small = Resized(nn.Identity(), 16, 4)(features)
    cells = features.view(4, 4)
    assert small.flatten().tolist() == [float(cells[i : i + 2, j : j + 2].mean()) for i in (0, 2) for j in (0, 2)]
    large = Resized(nn.Identity(), 16, 64)(features).view(8, 8)
    assert torch.equal(large, cells.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert Resized(nn.Identity(), 6, 3)(torch.arange(6.0).view(1, 6, 1)).flatten().tolist() == [0.5, 2.5, 4.5]
    assert torch.equal(Resized(nn.Identity(), 16, 16)(features), features)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_only_the_media_change_their_number(count: int) -> None:
    model, collator = made()
    batch = collator([*samples(0), *samples(1, pictures=2), talk("why?", "so")])
    for given in (batch, left(batch)):
        changed = with_tokens(given, "vision", 4, count, 0)
        assert (changed.modality == 1).sum(1).tolist() == [count, 2 * count, 0]
        assert not changed.left_padded
        for b in range(3):
            words = [
                [
                    (int(i), int(label), int(role))
                    for i, label, role, m, real in zip(
                        t.input_ids[b], t.labels[b], t.role[b], t.modality[b], t.attention_mask[b], strict=True
                    )
                    if real and m == 0
                ]
                for t in (given, changed)
            ]
            assert words[0] == words[1]
        assert answer_rows(changed).sum() == answer_rows(given).sum()
        assert (changed.labels[~changed.attention_mask] == IGNORE_INDEX).all()
    with torch.no_grad():
        before = model(batch).loss_sum
        with resized(model, "vision", count):
            there = model(with_tokens(batch, "vision", 4, count, 0)).loss_sum
        assert torch.equal(model(batch).loss_sum, before)
    assert (there == before) == (count == 4)
    assert model.tokens_per_item == {"vision": 4}


def test_uniform_attention_has_slope_zero() -> None:
    model, collator = made()
    uniform(model)
    found = metric(scales=[0.25, 1.0, 4.0])
    with torch.no_grad():
        found.update(model, collator(samples(0, 1)), Output())
        found.update(model, collator(samples(2)), Output())
    result = found.compute()
    assert result["scale_slope/vision"] == pytest.approx(0, abs=1e-5)
    assert result["scale_slope/vision/layer_01"] == pytest.approx(0, abs=1e-5)
    assert (result["scale_slope/vision/tokens_min"], result["scale_slope/vision/tokens_max"]) == (1, 16)
    assert result["scale_slope/vision/samples"] == 3
    assert result["scale_slope/vision/undefined"] == 0


def test_repeated_tokens_where_positions_are_unknown_have_slope_zero() -> None:
    """Copies of every media key with the same logits leave MDI: one head and one row of layer 0 of a model without positions."""
    model, collator = made("gpt2", n_head=1)
    model.backbone.model.transformer.wpe.weight.data.zero_()
    batch = collator(samples(0, 1, 2))
    first = (batch.labels != IGNORE_INDEX).cumsum(1) == 1
    found = metric(scales=[1.0, 4.0, 9.0])
    with torch.no_grad():
        found.update(model, replace(batch, labels=batch.labels.masked_fill(~first, IGNORE_INDEX)), Output())
    result = found.compute()
    assert result["scale_slope/vision/layer_00"] == pytest.approx(0, abs=1e-5)
    assert abs(result["scale_slope/vision/layer_01"]) > 1e-4  # where text has seen more of the picture, it is not exact


def test_samples_without_media_are_counted_and_batches_without_are_skipped() -> None:
    model, collator = made()
    found = metric()
    assert math.isnan(found.compute()["scale_slope"])
    with torch.no_grad():
        found.update(model, collator([talk("why?", "so")]), Output())
        assert math.isnan(found.compute()["scale_slope"])
        found.update(model, collator([*samples(0), talk("why?", "so")]), Output())
    result = found.compute()
    assert result["scale_slope/vision/undefined/no_media"] == 3 * 2
    assert result["scale_slope/vision/samples"] == 1
    assert math.isfinite(result["scale_slope/vision"])


def test_bad_scales() -> None:
    for scales in ([1.0], [1.0, 1.0], [0.0, 1.0], []):
        with pytest.raises(ConfigError, match="scales: .* has no slope"):
            metric(scales=scales)
    model, collator = made()
    found = metric(scales=[1.0, 100.0])
    with pytest.raises(ConfigError, match=r"scales: 100.0 makes a row of \d+ tokens but the backbone takes 256"):
        found.update(model, collator(samples(0)), Output())
