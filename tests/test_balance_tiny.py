"""commit_tiny, shortened: what holds of CoMMIT's claims at this scale, over five fixed seeds. The rest is reported in docs/balance.md."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import commit_tiny as script

SEEDS, STEPS = (0, 1, 2, 3, 4), 150
Numbers = dict[str, list[float]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Numbers]:
    """Variant -> its numbers, one of each seed; trained when first asked for."""
    folder = tmp_path_factory.mktemp("commit_tiny")
    start = script.base(folder, "trainer.max_steps=700", "trainer.save_every=700")
    known: dict[str, Numbers] = {}

    def of(name: str) -> Numbers:
        if name not in known:
            steps = (f"trainer.max_steps={STEPS}", f"trainer.save_every={STEPS}", "metrics=[answer_loss]")
            rows = [script.variant(folder, start, name, seed, *steps) for seed in SEEDS]
            known[name] = {key: [row[key] for row in rows] for key in rows[0]}
        return known[name]

    return of


@pytest.mark.slow
def test_c1_a_rate_ten_times_too_high_in_the_llm_slows_convergence(found: Callable[[str], Numbers]) -> None:
    plain, up = found("constant 1:1"), found("LLM up 10:1")
    assert all(a < b for a, b in zip(plain["mean"], up["mean"], strict=True))
    assert all(a < b for a, b in zip(plain["final"], up["final"], strict=True))


@pytest.mark.slow
def test_c2_clr_repairs_a_base_ratio_of_ten_to_one(found: Callable[[str], Numbers]) -> None:
    up, repaired = found("LLM up 10:1"), found("CLR from 10:1")
    assert statistics.fmean(repaired["final"]) < statistics.fmean(up["final"]) - statistics.stdev(up["final"])


@pytest.mark.slow
def test_c4_a_long_window_steadies_kappa_and_kl_with_a_short_one_unsettles_it(found: Callable[[str], Numbers]) -> None:
    plain = statistics.fmean(found("constant 1:1")["deviation"])
    assert statistics.fmean(found("CLR 1:1")["deviation"]) < plain
    assert statistics.fmean(found("CLR 1:1, KL, N = L")["deviation"]) > 2 * plain
