"""Run folders as ``train -m`` leaves them, written with the engine's own writer, without training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mllm_factory import recorder

EVAL = {"name": "easy_vqa", "split": "test", "limit": 16}
CHOICES = {"tuning": "lora", "vision": "vit_test", "experiment": "smoke"}


def tree_of(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A tree with what a report reads; ``changes`` are root keys."""
    base = {
        "name": "smoke",
        "seed": seed,
        "vision": {"name": "timm"},
        "tuning": {"backbone": {"name": "lora", "rank": 4}},
    }
    rest = {"data": {"train": {"name": "easy_vqa"}, "eval": EVAL}, "trainer": {"max_steps": 4}}
    return {**base, **rest, "metrics": {"exact_match": {"name": "exact_match"}}, **changes}


def write_run(
    folder: Path,
    overrides: Sequence[str] = (),
    tree: Mapping[str, Any] | None = None,
    values: Mapping[str, float] | None = None,
    losses: Sequence[float] = (),
    choices: Mapping[str, Any] | None = None,
) -> Path:
    """One run folder. ``values`` None: it is not done."""
    (folder / ".hydra").mkdir(parents=True)
    tree = tree_of() if tree is None else tree
    (folder / "config.yaml").write_text(yaml.safe_dump({**tree, "output_dir": str(folder)}, sort_keys=False))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    told = {"hydra": {"runtime": {"choices": CHOICES if choices is None else dict(choices)}}}
    (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(told))
    lines = [json.dumps({"step": i, "loss": loss, "eval/exact_match": i / 10}) for i, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / ".lock").touch()
    if values is not None:
        recorder.report(folder, values)
    return folder


def costs(trainable: float, seconds: float = 1.5) -> dict[str, float]:
    """The part of a report that the training writes."""
    return {
        **{"samples": 16.0, "refused": 0.0, "train/seconds": seconds, "parameters/trainable": trainable},
        **{"checkpoint_bytes": 4096.0, "peak_memory_bytes": 8e8, "parameters/trainable_backbone": trainable / 2},
    }


def sweep(folder: Path) -> Path:
    """lora and mores, two seeds each: exact match 0.8, 0.9 and 0.5, 0.7; 1000 and 10 trainable parameters."""
    for i, (tuning, seed, score) in enumerate(
        [("lora", 0, 0.8), ("lora", 1, 0.9), ("mores", 0, 0.5), ("mores", 1, 0.7)]
    ):
        write_run(
            folder / str(i),
            ["experiment=smoke", "trainer.max_steps=4", f"seed={seed}", f"tuning={tuning}"],
            tree_of(seed, tuning={"backbone": {"name": tuning}}),
            {"exact_match": score, **costs(1000 if tuning == "lora" else 10)},
            [3.0, 2.0, 1.5, 1.0 + seed],
            {**CHOICES, "tuning": tuning},
        )
    return folder


def attentive(shift: float, layers: int = 4) -> dict[str, float]:
    """What the attention and counterfactual metrics report, in their keys."""
    found: dict[str, float] = {"exact_match": 0.8}
    for group, share in (("vision", 0.2), ("system", 0.3), ("user", 0.4)):
        by = {f"attention_share/{group}/layer_{n:02d}": share + shift * n / 10 for n in range(layers)}
        found |= {f"attention_share/{group}": sum(by.values()) / layers, **by}
    found |= {
        f"attention_share/vision/layer_{n:02d}/head_{h:02d}": 0.1 * h + shift for n in range(layers) for h in range(3)
    }
    found |= {
        "lmar/vision": 0.5 + shift,
        **{f"lmar/vision/layer_{n:02d}": 10.0 ** (n - 2) + shift for n in range(layers)},
    }
    for key in ("image_gain", "image_gain/blank", "flip_rate/vision"):
        found |= {key: 0.3 + shift, f"{key}/low": 0.2 + shift, f"{key}/high": 0.45 + shift}
    return found
