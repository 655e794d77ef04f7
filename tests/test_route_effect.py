"""Routes against attention weights changed by hand, their first order against finite differences, and the numbers made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_toys import ARCHITECTURES, left, made, samples, talk
from counterfactual_toys import Both, run_with
from counterfactual_toys import made as loud
from torch import Tensor

from mllm_factory import VISION, Batch, ConfigError, DataError, Metric, MultimodalModel, build
from mllm_factory.components.metrics.attention_groups import answer_rows
from mllm_factory.components.metrics.attention_routes import Routes, gated

Key = tuple[int, int]
"""Layer and head."""


def metric(**options: Any) -> Any:
    return build(Metric, {"name": "route_effect", "resamples": 100, **options}, "metrics.m")


@contextmanager
def by_hand(model: MultimodalModel, batch: Batch, scaled: dict[Key, float]) -> Iterator[None]:
    """Attention in plain words: softmax weights, of which those of a head on vision, at the first answer row, are scaled."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    row = [min(t for t, there in enumerate(rows) if there) for rows in answer_rows(batch).tolist()]

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        A = (q @ k.transpose(2, 3) * scaling + (0 if mask is None else mask)).softmax(-1).clone()
        for (layer, head), factor in scaled.items():
            for b in range(len(A)) if module.layer_idx == layer else ():
                for t in (batch.modality[b] == VISION).nonzero()[:, 0].tolist():
                    A[b, head, row[b], t] *= factor
        return (A @ v).transpose(1, 2), None

    AttentionInterface.register("by_hand", attend)
    AttentionMaskInterface.register("by_hand", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    config: Any = model.backbone.model.config
    before = config._attn_implementation
    config._attn_implementation = "by_hand"
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def first_token(model: MultimodalModel, batch: Batch, scaled: dict[Key, float]) -> Tensor:
    """[B] log p of the first answer token, read off the whole table."""
    with by_hand(model, batch, scaled):
        hidden = model.backbone(model.embed(batch), batch.attention_mask)
    found = []
    for b, rows in enumerate(answer_rows(batch)):
        t = int(rows.nonzero()[0, 0])
        found.append(model.backbone.logits(hidden[b, t]).log_softmax(-1)[batch.labels[b, t + 1]])
    return torch.stack(found)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_shut_route_is_a_head_without_its_vision_weights(side: str) -> None:
    model, collator = made("llama")
    batch = collator(samples(0, 1, 2, 5))
    batch = left(batch) if side == "left" else batch
    routes = Routes(model, batch, ("vision",))
    plain = first_token(model, batch, {})
    torch.testing.assert_close(routes.logp, plain, rtol=1e-4, atol=1e-5)
    for layer in range(2):
        for head in range(4):
            expected = plain - first_token(model, batch, {(layer, head): 0.0})
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(routes.exact(layer, head, 0), expected, rtol=1e-3, atol=1e-5)


def test_the_first_order_is_the_derivative_by_finite_differences() -> None:
    """Norms are computed in single precision whatever the weights are, hence the wide steps."""
    model, collator = made("llama")
    model, batch = model.double(), collator(samples(0, 1, 2, 5))
    batch = replace(batch, media={name: items.double() for name, items in batch.media.items()})
    routes = Routes(model, batch, ("vision",))
    assert routes.effects.shape == (4, 2, 4, 2)
    for layer in range(2):
        for head in range(4):
            up, down = (first_token(model, batch, {(layer, head): 1 + d}) for d in (0.03, -0.03))
            torch.testing.assert_close(
                routes.effects[:, layer, head, 0].double(), (up - down) / 0.06, rtol=1e-2, atol=3e-5
            )
    together = [first_token(model, batch, {(n, h): 1 + d for n in range(2) for h in range(4)}) for d in (0.03, -0.03)]
    slope = (together[0] - together[1]) / 0.06
    torch.testing.assert_close(routes.effects[..., 0].sum((1, 2)).double(), slope, rtol=2e-2, atol=3e-4)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_any_kernel_frozen_and_recomputed(architecture: str) -> None:
    """First order and exact agree in the limit: a route between 1 and 1 - d loses d times its slope."""
    model, collator = made(architecture)
    batch = collator(samples(0, 1, 4))
    plain = Routes(model, batch, ("vision",))
    alone = Routes(model, collator(samples(1)), ("vision",))
    torch.testing.assert_close(plain.effects[1:2], alone.effects, rtol=1e-3, atol=1e-5)  # company changes nothing
    slopes = plain.effects.abs().sum()
    assert slopes > 0 and not plain.effects.isnan().any()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.checkpoint_activations()
    again = Routes(model, batch, ("vision",))
    torch.testing.assert_close(again.effects, plain.effects, rtol=1e-4, atol=1e-6)
    gates = plain._gates()
    gates.values = {n: torch.full(s, 0.999) for n, s in zip(plain.layers, plain._shapes, strict=True)}
    with torch.no_grad(), gated(model, gates):
        less = plain._run()
    torch.testing.assert_close((plain.logp - less) / 1e-3, plain.effects.sum((1, 2, 3)), rtol=5e-2, atol=5e-3)


def test_the_numbers_are_those_of_the_effects() -> None:
    model, collator = made("llama")
    talks = [*samples(0, 1, 2), talk("no picture", "red")]
    found = metric(heads=True)
    with torch.no_grad():
        for some in (talks[:2], talks[2:]):
            batch = collator(some)
            found.update(model, batch, model(batch, logits=True))
    values = found.compute()
    effects = torch.cat([Routes(model, collator(samples(i)), ("vision",)).effects for i in range(3)]).double()
    sizes = effects.abs()
    assert values["route_effect/vision"] == pytest.approx(float(sizes[..., 0].sum() / sizes.sum()), rel=1e-3)
    assert values["route_effect/vision"] + values["route_effect/text"] == pytest.approx(1)
    by_layer = sizes[:, 1].sum((0, 1))
    assert values["route_effect/vision/layer_01"] == pytest.approx(float(by_layer[0] / by_layer.sum()), rel=1e-3)
    assert values["route_effect/vision/low"] <= values["route_effect/vision"] <= values["route_effect/vision/high"]
    mean = effects.mean(0)
    assert values["route_effect/vision/signed"] == pytest.approx(float(mean[..., 0].sum()), rel=1e-3)
    head = values["route_effect/vision/signed/layer_01/head_02"]
    assert head == pytest.approx(float(mean[1, 2, 0]), rel=1e-3, abs=1e-6)
    counts = [values[f"route_effect/vision/{key}"] for key in ("samples", "undefined", "undefined/no_media")]
    assert counts == [3, 1, 1]
    rows = found.tables()["heads"]
    assert [(row["layer"], row["head"]) for row in rows] == [(n, h) for n in range(2) for h in range(4)]
    assert rows[6]["vision/size"] == pytest.approx(float(sizes.mean(0)[1, 2, 0]), rel=1e-3)


def test_three_routes_and_the_limit_of_samples() -> None:
    model, collator = loud(audio=True, loud=3.0)
    found = metric(samples=5, verify=2)
    values = run_with(found, model, collator, Both(8), 4)
    assert len(found.effects) == 5 and values["route_effect/audio/samples"] == 5
    parts = [values[f"route_effect/{name}"] for name in ("vision", "audio", "text")]
    assert sum(parts) == pytest.approx(1) and min(parts) > 0
    for name in ("vision", "audio"):
        assert 0 <= values[f"route_effect/{name}/verify/sign"] <= 1
        first, exact = torch.cat(found.pairs[name], 1)
        assert len(first) == 2 * 5  # two heads, five samples
        assert values[f"route_effect/{name}/verify/ratio"] == pytest.approx(float(exact.sum() / first.sum()), rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_values_that_are_zero_have_no_effect_and_no_share() -> None:
    model, collator = made("llama")
    for name, parameter in model.backbone.named_parameters():
        if "v_proj" in name:
            parameter.data.zero_()
    values = run_with(metric(), model, collator, samples(0, 1, 2, 3), 2)
    assert values["route_effect/vision/signed"] == 0
    assert math.isnan(values["route_effect/vision"]) and math.isnan(values["route_effect/vision/low"])


def test_features_of_zero_still_have_a_route() -> None:
    """What the metric cannot tell: the places of a silent picture carry what they read from places before them."""
    model, collator = made("llama")
    for parameter in model.projectors["vision"].parameters():
        parameter.data.zero_()
    values = run_with(metric(), model, collator, samples(0, 1, 2, 3), 2)
    assert values["route_effect/vision/layer_00"] == pytest.approx(0, abs=1e-6)  # no bias: values of zeros are zeros
    assert values["route_effect/vision/layer_01"] > 0.01


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samples": 0}, "samples: 0 measure nothing"),
        ({"resamples": 0}, "resamples: 0 measure nothing"),
        ({"verify": -1}, "verify: -1 heads cannot be shut"),
        ({"modalities": ["sight"]}, "modalities: there is no 'sight'"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        metric(**options)


def test_what_the_model_or_the_data_lacks_is_an_error() -> None:
    model, collator = made("llama")
    with pytest.raises(ConfigError, match="no audio encoder"):
        run_with(metric(modalities=["audio"]), model, collator, samples(0, 1), 2)
    with pytest.raises(DataError, match="no sample carries vision"):
        run_with(metric(modalities=["vision"]), model, collator, [talk("a", "b"), talk("c", "d")], 2)
    batch = collator(samples(0, 1))
    with pytest.raises(ConfigError, match="training mode"):
        metric().update(model.train(), batch, model(batch, logits=True))
