"""The training loop against loops written by hand with torch alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import Colours, tree

from mllm_factory.assemble import build_collator, build_model
from mllm_factory.distributed import World
from mllm_factory.errors import ConfigError
from mllm_factory.interfaces import Schedule
from mllm_factory.model import MultimodalModel
from mllm_factory.trainer import Trainer, TrainingError, TrainState
from mllm_factory.types import IGNORE_INDEX, Batch

ALONE = World(0, 1, torch.device("cpu"))
FROZEN, FULL = {"name": "frozen"}, {"name": "full"}


class Fixed(Schedule):
    """One rate for everything; keeps the gradients it is shown."""

    def __init__(self, lr: float = 1e-2) -> None:
        self.lr = lr
        self.seen: list[dict[str, Tensor]] = []

    def before_step(self, state: TrainState) -> None:
        for group in state.optimizer.param_groups:
            group["lr"] = self.lr
        self.seen.append({n: p.grad.clone() for n, p in state.model.named_parameters() if p.grad is not None})


def samples_of(indices: Iterator[int] | range) -> list[Any]:
    source = Colours(64, text_every=5)
    return [source[i] for i in indices]


def made(**changes: Any) -> tuple[MultimodalModel, Any]:
    node = tree(**changes)
    model = build_model(node)
    return model, build_collator(node, model)


def fit(
    model: MultimodalModel, batches: list[Batch], schedule: Schedule | None = None, **options: Any
) -> list[dict[str, Tensor]]:
    """Train over the batches, once; what each step told."""
    told: list[dict[str, Tensor]] = []
    trainer = Trainer(**{"max_steps": len(batches) // options.get("accumulate", 1), "device": "cpu", **options})
    wrapped, state = trainer.prepare(model, ALONE)
    trainer.fit(wrapped, state, schedule or Fixed(), iter(batches), lambda state, facts: told.append(facts))
    return told


def by_hand(model: MultimodalModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss sum and label count from the language model's full logits."""
    logits = model.backbone.model(inputs_embeds=model.embed(batch), attention_mask=batch.attention_mask.long()).logits
    labels = batch.labels[:, 1:].flatten()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss, (labels != IGNORE_INDEX).sum()


def test_accumulation_gives_the_gradient_of_one_big_batch() -> None:
    model, collator = made()
    chunks = [range(0, 5), range(5, 6), range(6, 14), range(14, 16)]
    batches = [collator(samples_of(chunk)) for chunk in chunks]
    assert len({int(b.num_labels) for b in batches}) == 4, "uneven"
    big = collator(samples_of(chain(*chunks)))
    loss, count = by_hand(model, big)
    expected = torch.autograd.grad(loss / count, [p for p in model.parameters() if p.requires_grad])
    schedule = Fixed()
    told = fit(model, batches, schedule, accumulate=4, clip=None)
    assert int(told[0]["num_labels"]) == int(count)
    torch.testing.assert_close(told[0]["loss_sum"], loss.detach().double(), rtol=1e-6, atol=0)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, wanted in zip(names, expected, strict=True):
        torch.testing.assert_close(schedule.seen[0][name], wanted, rtol=1e-6, atol=1e-6, msg=name)


def test_three_steps_are_bit_for_bit_those_of_a_loop_by_hand() -> None:
    model, collator = made()
    twin, _ = made()
    batches = [collator(samples_of(range(i, i + 4))) for i in range(0, 24, 4)]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    fit(model, batches, accumulate=2, clip=0.5, weight_decay=0.1, betas=[0.8, 0.95])

    parameters = [p for p in twin.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), fused=True)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        count = sum((b.labels[:, 1:] != IGNORE_INDEX).sum() for b in (first, second))
        for batch in (first, second):
            (twin(batch).loss_sum * (1 / count)).backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert frozen and all(torch.equal(before, model.get_parameter(name)) for name, before in frozen.items())


@pytest.mark.parametrize("clip", [None, 0.01, 1e6])
def test_clipping_bounds_the_update_and_reports_the_norm_before(clip: float | None) -> None:
    model, collator = made()
    schedule = Fixed()

    class Watch(torch.optim.SGD):
        """Keeps the norm of what it is given."""

        def step(self, closure: Any = None) -> Any:
            self.norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()
            return super().step(closure)

    trainer = Trainer(max_steps=1, device="cpu", clip=clip)
    wrapped, state = trainer.prepare(model, ALONE)
    state.optimizer = Watch(state.optimizer.param_groups, lr=0.1)
    told: list[dict[str, Tensor]] = []
    trainer.fit(wrapped, state, schedule, iter([collator(samples_of(range(4)))]), lambda s, facts: told.append(facts))
    before = torch.stack([g.norm() for g in schedule.seen[0].values()]).norm()
    torch.testing.assert_close(told[0]["grad_norm"], before)
    torch.testing.assert_close(
        state.optimizer.norm, torch.minimum(before, torch.tensor(clip or math.inf)), rtol=1e-4, atol=0
    )


def test_groups_are_named_by_part_and_split_by_decay() -> None:
    model, _ = made(tuning__vision=FULL)
    trainer = Trainer(weight_decay=0.3, device="cpu")
    _, state = trainer.prepare(model, ALONE)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {(g["name"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in state.optimizer.param_groups}
    prefixes = {"vision": "encoders.vision.", "projector": "projectors.vision.", "backbone": "backbone."}
    for part, prefix in prefixes.items():
        own = {name: p for name, p in model.named_parameters() if name.startswith(prefix)}
        assert found[part, 0.3] == {name for name, p in own.items() if p.ndim >= 2}
        assert found[part, 0.0] == {name for name, p in own.items() if p.ndim < 2}
    assert len(found) == 6
    assert state.optimizer.defaults["betas"] == (0.9, 0.99)


def test_what_two_parts_share_is_optimised_once() -> None:
    model, _ = made()
    model.projectors["audio"] = model.projectors["vision"]
    _, state = Trainer(device="cpu").prepare(model, ALONE)
    parameters = [p for g in state.optimizer.param_groups for p in g["params"]]
    assert len(parameters) == len({id(p) for p in parameters})


def test_nothing_to_train_is_refused() -> None:
    model, _ = made(tuning={"vision": FROZEN, "projector": FROZEN, "backbone": FROZEN})
    with pytest.raises(ConfigError, match="nothing is trainable"):
        Trainer(device="cpu").prepare(model, ALONE)


def test_a_dead_parameter_is_named_in_the_first_step() -> None:
    model, collator = made(projector={"name": "toys:DeadWeight"})
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(
        TrainingError, match=r"1 trainable tensors got no gradient in the first step: projectors\.vision\.unused;"
    ):
        fit(model, [collator(samples_of(range(4)))])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_loss_that_is_not_finite_names_step_and_samples_and_changes_no_weight() -> None:
    model, collator = made(projector={"name": "toys:TurnsNan", "after": 5})
    batches = [collator(samples_of(range(i, i + 2))) for i in range(0, 12, 2)]
    kept: dict[str, Tensor] = {}

    class Keep(Fixed):
        """Remember the weights before each update."""

        def before_step(self, state: TrainState) -> None:
            super().before_step(state)
            kept.update({name: p.detach().clone() for name, p in state.model.named_parameters()})

    with pytest.raises(TrainingError) as raised:
        fit(model, batches, Keep(), accumulate=2)
    text = str(raised.value)
    assert "step 3: the loss sum is nan" in text and "text 10" in text and "colour 11" in text and "\n" not in text
    assert "colour 8" not in text, "the other batch of the step was good"
    assert all(torch.equal(kept[name], p) for name, p in model.named_parameters())


def test_an_infinite_gradient_of_a_finite_loss_is_caught_too() -> None:
    model, collator = made()
    model.backbone.model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingError, match="step 1: .* gradient norm inf.*colour 1"):
        fit(model, [collator(samples_of(range(1, 4)))])


def test_a_step_without_labels_is_refused() -> None:
    model, collator = made(data__max_length=20)
    collator.overflow = "refuse"
    batch = collator(samples_of(range(1, 3)))
    assert batch.refused == 2
    with pytest.raises(TrainingError, match="step 1: no label token"):
        fit(model, [batch])


def test_one_batch_of_a_step_may_have_no_labels() -> None:
    model, collator = made()
    good = collator(samples_of(range(4)))
    collator.max_length, collator.overflow = 20, "refuse"
    told = fit(model, [collator(samples_of(range(1, 3))), good], accumulate=2)
    assert int(told[0]["num_labels"]) == int(good.num_labels)


def test_bf16_runs_and_keeps_the_weights_in_float32() -> None:
    model, collator = made()
    seen = []
    model.backbone.layers[0].mlp.down_proj.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    told = fit(model, [collator(samples_of(range(4)))] * 8, precision="bf16")
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert told[-1]["loss_sum"] < told[0]["loss_sum"]


def test_bfloat16_weights_train() -> None:
    node = tree()
    node["backbone"]["dtype"] = "bfloat16"
    model = build_model(node)
    told = fit(model, [build_collator(node, model)(samples_of(range(4)))] * 4)
    assert told[-1]["loss_sum"] < told[0]["loss_sum"]


def test_gradient_checkpointing_trains_to_the_same_weights() -> None:
    models = []
    for checkpointing in (False, True):
        node = tree()
        node["backbone"]["sizes"]["attention_dropout"] = 0.2
        model = build_model(node)
        collator = build_collator(node, model)
        torch.manual_seed(0)
        fit(model, [collator(samples_of(range(i, i + 4))) for i in (0, 4, 8)], gradient_checkpointing=checkpointing)
        models.append(model)
    assert all(torch.equal(p, models[1].get_parameter(name)) for name, p in models[0].named_parameters())


def test_a_step_takes_as_many_batches_as_it_accumulates_and_no_more() -> None:
    model, collator = made()
    taken = []

    def counted() -> Iterator[Batch]:
        for batch in repeat(collator(samples_of(range(2)))):
            taken.append(batch)
            yield batch

    trainer = Trainer(max_steps=3, accumulate=2, device="cpu")
    wrapped, state = trainer.prepare(model, ALONE)
    state.step = 1  # as after a resume
    trainer.fit(wrapped, state, Fixed(), counted(), lambda state, facts: None)
    assert len(taken) == 4 and state.step == 3


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_steps", 0, "max_steps must be 1 or more, got 0"),
        ("accumulate", 0, "accumulate must be 1 or more, got 0"),
        ("keep", 0, "keep must be 1 or more, got 0"),
        ("precision", "fp64", "precision cannot be 'fp64'"),
        ("strategy", "fdsp", "did you mean 'fsdp'"),
        ("clip", 0.0, "clip must be above 0, got 0.0"),
        ("timeout", 0.0, "timeout must be above 0, got 0.0"),
        ("workers", -1, "workers must be 0 or more, got -1"),
        ("weight_decay", -0.1, "weight_decay must be 0 or more, got -0.1"),
        ("betas", [0.9], "betas are two numbers"),
        ("betas", [0.9, 1.0], "betas are two numbers"),
    ],
)
def test_values_out_of_range_are_named(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        Trainer(**{option: value})
