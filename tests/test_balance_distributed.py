"""The baselines in two processes (gloo) against one that accumulates the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from test_distributed import settings, together, weights

OPTIONS: dict[str, dict[str, Any]] = {
    "coordinate_descent": {"window": 1, "share": 0.5},
    "grad_ratio": {"steps": 1},
    "ogm_ge": {"alpha": 0.5},
    "agm": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_train_as_one(tmp_path: Path, name: str) -> None:
    schedule = {"name": name, "lr": 1e-2, "warmup": 0.0, **OPTIONS[name]}
    together({**settings(tmp_path / "two"), "schedule": schedule}, tmp_path / "two.log")
    jobs.run({**settings(tmp_path / "one", accumulate=2), "schedule": schedule}, tmp_path / "one.log")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5)
