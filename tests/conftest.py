"""Fixtures for all tests: the command line in a process of its own, composed trees, one thread and a fixed seed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from mllm_factory.config import compose
from mllm_factory.errors import ConfigError

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_cli("list", "--json")``: the command in an own process, in a temporary folder unless ``cwd`` is given."""

    def run(*args: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mllm_factory", *args],
            cwd=cwd or tmp_path,
            env={**os.environ, "COLUMNS": "200", **env},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture
def tree() -> Callable[..., dict[str, Any]]:
    """``tree("trainer.max_steps=2")``: the smoke experiment as a plain tree."""

    def composed(*overrides: str) -> dict[str, Any]:
        result = compose("train", ["experiment=smoke", *overrides])
        problems = result.check()
        if problems or result.tree is None:
            raise ConfigError(problems)
        return result.tree

    return composed
