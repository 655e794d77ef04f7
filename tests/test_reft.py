"""The ReFT family: each member by its formula, on text and media, and files of the released code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from steered import built, gradients, hidden, logits, map_of, samples
from torch import Tensor, nn

from mllm_factory import IGNORE_INDEX, TEXT, ConfigError, Tuning, build
from mllm_factory.components.tuning.reft import KINDS
from mllm_factory.components.tuning.steering import FORMS, LowRankMap
from mllm_factory.components.tuning.steering_released import load_intkey, load_released

RANDOM = {"name": "reft", "init": "random", "positions": "f2+l2", "rank": 2}


def formula(kind: str, change: Any, h: Tensor) -> Tensor:
    """One hidden state by the family's equations; R has orthonormal columns in loreft and consreft."""
    R, b = change.base, change.bias
    if kind in ("loreft", "consreft"):
        assert (R.T @ R - torch.eye(R.shape[1])).abs().max() < 1e-5  # as it was made
    if kind == "consreft":
        return h + R @ (b - R.T @ h)
    minus = 0 if kind == "direft" else R.T @ h
    return h + R @ (change.weight @ h + b - minus)


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_is_its_equation(kind: str) -> None:
    change, h = LowRankMap(24, 3, FORMS[KINDS[kind]], "random"), torch.randn(9, 24)
    expected = torch.stack([formula(kind, change, x) for x in h])
    torch.testing.assert_close(change(h), expected, atol=1e-5, rtol=0)
    assert sum(p.numel() for p in change.parameters()) == 3 * (24 + 1 if kind == "consreft" else 2 * 24 + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_free_maps_move_freely_and_the_others_stay_orthonormal(kind: str) -> None:
    change, h, target = LowRankMap(24, 3, FORMS[KINDS[kind]], "random"), torch.randn(9, 24), torch.randn(9, 24)
    optimizer = torch.optim.SGD(change.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        (change(h) - target).square().mean().backward()
        optimizer.step()
    R = change.up()
    bent = (R.T @ R - torch.eye(3)).abs().max()
    assert bent < 1e-5 if kind in ("loreft", "consreft") else bent > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_it_edits_both_ends_of_the_prompt_and_learns(kind: str) -> None:
    base, collator = built()
    model, _ = built({**RANDOM, "kind": kind, "layers": [0]})
    batch, states = collator(samples()), []
    for either in (base, model):
        either.backbone.layers[0].register_forward_hook(lambda *given: states.append(given[2]))
        hidden(either, batch)
    changed = (states[0] != states[1]).any(-1)
    for row in range(4):
        answer = (batch.labels[row] != IGNORE_INDEX).nonzero()[0, 0]
        prompt = [i for i in range(int(answer)) if batch.modality[row, i] == TEXT]
        assert changed[row].nonzero()[:, 0].tolist() == sorted([*prompt[:2], *prompt[-2:]])
    expected = torch.stack([formula(kind, map_of(model, 0), h) for h in states[0][changed]])
    torch.testing.assert_close(states[1][changed], expected, atol=1e-5, rtol=0)
    assert all(g.abs().max() > 0 for g in gradients(model, batch).values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "consreft"])
def test_identity_is_the_untouched_model(kind: str) -> None:
    base, collator = built()
    model, _ = built({"name": "reft", "kind": kind, "positions": "all", "modalities": ["text", "vision"]})
    batch = collator(samples())
    assert torch.equal(logits(model, batch), logits(base, batch))
    assert any(g.abs().max() > 0 for name, g in gradients(model, batch).items() if "steering" in name)


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="kind: there is no 'lorefft'; did you mean 'loreft'"):
        build(Tuning, {"name": "reft", "kind": "lorefft"})
    with pytest.raises(ConfigError, match="init: consreft replaces h .* use random"):
        build(Tuning, {"name": "reft", "kind": "consreft"})


# ---------------------------------------------------------------- files of the released code


def released(
    folder: Path, layer: int, rank: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A file as pyreft writes it: ``state_dict`` with R, W and b."""
    made: Any = nn.utils.parametrizations.orthogonal(nn.Linear(dim, rank, bias=False))
    rotate = made.weight.T.detach()
    source = nn.Linear(dim, rank)
    state = {"weight": source.weight.data, "bias": source.bias.data, "rotate_layer": rotate}
    saved = {key: value.to(dtype).clone() for key, value in state.items()}
    torch.save(saved, folder / f"intkey_layer.{layer}.comp.block_output.unit.pos.nunit.1#0.bin")
    return {key: value.float() for key, value in saved.items()}


def test_a16_released_files_give_the_released_outputs(tmp_path: Path) -> None:
    saved = [released(tmp_path, layer) for layer in range(2)]
    model, _ = built({"name": "mores", "rank": 2, "placement": "block_output"})
    assert load_released(tmp_path, model.backbone) == [0, 1]
    h = torch.randn(5, 16)
    for layer, state in enumerate(saved):
        rotated = h @ state["rotate_layer"]
        expected = h + (h @ state["weight"].T + state["bias"] - rotated) @ state["rotate_layer"].T
        with torch.no_grad():
            assert (map_of(model, layer)(h) - expected).abs().max() < 1e-6


def test_files_in_half_precision_are_made_orthonormal_again(tmp_path: Path) -> None:
    state = released(tmp_path, 0, rank=4, dtype=torch.float16)
    change = LowRankMap(16, 4, FORMS["orthonormal"])
    load_intkey(next(tmp_path.glob("*.bin")), change)
    R = change.up()
    assert (R.T @ R - torch.eye(4)).abs().max() < 1e-6
    assert (R - state["rotate_layer"]).abs().max() < 2e-3


def test_released_files_that_do_not_fit(tmp_path: Path) -> None:
    released(tmp_path, 0)
    model, _ = built({"name": "mores", "rank": 2, "placement": "block_output"})
    with pytest.raises(ConfigError, match=r"layers \[0\] but \[0, 1\] are steered"):
        load_released(tmp_path, model.backbone)
    model, _ = built({"name": "mores", "rank": 2, "layers": [0]})
    with pytest.raises(ConfigError, match="block_output; set placement"):
        load_released(tmp_path, model.backbone)
    model, _ = built({"name": "mores", "rank": 1, "placement": "block_output", "layers": [0]})
    with pytest.raises(ConfigError, match="set the rank"):
        load_released(tmp_path, model.backbone)
    with pytest.raises(ConfigError, match="0 steering strategies"):
        load_released(tmp_path, built()[0].backbone)
