"""Two processes (gloo) against one, for each way of learning, and where pictures or a process are missing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from test_distributed import STEPS, begin, report, settings, together, weights
from toys import Colours

from mllm_factory import Message, Sample, checkpoint, runs
from mllm_factory.loader import Order

COMMIT = {
    **{"name": "commit", "lr": 1e-2, "warmup": 0.0, "window": 4, "update_every": 2, "measure_every": 1},
    **{"min_samples": 1, "batches": "all"},
}
MORES = {"name": "mores", "rank": 2, "positions": "f1+l1", "init": "random"}
WAYS: dict[str, dict[str, Any]] = {
    "full": {"backbone": {"name": "full"}},
    "lora": {"backbone": {"name": "lora", "rank": 2, "targets": "all-linear"}},
    "mores": {"backbone": MORES},
    "mores packed": {"backbone": MORES},
    "commit": {"backbone": {"name": "full"}},
}


def way(name: str, folder: Path, **trainer: Any) -> dict[str, Any]:
    """A run of the test's own length in which every batch of a step has another number of labels."""
    packing = {"packing": True, "batch_size": 3} if "packed" in name else {}
    node = settings(folder, **packing, **trainer)
    node["tuning"] |= WAYS[name]
    node["metrics"] = {}
    return {**node, "schedule": COMMIT} if name == "commit" else node


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_two_processes_are_one_that_accumulates(tmp_path: Path, name: str) -> None:
    """Copies bit for bit, sharded to 1e-6; what weighs batches by their labels shows in both."""
    jobs.run(way(name, tmp_path / "one", accumulate=2), tmp_path / "one.log")
    together(way(name, tmp_path / "two"), tmp_path / "two.log")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    jobs.assert_same(two, one, name)
    for a, b in zip(jobs.lines(tmp_path / "one"), jobs.lines(tmp_path / "two"), strict=True):
        jobs.assert_same({k: b[k] for k in a if "norm" not in k}, {k: v for k, v in a.items() if "norm" not in k}, name)
    if name == "commit":
        return  # it refuses sharded weights
    together(way(name, tmp_path / "sharded", strategy="fsdp"), tmp_path / "sharded.log")
    sharded = weights(tmp_path / "sharded")
    assert {k: (v.shape, v.dtype) for k, v in sharded.items()} == {k: (v.shape, v.dtype) for k, v in one.items()}
    for key, value in one.items():
        torch.testing.assert_close(sharded[key], value, rtol=1e-5, atol=1e-6, msg=key)


class PicturesAt(Colours):
    """Samples with a picture at these numbers only."""

    def __init__(self, n: int, at: list[int]) -> None:
        super().__init__(n)
        self.at = at

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        if index in self.at:
            return sample
        return Sample(sample.id, (Message("user", "colour?"), sample.messages[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("places", [[2 * STEPS - 1], []], ids=["last step of one process", "nowhere"])
def test_pictures_in_the_last_step_of_one_process_or_nowhere(tmp_path: Path, places: list[int]) -> None:
    """So no process has any in the steps before: nobody waits for a gradient that does not come."""
    order = Order(24, 1, 0, None, 1)
    source = {"name": "test_distributed_tunings:PicturesAt", "n": 24, "at": [order[g][0] for g in places]}

    def node(name: str, **trainer: Any) -> dict[str, Any]:
        result = way("full", tmp_path / name, **trainer)
        result["data"]["train"] = source
        return result

    jobs.run(node("one", accumulate=2), tmp_path / "one.log")
    one = weights(tmp_path / "one")
    began = time.monotonic()
    for strategy in ("ddp", "fsdp"):
        together(node(strategy, strategy=strategy), tmp_path / f"{strategy}.log")
        for key, value in weights(tmp_path / strategy).items():
            torch.testing.assert_close(value, one[key], rtol=1e-5, atol=1e-6, msg=key)
    assert time.monotonic() - began < 120
    first = [line["loss"] for line in jobs.lines(tmp_path / "one")]
    assert len(first) == STEPS


@pytest.mark.slow
def test_the_last_checkpoint_of_a_killed_process_is_good(tmp_path: Path) -> None:
    """The other process ends within 30 s and says why; one process alone goes on from what was saved."""
    folder = tmp_path / "run"
    processes = begin(way("lora", folder, max_steps=10**6, save_every=2, keep=2), tmp_path / "log")
    assert jobs.until(lambda: runs.latest(folder) is not None, processes[0])
    processes[1].kill()
    killed = time.monotonic()
    assert jobs.finish(processes[0], 60) == 2
    assert time.monotonic() - killed < 30
    text = (tmp_path / "log.0").read_text()
    assert "process 0 stopped because another one did; the cause is in that one's output" in text
    saved = runs.latest(folder)
    assert saved is not None
    step = checkpoint.read_progress(saved)["step"]
    alone = {**way("lora", folder, max_steps=step + 2, accumulate=2, save_every=2), "resume": "auto"}
    text = jobs.run(alone, tmp_path / "alone.log")
    assert "2 processes so far, 1 now" in text
    assert report(folder)["train/steps"] == step + 2
