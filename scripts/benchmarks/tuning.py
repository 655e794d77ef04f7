"""What strategies cost: MoReS beside nothing trained in the backbone, its map beside the published one, LoRA beside peft.

Both sides of a pair share their frozen weights and take turns in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from benchmarks.harness import Result, compare
from benchmarks.overhead import Clock, samples
from mllm_factory import Batch, Message, MultimodalModel, Sample
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.components.tuning.steering import FORMS, LowRankMap
from mllm_factory.model import trained_tensors

MORES = {"name": "mores"}
LORA = {"name": "lora", "rank": 16, "alpha": 32.0, "targets": "all-linear"}
STEP, FORWARD, MODULE, KILOBYTES = 1.05, 1.02, 50.0, 300.0
SAME = 1e-6


def sizes(dim: int, layers: int, heads: int, kv_heads: int, hidden: int) -> dict[str, Any]:
    """Config values of a Llama."""
    return {
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": hidden,
        "max_position_embeddings": 512,
    }


SMOLLM2 = sizes(576, 30, 9, 3, 1536)
SHAPES = {"D=576 L=30": SMOLLM2, "D=2048 L=4": sizes(2048, 4, 32, 32, 8192)}
TINY = {"D=64 L=3": sizes(64, 3, 4, 4, 128)}


def tree(backbone: dict[str, Any], strategy: dict[str, Any], vision: bool = True) -> dict[str, Any]:
    """A small frozen vision transformer, a two-layer MLP that learns, and a Llama with a byte vocabulary."""
    return {
        "seed": 0,
        "vision": {"name": "timm", "architecture": "test_vit", "image_size": 96} if vision else None,
        "projector": {"name": "mlp", "depth": 2},
        "backbone": {"name": "hf", "architecture": "llama", "sizes": backbone, "tokenizer": "bytes"},
        "tuning": {"vision": {"name": "frozen"}, "projector": {"name": "full"}, "backbone": strategy},
        "data": {"max_length": 512},
    }


def share_weights(one: nn.Module, other: nn.Module) -> None:
    """Let both hold the same frozen tensors, by name."""
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        if name in theirs and not parameter.requires_grad:
            theirs[name].data = parameter.data


def stepper(loss: Callable[[], Tensor], model: nn.Module) -> Callable[[], Tensor]:
    """Forward, backward, clipping and AdamW; gives the loss."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)

    def step() -> Tensor:
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def mean_loss(model: MultimodalModel, batch: Batch) -> Tensor:
    """Mean label loss of a batch."""
    output = model(batch)
    return output.loss_sum / output.num_labels


def turns(
    ours: Callable[[], Any], other: Callable[[], Any], runs: int, warm_up: int = 1
) -> tuple[list[Any], list[Any]]:
    """(wall, CPU) milliseconds of both, in pairs of changing order."""
    clock = Clock()
    spent: tuple[list[Any], list[Any]] = ([], [])
    for i in range(runs + warm_up):
        pair = [(ours, spent[0]), (other, spent[1])]
        for call, into in pair if i % 2 else reversed(pair):
            clock.reset()
            call()
            found = clock.look()
            if i >= warm_up:
                into.append(found)
    return spent


def rows(result: Result, case: str, spent: tuple[list[Any], list[Any]], rule: str, mark: float | None) -> None:
    """Wall time with its mark, and CPU time beside it."""
    for unit, i, held in (("ms", 0, mark), ("CPU ms", 1, None)):
        result.rows.append(compare(case, unit, [t[i] for t in spent[0]], [t[i] for t in spent[1]], rule, held))


# ---------------------------------------------------------------- the cases


def mores_in_a_model(result: Result, name: str, backbone: dict[str, Any], runs: int, batch_size: int) -> None:
    """The same model with MoReS (rank 1, 9 positions, all layers) and with a backbone in which nothing learns."""
    node = tree(backbone, MORES)
    ours = build_model(node)
    other = build_model(tree(backbone, {"name": "frozen"}))
    share_weights(ours.backbone, other.backbone)
    batch = build_collator(node, ours)(samples(batch_size))
    ours.eval(), other.eval()
    with torch.no_grad():
        rows(result, f"MoReS {name} forward", turns(lambda: ours(batch), lambda: other(batch), 2 * runs), "<=", FORWARD)
    ours.train(), other.train()
    steps = [stepper(lambda m=model: mean_loss(m, batch), model) for model in (ours, other)]  # type: ignore[misc]
    first = [float(step()) for step in steps]
    rows(result, f"MoReS {name} step", turns(steps[0], steps[1], runs), "<=", STEP)
    result.facts[f"MoReS {name}"] = {
        "batch": list(batch.input_ids.shape),
        "trainable in the backbone": sum(p.numel() for p in ours.backbone.parameters() if p.requires_grad),
    }
    result.checks[f"MoReS {name} starts from the same loss"] = abs(first[0] / first[1] - 1) <= SAME


class Published(nn.Module):
    """The arithmetic of the published module: R = base H(v), and in every forward R is assigned to itself.

    Assigning makes torch's orthogonal parametrisation fill R up to [D, D] with random columns, take the QR of that, keep Q
    as the new base, and reset v.
    """

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        rotate: Any = nn.Module()
        rotate.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(dim, rank)))
        self.rotate: Any = nn.utils.parametrizations.orthogonal(rotate, orthogonal_map="householder")
        self.source = nn.Linear(dim, rank)

    def forward(self, h: Tensor) -> Tensor:
        """[n, D] -> [n, D]"""
        self.rotate.weight = self.rotate.weight.to(torch.float32)
        rotated = h @ self.rotate.weight
        return h + (self.source(h) - rotated) @ self.rotate.weight.T


def the_module_alone(result: Result, dim: int, rank: int, runs: int) -> None:
    """Forward and backward of one map on 16 rows of 9 positions."""
    torch.manual_seed(0)
    published, ours = Published(dim, rank), LowRankMap(dim, rank, FORMS["orthonormal"], "random")
    h = torch.randn(16 * 9, dim, requires_grad=True)
    with torch.no_grad():
        expected = published(h)
        ours.base.copy_(published.rotate.weight)
        ours.weight.copy_(published.source.weight), ours.bias.copy_(published.source.bias)
        result.checks["the map gives what the published one gives, to 1e-4"] = bool(
            (ours(h) - expected).abs().max() < 1e-4
        )

    def run(module: nn.Module) -> None:
        module(h).square().sum().backward()
        module.zero_grad(set_to_none=True)
        h.grad = None

    spent = turns(lambda: run(ours), lambda: run(published), runs)
    rows(result, f"map alone D={dim} r={rank}", spent, ">=", MODULE)
    for name, module in (("ours", ours), ("published", published)):
        tensors = [*module.parameters(), *module.buffers()]
        result.facts[f"largest tensor of the {name} map"] = max(t.numel() for t in tensors)
    result.checks["the map holds nothing of D x D"] = result.facts["largest tensor of the ours map"] == dim * rank


def lora_beside_peft(result: Result, name: str, backbone: dict[str, Any], runs: int, batch_size: int) -> None:
    """A LoRA step of our model on text against peft's model around the bare transformers model."""
    from peft import LoraConfig, get_peft_model

    node = tree(backbone, LORA, vision=False)
    ours, bare = build_model(node), build_model(tree(backbone, {"name": "frozen"}, vision=False))
    batch = build_collator(node, ours)([talk(i) for i in range(batch_size)])
    model: Any = bare.backbone
    theirs = get_peft_model(
        model.model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long(), "labels": batch.labels}
    ours.train(), theirs.train()
    steps = [stepper(lambda: mean_loss(ours, batch), ours), stepper(lambda: theirs(**given).loss, theirs)]
    first = [float(step()) for step in steps]
    result.checks[f"LoRA {name} losses equal to 1e-5"] = abs(first[0] / first[1] - 1) <= 1e-5
    rows(result, f"LoRA {name} step", turns(steps[0], steps[1], runs), "<=", 1.0)
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    result.checks[f"LoRA {name} trains as many weights"] = counts[0] == counts[1]


def talk(i: int) -> Sample:
    """A conversation without media."""
    turns = Message("user", f"what is {i} and {i}? " * 3), Message("assistant", f"it is {2 * i}, as everybody knows")
    return Sample(str(i), turns)


def checkpoint_bytes(result: Result) -> None:
    """Size of what a checkpoint holds of the backbone: MoReS of rank 1 beside LoRA of rank 16, both on SmolLM2-135M."""
    found = {}
    for name, strategy in (("ours", MORES), ("other", LORA)):
        with torch.device("meta"):
            model = build_model(tree(SMOLLM2, strategy))
        tensors = {n: torch.zeros(t.shape) for n, t in trained_tensors(model).items() if n.startswith("backbone")}
        found[name] = [len(save(tensors)) / 1e3]
    row = compare("MoReS r=1 in a checkpoint beside LoRA r=16, D=576 L=30", "kB", found["ours"], found["other"])
    result.rows.append(replace(row, mark=KILOBYTES, absolute=True))


def run(runs: int | None, small: bool) -> Result:
    """Every case. ``small``: tiny sizes."""
    torch.manual_seed(0)
    result = Result("tuning", "nothing trained in the backbone, the published map, and peft")
    for name, backbone in (TINY if small else SHAPES).items():
        mores_in_a_model(result, name, backbone, runs or 10, 2 if small else 4)
    the_module_alone(result, 64 if small else 2560, 4, runs or 3)
    name, backbone = next(iter((TINY if small else SHAPES).items()))
    lora_beside_peft(result, name, backbone, runs or 10, 2 if small else 4)
    checkpoint_bytes(result)
    return result
