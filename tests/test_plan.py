"""The plan for many processes, against the formulas by hand; presets and job scripts for clusters."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mllm_factory import ConfigError, UserError, distributed
from mllm_factory.config import compose
from mllm_factory.doctor import check
from mllm_factory.plan import Machine, machine, plan

ROOT = Path(__file__).parent.parent
FOUND: dict[str, Any] = {
    "memory": {"weights": 1000, "gradients": 100, "optimizer": 200, "activations": 50, "peak": 1330},
    "sharding": {"layer": 30, "rest": 40},
    "samples": 12_800,
    "features": {"vision": 8},
    "trainer": {"batch_size": 2, "accumulate": 4, "strategy": "fsdp", "save_every": 10},
    "flops_per_step": 6e6,
}
OF = Machine(flops=1e6, use=0.5, memory=500, link=100, disk=50, worker=4)


def test_numbers_are_those_of_the_formulas() -> None:
    found = {row.name: row.value for row in plan(FOUND, 4, OF)}
    traffic = 4 * 3 / 4 * (2 * 1000 + 100)
    step = max(6e6 / 5e5, traffic / 100)
    saving = 300 / 50 + 300 / 100
    assert found == pytest.approx(
        {
            "memory of a process, ddp": 1330,
            "memory of a process, fsdp": 1300 / 4 + 60 + 40 + 50,
            "memory of a device": 500,
            "traffic of a process a step, ddp": 2 * 3 / 4 * 100,
            "traffic of a process a step, fsdp": traffic,
            "arithmetic of a step": 12.0,
            "traffic of a step, fsdp": traffic / 100,
            "a step": step,
            "samples of a step": 32,
            "an epoch": 400,
            "an epoch's time": 400 * step / 3600,
            "checkpoint": 300,
            "writing a checkpoint": saving,
            "time spent on checkpoints": saving / (saving + 10 * step),
            "samples to be loaded": 32 / step,
            "loader workers of a process": 32 / step / 4 / 4,
            "cached vision features": 8 * 12_800,
            "reading vision features": 8 * 32 / step / 4,
        }
    )
    copies = {**FOUND, "trainer": {**FOUND["trainer"], "strategy": "ddp"}}
    alone = {row.name: row.value for row in plan(copies, 1, OF)}
    assert alone["traffic of a process a step, ddp"] == 0 and alone["a step"] == 12.0
    assert alone["writing a checkpoint"] == 6.0


def test_wrong_flags_are_told() -> None:
    assert machine("flops=1e15,use=0.3") == Machine(flops=1e15, use=0.3)
    with pytest.raises(UserError, match="--machine: there is no 'flop'; did you mean 'flops'"):
        machine("flop=1")
    with pytest.raises(UserError, match="--machine: use is a number above 0, got 'much'"):
        machine("use=much")
    with pytest.raises(UserError, match="--processes: 0 is no number of processes"):
        plan(FOUND, 0, OF)
    with pytest.raises(UserError, match="what a step takes is not known"):
        plan({k: v for k, v in FOUND.items() if k != "flops_per_step"}, 2, OF)


def test_check_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(["experiment=smoke", "--json", "--processes", "8", "--machine", "worker=1"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {row["name"]: row["value"] for row in report["plan"]}
    batch = report["trainer"]["batch_size"] * report["trainer"]["accumulate"]
    assert found["samples of a step"] == 8 * batch
    assert found["checkpoint"] == 3 * report["memory"]["gradients"]
    layers = report["memory"]["weights"] - report["sharding"]["rest"]
    assert 0 < report["sharding"]["layer"] <= layers
    assert check(["experiment=smoke", "--processes", "8"]) == 0
    assert "loader workers of a process" in capsys.readouterr().out


def test_the_job_script_trains_what_composes() -> None:
    text = (ROOT / "scripts" / "train.sbatch").read_text()
    usage = re.findall(r"^#   (sbatch .*)$", re.sub(r" \\\n# +", " ", text), re.MULTILINE)
    assert len(usage) == 2
    trees = []
    for line in usage:
        words = shlex.split(line)
        overrides = words[words.index("scripts/train.sbatch") + 1 :]
        composed = compose("train", ["output_dir=outputs/slurm_1", "resume=auto", *overrides])
        assert composed.tree is not None and composed.check() == []
        trees.append(composed.tree)
    nodes, each = (int(re.findall(rf"^#SBATCH --{flag}=(\d+)", text, re.M)[0]) for flag in ("nodes", "gpus-per-node"))
    trainer = trees[0]["trainer"]
    assert (
        trainer["strategy"] == "fsdp" and trainer["packing"] is True and trees[0]["output_dir"] == "/runs/steering_13b"
    )
    assert nodes * each * trainer["batch_size"] * trainer["accumulate"] == 128, "the batch of the stage"


def test_tasks_of_srun_that_nobody_introduced_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with (
        pytest.raises(
            ConfigError, match="srun started 8 processes that know nothing of each other; let it start torchrun"
        ),
        distributed.joined("cpu", 5.0),
    ):
        pass
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    with distributed.joined("cpu", 5.0) as world:
        assert world.size == 1
