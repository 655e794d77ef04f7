"""CoMMIT in two processes (gloo) against one that accumulates the same batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from test_distributed import settings, together, weights

SCHEDULE = {
    **{"name": "commit", "lr": 1e-2, "warmup": 0.0, "window": 4, "update_every": 2, "measure_every": 1},
    **{"min_samples": 1, "batches": "all"},
}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def node(folder: Path, weight: float, **trainer: Any) -> dict[str, Any]:
    result = {**settings(folder, **trainer), "schedule": {**SCHEDULE, "weight": weight}}
    sizes = {**result["backbone"]["sizes"], "initializer_range": 0.3}  # so large that pictures move the answers
    return {**result, "backbone": {**result["backbone"], "sizes": sizes}}


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_22_two_processes_measure_and_steer_as_one(tmp_path: Path, weight: float) -> None:
    together(node(tmp_path / "two", weight), tmp_path / "two.log")
    jobs.run(node(tmp_path / "one", weight, accumulate=2), tmp_path / "one.log")
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        keys = [key for key in a if key.startswith(("balance/kappa", "balance/d/", "balance/multiplier", "lr/"))]
        assert sorted(keys) == sorted(key for key in b if key in keys)
        for key in keys:
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    assert one[-1]["balance/kappa"] > 0
    assert one[-1]["balance/multiplier/llm"] != pytest.approx(1.0, rel=1e-3)
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-3, atol=1e-6)
