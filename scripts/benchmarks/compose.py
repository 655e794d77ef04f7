"""Our composition with all its checks against Hydra's bare ``compose`` of the same tree, in CPU time.

Twice: as the first thing a process does after its imports (what one command pays), and again in the same process (a sweep).
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.harness import Result, compare

OVERRIDES = ["experiment=smoke", "tuning=lora", "tuning.backbone.rank=4", "projector.depth=3", "trainer.max_steps=5"]
MARK = 1.3
SIDES = ("ours", "other")


def ours() -> dict[str, object]:
    """Compose and check; what comes out has no problem."""
    from mllm_factory.config import compose

    composed = compose("train", OVERRIDES)
    problems = composed.check()
    if problems or composed.tree is None:
        raise RuntimeError(f"the benchmark's own tree has problems: {problems}")
    return composed.tree


def other() -> dict[str, object]:
    """Compose with Hydra alone, to plain values."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    with initialize_config_module("mllm_factory.conf", version_base="1.3"):
        tree = OmegaConf.to_container(compose("train", OVERRIDES), resolve=True)
    return tree  # type: ignore[return-value]


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of this process for one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def first(side: str) -> float:
    """CPU milliseconds of a side's first call in a fresh process, imports not counted."""
    code = (
        "import hydra, mllm_factory.config, mllm_factory.registry, yaml; from benchmarks import compose; "
        f"print(compose.seconds(compose.{side}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} cannot compose: {done.stderr.strip()}")
    return float(done.stdout) * 1e3


def run(runs: int | None, small: bool) -> Result:
    """Alternate both sides, ``runs`` times each in one process and a third of it in fresh ones."""
    result = Result("compose", "Hydra's compose alone")
    same = {k: v for k, v in ours().items() if k != "output_dir"}  # holds the time
    result.checks["the same tree"] = same == {k: v for k, v in _nulls(other()).items() if k != "output_dir"}
    again: dict[str, list[float]] = {side: [] for side in SIDES}
    fresh: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(runs or 30):
        for side, call in (("ours", ours), ("other", other)):
            gc.collect()
            again[side].append(seconds(call) * 1e3)
    for _ in range(1 if small else max(1, (runs or 30) // 3)):
        for side in SIDES:
            fresh[side].append(first(side))
    result.rows.append(compare("again in one process", "CPU ms", again["ours"], again["other"], "<=", MARK))
    result.rows.append(compare("first in a process", "CPU ms", fresh["ours"], fresh["other"], "<=", MARK))
    result.facts["torch imported"] = "torch" in sys.modules
    return result


def _nulls(tree: dict[str, object]) -> dict[str, object]:
    """Ours writes a deselected modality as null; Hydra leaves it out."""
    return {"vision": None, "audio": None, **tree}
