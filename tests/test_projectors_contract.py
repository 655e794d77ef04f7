"""What every projector promises besides its sizes: items by themselves, bfloat16, repetition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mllm_factory import Projector, build

CONF = Path(__file__).parent.parent / "conf" / "projector"
CHEAP = Path(__file__).parent / "cheap"
PRESETS = sorted(file.stem for file in CONF.glob("*.yaml"))
TOKENS, D = 16, 12


def made(preset: str) -> Any:
    """The preset in small; the identity gets its one width."""
    node = yaml.safe_load((CONF / f"{preset}.yaml").read_text())
    small = CHEAP / f"{node['name']}.yaml"
    options = yaml.safe_load(small.read_text()) if small.exists() else {}
    own = {key: value for key, value in options.items() if key not in ("in_dim", "out_dim", "in_tokens")}
    torch.manual_seed(0)
    return build(Projector, {**node, **own}, in_dim=D, out_dim=D, in_tokens=TOKENS)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_item_does_not_depend_on_the_others(preset: str) -> None:
    part = made(preset).train()
    x = torch.randn(3, TOKENS, D)
    together = part(x)
    assert together.shape == (3, part.num_tokens, D)
    for i in range(3):
        torch.testing.assert_close(part(x[i : i + 1])[0], together[i])


@pytest.mark.parametrize("preset", PRESETS)
def test_it_repeats_itself(preset: str) -> None:
    part, x = made(preset).train(), torch.randn(2, TOKENS, D)
    assert torch.equal(part(x), part(x))


@pytest.mark.parametrize("preset", PRESETS)
def test_half_precision_is_near_full_precision(preset: str) -> None:
    part, x = made(preset), torch.randn(2, TOKENS, D)
    full = part(x)
    half = part.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_gradient_reaches_the_features(preset: str) -> None:
    part, x = made(preset), torch.randn(2, TOKENS, D, requires_grad=True)
    (part(x) * torch.randn(2, part.num_tokens, D)).sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(-1) > 0).all()  # of every token


@pytest.mark.parametrize("preset", PRESETS)
def test_the_unchanged_preset_fits_a_clip_at_336_pixels(preset: str) -> None:
    width = 1024 if preset == "identity" else 4096
    node = yaml.safe_load((CONF / f"{preset}.yaml").read_text())
    with torch.device("meta"):
        part = build(Projector, node, in_dim=1024, out_dim=width, in_tokens=576)
        assert part(torch.empty(2, 576, 1024)).shape == (2, part.num_tokens, width)
