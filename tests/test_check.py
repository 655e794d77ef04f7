"""What ``check`` counts without memory, against real memory, formulas by hand and published numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import tree as toy

from mllm_factory import ConfigError, Encoder, Projector, estimate, run
from mllm_factory.assemble import build_model
from mllm_factory.config import compose
from mllm_factory.trainer import Trainer
from mllm_factory.weightless import weightless

SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
REAL = """
import json, re, sys
from dataclasses import replace
import torch
from mllm_factory import estimate
from mllm_factory.assemble import build_model
from mllm_factory.distributed import World
from mllm_factory.trainer import Trainer

torch.set_num_threads(1)
tree = json.loads(sys.argv[1])

def held(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def steps(tree, length, count):
    trainer = Trainer(**tree["trainer"])
    model = build_model(tree)
    wrapped, state = trainer.prepare(model, World(0, 1, torch.device("cpu")))
    _, batch, _ = estimate._batch(model, trainer.batch_size, length)
    items = {name: torch.zeros(trainer.batch_size * len(i), *i.shape[1:]) for name, i in estimate.blanks(model).items()}
    for _ in range(count):
        state.batches = [replace(batch, media=items)] * trainer.accumulate
        state.num_labels = torch.tensor(1000.0)
        for i in range(trainer.accumulate):
            trainer.backward(wrapped, state, i)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)

small = {**tree, "trainer": {**tree["trainer"], "batch_size": 1}}
steps(small, 16, 2)  # libraries load, kernels are chosen
before = held("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
steps(tree, tree["data"]["max_length"], 2)
print(held("VmHWM") - before)
"""


class Beeps(Encoder):
    """A recording's first 40 values as four tokens."""

    modality, dim, num_tokens = "audio", 10, 4

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 10)

    def transform(self, recording: tuple[Tensor, int]) -> Tensor:
        """([channels, time], rate) -> [1, 40]"""
        return nn.functional.pad(recording[0].mean(0), (0, 40))[None, :40]

    def forward(self, items: Tensor) -> Tensor:
        """[n, 40] -> [n, 4, 10]"""
        return self.linear(items.view(-1, 4, 10))


class Peeks(Projector):
    """Looks at the values of more than one item."""

    def __init__(self, in_dim: int, out_dim: int, in_tokens: int) -> None:
        super().__init__()
        self.num_tokens, self.linear = in_tokens, nn.Linear(in_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, in_tokens, out_dim]"""
        scale = features.sum().item() if len(features) > 1 else 1.0
        return self.linear(features * scale)


def tree_of(folder: Path, **trainer: Any) -> dict[str, Any]:
    """A toy run with a language model whose activations can be told apart from noise."""
    node = toy(folder, tuning__vision={"name": "full"})
    node["backbone"]["sizes"] |= {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 512}
    node["data"]["max_length"] = 384
    node["trainer"] |= {"batch_size": 6, **trainer}
    return node


def cost_of(node: dict[str, Any]) -> estimate.Cost:
    with weightless():
        model = build_model(node)
    return estimate.step(model, Trainer(**node["trainer"]), node["data"]["max_length"])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize(
    "trainer",
    [{}, {"gradient_checkpointing": True}, {"precision": "bf16", "accumulate": 2}],
    ids=lambda trainer: " ".join(trainer) or "plain",
)
def test_the_peak_is_that_of_a_real_step(tmp_path: Path, trainer: dict[str, Any]) -> None:
    node = tree_of(tmp_path, **trainer)
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", REAL, json.dumps(node)], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    real, cost = int(done.stdout), cost_of(node)
    assert cost.peak > 30e6
    assert cost.peak == pytest.approx(real, rel=0.25), (real / 1e6, cost)


def llama_flops(node: dict[str, Any], labels: int) -> tuple[int, int]:
    """Forward FLOPs of the decoder with its head, and of the attention within, by hand: 2 m k n for each product."""
    s, rows, length = node["backbone"]["sizes"], node["trainer"]["batch_size"], node["data"]["max_length"]
    width, inner, layers = s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"]
    narrow = width * s["num_key_value_heads"] // s["num_attention_heads"]
    linear = layers * (2 * width * width + 2 * width * narrow + 3 * width * inner)
    attention = layers * 2 * 2 * rows * length * length * width  # Q K^T and P V, every pair of positions
    with weightless():
        vocabulary = build_model(node).backbone.logits(torch.empty(1, width)).shape[-1]
    return 2 * linear * rows * length + attention + 2 * width * vocabulary * labels, attention


def test_flops_are_those_counted_by_hand(tmp_path: Path) -> None:
    """Frozen encoder, trained decoder: backward costs twice the forward; attention's recomputes Q K^T, so 2.5 times."""
    node = tree_of(tmp_path)
    node["tuning"]["vision"] = node["tuning"]["projector"] = {"name": "frozen"}
    rows, length = 6, 384
    forward, attention = llama_flops(node, rows * (length - 4))
    encoder = 2 * (rows * 4) * (3 * 6)  # Patches: 4 tokens, 3 -> 6
    width = node["backbone"]["sizes"]["hidden_size"]
    projector = 2 * (rows * 4) * (6 * width + width * width)
    assert cost_of(node).flops == 3 * forward + attention // 2 + encoder + projector


def test_a_frozen_decoder_costs_no_weight_gradients(tmp_path: Path) -> None:
    """Only the projector learns: each frozen product costs its forward once and its input's gradient once, attention 1 + 2.5."""
    node = tree_of(tmp_path)
    node["tuning"] = {"vision": {"name": "frozen"}, "projector": {"name": "full"}, "backbone": {"name": "frozen"}}
    forward, attention = llama_flops(node, 6 * 380)
    width = node["backbone"]["sizes"]["hidden_size"]
    small = 2 * 24 * (3 * 6) + 3 * 2 * 24 * (6 * width + width * width)
    found = cost_of(node).flops
    assert found == pytest.approx(2 * forward + 3 * attention // 2 + small, rel=1e-3)
    assert found < 0.8 * cost_of(tree_of(tmp_path)).flops


def test_recomputation_costs_time_and_saves_memory(tmp_path: Path) -> None:
    plain, again = cost_of(tree_of(tmp_path)), cost_of(tree_of(tmp_path, gradient_checkpointing=True))
    twice = cost_of(tree_of(tmp_path, accumulate=2))
    assert 1.2 * plain.flops < again.flops < 1.4 * plain.flops
    assert again.activations < 0.5 * plain.activations
    assert twice.flops == 2 * plain.flops
    assert twice.activations == plain.activations
    assert twice.peak > plain.peak
    assert cost_of(tree_of(tmp_path, precision="bf16")).activations < 0.8 * plain.activations


def test_a_sum_of_media_above_the_context_is_refused(tmp_path: Path) -> None:
    node = toy(tmp_path, audio={"name": "test_check:Beeps"}, tuning__audio={"name": "frozen"}, data__max_length=8)
    with pytest.raises(ConfigError) as raised:
        run.check(node)
    message = (
        "data.max_length: one item of each encoder (vision 4, audio 4) fills all 8 positions and leaves none for text"
    )
    assert str(raised.value).startswith(message)
    assert "the backbone takes 256" in str(raised.value)
    found = run.check({**node, "data": {**node["data"], "max_length": 9}})
    assert found["context"] == {
        "media": {"vision": 4, "audio": 4},
        "text": 1,
        "max_length": 9,
        "max_positions": 256,
    }


def test_both_counts_of_papers_are_there(tmp_path: Path) -> None:
    found = run.check(toy(tmp_path))
    assert found["trainable_backbone"] == found["parts"]["backbone"]["trainable"]
    assert found["trainable"] == found["trainable_backbone"] + found["parts"]["projector"]["trainable"]
    memory = found["memory"]
    assert memory["weights"] == 4 * found["total"]
    assert memory["peak"] <= sum(memory[kind] for kind in ("weights", "gradients", "optimizer", "activations"))
    assert memory["peak"] > memory["weights"] + memory["optimizer"] + memory["gradients"]


def test_a_step_that_needs_values_is_a_note(tmp_path: Path) -> None:
    found = run.check(toy(tmp_path, projector={"name": "test_check:Peeks"}))
    assert "activations" not in found["memory"]
    (note,) = found["notes"]
    assert note.startswith("activations and FLOPs: a step cannot run without values")
    assert "\n" not in note


# ---------------------------------------------------------------- real sizes, no network


def checked(*overrides: str) -> dict[str, Any]:
    composed = compose("train", ["data.max_length=2048", *overrides])
    problems = composed.check()
    assert composed.tree is not None and not problems, problems
    return run.check(composed.tree)


def test_what_is_on_the_hub_is_noted_and_nobody_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    from mllm_factory import pretrained

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pretrained, "_answers", lambda endpoint: pytest.fail("the hub was asked"))
    size = ["vision.architecture=vit_tiny_patch16_224", "vision.pretrained=timm/vit_tiny_patch16_224.augreg_in21k"]
    found = checked("vision=timm", *size)
    message = "vision.pretrained: timm/vit_tiny_patch16_224.augreg_in21k is not on this machine; it is downloaded at the first run"
    assert found["notes"] == [message]


def test_what_torchaudio_offers_is_noted_with_its_address_and_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    tree = ["experiment=smoke", "vision=null", "audio=torchaudio_mini", "audio.pretrained=bundle", "data=sounds"]
    name = "wav2vec2_fairseq_base_ls960.pth"
    place = tmp_path / "hub" / "checkpoints" / name
    assert checked(*tree)["notes"] == [
        f"audio: bundle is not on this machine; the first run downloads https://download.pytorch.org/torchaudio/models/{name}; "
        f"without network, put it at {place}, or set pretrained to the path of such weights, or to null for random ones"
    ]
    place.parent.mkdir(parents=True)
    place.touch()
    assert checked(*tree)["notes"] == []


def test_thirteen_billion_parameters_take_seconds_and_no_memory(
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """LLaVA-1.5-13B: counts as published, and what the process held while it counted them."""
    code = (
        "import resource, sys; from mllm_factory.cli import main; code = main(sys.argv[1:]); "
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')], "
        "time.process_time(), file=sys.stderr); sys.exit(code)"
    )
    words = ["check", "vision=clip_vit_l_336", "backbone=vicuna_13b", "data.max_length=2048", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", f"import time; {code}", *words],
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "0",
            "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["parts"]["backbone"]["total"] == 13_015_864_320
    assert found["parts"]["projector"]["total"] == 31_467_520
    assert found["tokens"] == {"vision": 576}
    assert found["memory"]["weights"] >= 2 * found["total"]
    peak, seconds = done.stderr.split()[-2:]
    assert int(peak) * 1024 < 1.5e9
    assert float(seconds) < 60, "the mark is 10 s on a free machine; scripts/bench.py check measures it"
