"""What contracts are tried on: raw items, and a whole model of a few thousand weights with pictures to learn from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mllm_factory.assemble import build_collator, build_model
from mllm_factory.config import compose
from mllm_factory.distributed import World
from mllm_factory.errors import ConfigError
from mllm_factory.evaluator import evaluate
from mllm_factory.interfaces import Backbone, Encoder, Projector, Schedule, Source, Stepping, takes_part
from mllm_factory.model import MultimodalModel, state_tensors
from mllm_factory.trainer import TrainState, parameter_groups
from mllm_factory.types import Batch, Message, Sample
from mllm_factory.weightless import weightless

STEPS = 4
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


class Pictures(Source):
    """Four pictures of one colour each and its name."""

    modalities = frozenset({"vision"})

    def __len__(self) -> int:
        return len(COLOURS)

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image

        name, colour = list(COLOURS.items())[index]
        messages = (Message("user", "<image>which colour is it?"), Message("assistant", name))
        return Sample(name, messages, {"vision": (Image.new("RGB", (24, 24), colour),)})


def small_tree(tuning: str = "frozen") -> dict[str, Any]:
    """The smallest composition of built-in parts, with one strategy for all."""
    return {**_smoke(), "tuning": {part: {"name": tuning} for part in ("vision", "projector", "backbone")}}


@cache
def _smoke() -> dict[str, Any]:
    composed = compose("train", ["experiment=smoke"])
    if composed.tree is None:
        raise ConfigError(composed.problems)
    return composed.tree


def small_model(tuning: str = "full") -> tuple[MultimodalModel, Batch]:
    """The model of ``small_tree`` and its batch."""
    tree = small_tree(tuning)
    model = build_model(tree)
    return model, build_collator(tree, model)([Pictures()[i] for i in range(len(COLOURS))])


# ---------------------------------------------------------------- what goes in and comes out


def raw_item(encoder: Encoder, seed: int = 0) -> Any:
    """A picture of 50 x 40 random pixels, or a second of noise at 16 kHz."""
    from PIL import Image

    random = np.random.default_rng(seed)
    if encoder.modality == "vision":
        return Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    return torch.from_numpy(0.1 * random.standard_normal((1, 16000), dtype=np.float32)), 16000


def inputs(part: nn.Module, sizes: Mapping[str, int], rows: int = 3) -> Tensor:
    """Random input of ``rows`` items: [n, *item_shape], [n, in_tokens, in_dim] or token ids [n, 6]."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(part, Encoder):
        return torch.cat([part.transform(raw_item(part, seed))[:1] for seed in range(rows)])
    if isinstance(part, Projector):
        return torch.randn(rows, sizes["in_tokens"], sizes["in_dim"], generator=generator)
    return torch.randint(0, len(cast(Backbone, part).tokenizer), (rows, 6), generator=generator)


def output(part: nn.Module, given: Tensor) -> Tensor:
    """What the part makes of ``inputs``; of a backbone, the logits."""
    if not isinstance(part, Backbone):
        weight = next((p for p in part.parameters() if p.is_floating_point()), None)
        return part(given if weight is None or not given.is_floating_point() else given.to(weight.dtype))
    return part.logits(part(part.embed(given)))


def near(one: Tensor, other: Tensor) -> bool:
    """Equal up to 1e-4 of the largest value: two ways to compute the same."""
    return torch.allclose(one, other, rtol=0, atol=1e-4 * max(float(other.abs().max()), 1e-6))


# ---------------------------------------------------------------- strategies


def learned_by(make: Callable[..., Any], require: Callable[[bool, str, object], None]) -> None:
    """Apply a strategy to each part of a fresh model that it accepts, and hold the rules of strategies."""
    refusals = [refusal for part in ("vision", "projector", "backbone") if (refusal := _applied(make, part, require))]
    require(len(refusals) < 3, "a strategy fits at least one part", "; ".join(refusals))


def _applied(make: Callable[..., Any], part: str, require: Callable[[bool, str, object], None]) -> str:
    """The strategy's reason to refuse the part; empty where it was applied."""
    (model, batch), (twin, _) = small_model(), small_model()
    others = {name: module for name, module in model.parts().items() if name != part}
    before = {
        f"{name}.{key}": (p.clone(), p.requires_grad) for name, m in others.items() for key, p in m.named_parameters()
    }
    buffers = _buffers(model)
    try:
        for each in (model, twin):
            make(5).apply(each.parts()[part], each)
    except ConfigError as error:
        return str(error)
    now = {f"{name}.{key}": (p, p.requires_grad) for name, m in others.items() for key, p in m.named_parameters()}
    kept = before.keys() == now.keys() and all(
        torch.equal(p, now[k][0]) and f == now[k][1] for k, (p, f) in before.items()
    )
    require(kept, "a strategy changes nothing but its part", f"applied to {part}, it changes others")
    added = sorted(_buffers(model) - buffers)
    require(not added, "all state of an inserted module lives in parameters", f"new buffers {', '.join(added[:3])}")
    pairs = zip(model.named_parameters(), twin.named_parameters(), strict=True)
    same = all(a == b and torch.equal(p, q) and p.requires_grad == q.requires_grad for (a, p), (b, q) in pairs)
    require(same, "applied twice with one seed, a strategy does the same", f"on {part}, it does not")
    model.train()(batch).loss_sum.backward()
    learning = {name: p for name, p in model.parts()[part].named_parameters() if p.requires_grad}
    dead = [name for name, p in learning.items() if p.grad is None]
    require(
        not dead, "a gradient reaches every parameter that learns", f"of {part}, none reaches {', '.join(dead[:3])}"
    )
    _require_meta(make, part, model, require)
    if takes_part(make(5)):
        _require_continues(make, part, require)
    return ""


def _require_continues(make: Callable[..., Any], part: str, require: Any) -> None:
    """Of a strategy with steps: half a training, and the other half by a new one that loads its state."""
    ends, half = [], None
    for _ in range(2):
        (model, batch), strategy = small_model(), make(5)
        strategy.apply(model.parts()[part], model)
        _, half = _trained(model, batch, strategy, 0.01, half)
        ends.append(model.state_dict())
    same = all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    require(same, "a strategy that loads a state goes on as the one that gave it", f"on {part}, other weights")


def _require_meta(make: Callable[..., Any], part: str, real: MultimodalModel, require: Any) -> None:
    with weightless():
        empty = build_model(small_tree("full"))
        make(5).apply(empty.parts()[part], empty)
    shapes = [{name: (p.shape, p.requires_grad) for name, p in m.named_parameters()} for m in (real, empty)]
    require(
        shapes[0] == shapes[1], "on the meta device a strategy inserts and marks the same", f"on {part}, it does not"
    )


def _buffers(model: MultimodalModel) -> set[str]:
    parameters = {name for name, _ in model.named_parameters()}
    return set(state_tensors(model)) - parameters


# ---------------------------------------------------------------- schedules


def rates_of(schedule: Schedule, start: dict[str, Any] | None) -> tuple[list[list[float]], dict[str, Any]]:
    """The groups' rates at each step of a short training, and all that is needed to go on after half of it.

    Args:
        start: to go on from.
    """
    return _trained(*small_model(), schedule, 0.0, start)


def _trained(
    model: MultimodalModel, batch: Batch, taking_part: Stepping, lr: float, start: dict[str, Any] | None
) -> tuple[list[list[float]], dict[str, Any]]:
    """Train for ``STEPS`` steps, or from ``start`` on; as ``rates_of``."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=lr)
    state = TrainState(model.train(), optimizer, STEPS, World(0, 1, torch.device("cpu")))
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "taking_part": taking_part}
    if start is not None:
        for name, part in parts.items():
            part.load_state_dict(start[name])
        state.step = STEPS // 2
    rates, half = [], {}
    while state.step < STEPS:
        if state.step == STEPS // 2:
            half = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        rates.append(_step(state, taking_part, batch))
    return rates, half


def _step(state: TrainState, taking_part: Stepping, batch: Batch) -> list[float]:
    state.batches, state.num_labels = [batch], batch.num_labels
    loss: Tensor = state.model(batch).loss_sum / state.num_labels
    loss.backward()
    taking_part.before_step(state)
    rates = [float(group["lr"]) for group in state.optimizer.param_groups]
    state.optimizer.step()
    taking_part.after_step(state)
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return rates


# ---------------------------------------------------------------- metrics


def measured(make: Callable[..., Any]) -> dict[str, float]:
    """What a metric says of the untrained model's answers."""
    tree = small_tree()
    model = build_model(tree)
    collator = build_collator(tree, model)
    found = evaluate(
        model,
        Pictures(),
        collator,
        {"metric": make()},
        batch_size=2,
        device=torch.device("cpu"),
        autocast=nullcontext(),
    )
    return {key: value for key, value in found.items() if key not in ("samples", "refused")}
