"""The maps of MoReS by themselves: formula, orthonormality, dropout, and pyreft's arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steered import by_hand
from torch import Tensor, nn

from mllm_factory.components.tuning.steering import FORMS, LowRankMap, orthonormal


def make(rank: int, form: str = "orthonormal", init: str = "random", dim: int = 32, **options: Any) -> LowRankMap:
    return LowRankMap(dim, rank, FORMS[form], init, **options)


@pytest.mark.parametrize("rank", [1, 2, 4, 32])
def test_a6_the_fused_form_is_the_formula(rank: int) -> None:
    change, h = make(rank), torch.randn(7, 32)
    torch.testing.assert_close(change(h), by_hand(change, h), atol=1e-5, rtol=0)
    R, M = change.up(), change.weight - change.up().T
    torch.testing.assert_close(change(h), h + (h @ M.T + change.bias) @ R.T, atol=1e-5, rtol=0)
    assert (change(h) - h).abs().max() > 0.1


def test_untied_and_free_forms_by_hand() -> None:
    h = torch.randn(7, 32)
    free = make(3, "none")
    with torch.no_grad():
        free.base.mul_(1.7)
    torch.testing.assert_close(free(h), by_hand(free, h), atol=1e-5, rtol=0)
    assert torch.equal(free.up(), free.base)
    untied = make(3, "untied")
    expected = h + (h @ untied.weight.T + untied.bias - h @ untied.down.T) @ untied.base.T
    torch.testing.assert_close(untied(h), expected, atol=1e-5, rtol=0)
    assert sum(p.numel() for p in untied.parameters()) == 3 * (3 * 32 + 1)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_a5_r_stays_orthonormal_under_weight_decay(rank: int) -> None:
    change, h, target = make(rank, dim=24), torch.randn(64, 24), torch.randn(64, 24)
    eye = torch.eye(rank)
    assert (change.up().T @ change.up() - eye).abs().max() < 1e-5
    start = change.up().detach().clone()
    optimizer = torch.optim.AdamW(change.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(100):
        loss = (change(h) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert (change.up().T @ change.up() - eye).abs().max() < 1e-5
    assert losses[-1] < losses[0]
    assert (change.up() - start).abs().max() > 0.05


def test_the_basis_is_unique_smooth_and_blind_to_length() -> None:
    A = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    R = orthonormal(A)
    gram_schmidt: list[Tensor] = []
    for column in A.T:
        rest = column - sum((q * (q @ column) for q in gram_schmidt), torch.zeros_like(column))
        gram_schmidt.append(rest / rest.norm())
    torch.testing.assert_close(R, torch.stack(gram_schmidt, 1))
    torch.testing.assert_close(orthonormal(0.01 * A), R)
    torch.testing.assert_close(orthonormal(R), R)
    assert torch.autograd.gradcheck(orthonormal, A)
    assert torch.autograd.gradcheck(orthonormal, A[:, :1].detach().requires_grad_())


def test_a16_by_the_formula_of_pyreft() -> None:
    """``base + (W base + b - rotate(base)) R^T`` with torch's own orthogonal parametrisation."""
    layer: Any = nn.utils.parametrizations.orthogonal(nn.Linear(32, 4, bias=False))
    source, h = nn.Linear(32, 4), torch.randn(2, 9, 32)
    R = layer.weight.T.detach()
    rotated = torch.matmul(h, R)
    expected = h + torch.matmul(source(h) - rotated, R.T)
    change = make(4)
    with torch.no_grad():
        change.base.copy_(R), change.weight.copy_(source.weight), change.bias.copy_(source.bias)
        assert (change(h.reshape(-1, 32)).reshape(h.shape) - expected).abs().max() < 1e-6


def test_no_buffer_and_no_random_number() -> None:
    change = make(4, dim=64)
    assert list(change.buffers()) == []
    assert max(p.numel() for p in change.parameters()) == 4 * 64
    before = torch.get_rng_state()
    change(torch.randn(3, 64, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_of_the_update_leaves_the_state() -> None:
    h = torch.ones(200, 32)
    update, state = make(2, dropout=0.9), make(2, dropout=0.9, dropout_on="state")
    state.load_state_dict(update.state_dict())
    kept = (update.train()(h) == h).float().mean()
    lost = (state.train()(h) == 0).float().mean()
    assert 0.85 < kept < 0.95
    assert 0.85 < lost < 0.95
