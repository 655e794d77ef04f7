"""CoMMIT on a toy model against brute force on copies. Numbers in names are those of docs/commit.md."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import ALONE, samples_of
from torch import Tensor, nn
from toys import tree

from mllm_factory import ConfigError, DataError, MultimodalModel, Schedule, TrainState, build, run
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.components.schedules.balance import partition
from mllm_factory.components.schedules.commit import PATIENCE
from mllm_factory.components.schedules.distances import DISTANCES, ORDER
from mllm_factory.components.schedules.probe import Probe, answer_rows, copies
from mllm_factory.components.schedules.regularizer import Regularizer, provisional
from mllm_factory.errors import UserError
from mllm_factory.trainer import Trainer
from mllm_factory.types import IGNORE_INDEX, Batch

SIZES = {  # weights so large that pictures move the answers
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3},
}
TRAINED = {"vision": {"name": "full"}, "projector": {"name": "full"}, "backbone": {"name": "full"}}
EASY = {
    "name": "commit",
    "lr": 1e-2,
    "warmup": 0.0,
    "measure_every": 1,
    "min_samples": 1,
    "window": 4,
    "update_every": 2,
}


def commit(**options: Any) -> Any:
    return build(Schedule, {**EASY, **options})


class Toy:
    """A prepared toy model whose every trainable tensor has a gradient."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, trainer: dict[str, Any] | None = None, **changes: Any
    ) -> None:
        node = tree(**{"tuning": TRAINED, "backbone__sizes": SIZES, **changes})
        self.model: MultimodalModel = build_model(node).to(dtype)
        self.collator = build_collator(node, self.model)
        self.trainer = Trainer(device="cpu", max_steps=40, **(trainer or {}))
        self.wrapped, self.state = self.trainer.prepare(self.model, ALONE)
        self.dtype = dtype

    def batch(self, first: int = 0, size: int = 4) -> Batch:
        batch = self.collator(samples_of(range(first, first + size)))
        return batch if self.dtype == torch.float32 else _cast(batch, self.dtype)

    def backward(self, *batches: Batch) -> None:
        self.state.batches = list(batches)
        self.state.num_labels = torch.stack([b.num_labels for b in batches]).sum()
        for i in range(len(batches)):
            self.trainer.backward(self.wrapped, self.state, i)

    def step(self, schedule: Schedule, *batches: Batch) -> None:
        self.backward(*batches)
        schedule.before_step(self.state)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.state.clip or math.inf)
        self.state.optimizer.step()
        schedule.after_step(self.state)
        self.state.optimizer.zero_grad()
        self.state.step += 1


def _cast(batch: Batch, dtype: torch.dtype) -> Batch:
    return batch._each(lambda t: t.to(dtype) if t.is_floating_point() else t)


def token_logits(model: MultimodalModel, batch: Batch) -> list[Tensor]:
    """Per sample, logits at the positions that predict an answer token, from a forward of that model."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        hidden = model.backbone(model.embed(batch))
        return [
            torch.stack(
                [
                    model.backbone.logits(hidden[b, t])
                    for t in range(batch.labels.shape[1] - 1)
                    if batch.labels[b, t + 1] != IGNORE_INDEX
                ]
            )
            for b in range(len(batch.labels))
        ]


def by_hand(name: str, before: list[Tensor], after: list[Tensor]) -> float:
    """Mean over samples of the mean over tokens, token by token."""
    means = []
    for a, b in zip(before, after, strict=True):
        values = [
            float(DISTANCES[name](x.double().log_softmax(-1), y.double().log_softmax(-1)))
            for x, y in zip(a, b, strict=True)
        ]
        means.append(sum(values) / len(values))
    return sum(means) / len(means)


def put(params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Write values into parameters, bit for bit."""
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)


def hybrid(model: MultimodalModel, params: list[nn.Parameter], values: list[Tensor]) -> MultimodalModel:
    """A deep copy in which some parameters have other values."""
    names = {id(p): name for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    inside = dict(other.named_parameters())
    put([inside[names[id(p)]] for p in params], values)
    return other


# ---------------------------------------------------------------- the probe


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_03_the_probe_equals_two_whole_copies(name: str, dtype: torch.dtype, near: float) -> None:
    toy = Toy(dtype)
    encoder, llm = partition(toy.model, None)
    probe = Probe(toy.model, [encoder, llm], name, every_batch=False)
    batch = toy.batch()
    toy.backward(batch)
    seen, old, before = probe.reference(toy.state), copies(probe.params), copy.deepcopy(toy.model)
    with torch.no_grad():
        for p in probe.params:
            p -= 0.5 * (p.grad if p.grad is not None else 0)
    found = probe.distances(seen, old, toy.state)
    z = token_logits(before, batch)
    for component, d in zip((encoder, llm), found, strict=True):
        moved = {id(p): p.detach().clone() for p in component.params}
        names = {id(p): n for n, p in toy.model.named_parameters()}
        inside = dict(before.named_parameters())
        other = hybrid(before, [inside[names[i]] for i in moved], list(moved.values()))
        assert d == pytest.approx(by_hand(name, z, token_logits(other, batch)), rel=near, abs=1e-9)
        assert d > 1e-6


def test_02_swapping_the_names_inverts_kappa() -> None:
    kappas = []
    for components in (
        {"a": ["vision", "projector"], "b": ["backbone"]},
        {"b": ["backbone"], "a": ["vision", "projector"]},
    ):
        toy = Toy()
        schedule = commit(components=components)
        toy.step(schedule, toy.batch())
        d = schedule.values
        kappas.append(d["d/b"] / d["d/a"])
        assert schedule.readings()["balance/kappa"] == pytest.approx(kappas[-1], rel=1e-12)
    assert kappas[0] == pytest.approx(kappas[1], rel=1e-6)


@pytest.mark.parametrize("name", DISTANCES)
def test_05_06_kappa_follows_the_ratio_of_the_rates_and_not_their_scale(name: str) -> None:
    toy = Toy(torch.float64)
    encoder, llm = partition(toy.model, None)
    probe = Probe(toy.model, [encoder, llm], name, every_batch=False)
    toy.backward(toy.batch())
    seen, old = probe.reference(toy.state), copies(probe.params)
    grads = {id(p): p.grad.clone() for p in probe.params if p.grad is not None}

    def kappa(encoder_rate: float, llm_rate: float) -> float:
        for component, rate in ((encoder, encoder_rate), (llm, llm_rate)):
            at = {id(p): i for i, p in enumerate(probe.params)}
            put(component.params, [old[at[id(p)]] - rate * grads.get(id(p), 0) for p in component.params])
        d_encoder, d_llm = probe.distances(seen, old, toy.state)
        return d_llm / d_encoder

    ratios = [2.0**k for k in (-4, 4)]  # 256-fold
    logs = [math.log(kappa(1e-4 * math.sqrt(r), 1e-4 / math.sqrt(r))) for r in ratios]
    slope = (logs[-1] - logs[0]) / math.log(ratios[-1] / ratios[0])
    assert slope == pytest.approx(-ORDER[name], abs=0.02)
    same = kappa(1e-4, 1e-4)
    for s in (0.1, 0.5):
        assert kappa(1e-4 * s, 1e-4 * s) == pytest.approx(same, rel=1e-2)


def test_07_a_component_that_does_not_move_gives_zero_and_changes_no_rate() -> None:
    toy = Toy()
    schedule = commit(part_lr={"vision": 0.0, "projector": 0.0})
    for i in range(4):
        toy.step(schedule, toy.batch(4 * i))
    assert schedule.values["d/encoder"] < 1e-12 < schedule.values["d/llm"]
    assert schedule.skipped == 4
    assert schedule.multipliers == {}
    assert all(math.isfinite(group["lr"]) for group in toy.state.optimizer.param_groups)


def test_measurements_that_keep_failing_end_the_training() -> None:
    toy = Toy()
    schedule = commit(part_lr={"vision": 0.0, "projector": 0.0})
    for _ in range(PATIENCE - 1):
        toy.step(schedule, toy.batch())
    with pytest.raises(DataError, match=rf"{PATIENCE} measurements in a row .*encoder .*llm"):
        toy.step(schedule, toy.batch())


def test_measurements_that_keep_failing_leave_a_monitored_run_alone() -> None:
    toy = Toy()
    schedule = commit(part_lr={"vision": 0.0, "projector": 0.0}, act=False)
    for _ in range(PATIENCE + 1):
        toy.step(schedule, toy.batch())
    assert schedule.skipped == PATIENCE + 1


def test_08_prompts_and_padding_do_not_count() -> None:
    toy = Toy()
    batch = toy.batch()
    assert len({int((row != IGNORE_INDEX).sum()) for row in batch.labels}) > 1  # answers of different length
    rows = [int(row) for row in torch.arange(4).repeat_interleave((batch.labels[:, 1:] != IGNORE_INDEX).sum(1))]
    schedule = commit()
    toy.step(schedule, batch)
    assert answer_rows(batch).tolist() == rows


# ---------------------------------------------------------------- nothing is touched


def everything(toy: Toy) -> dict[str, Any]:
    model, optimizer = toy.model, toy.state.optimizer
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "random": torch.get_rng_state().clone(),
        "optimizer": {
            n: {k: v.clone() for k, v in optimizer.state[p].items()}
            for n, p in model.named_parameters()
            if p in optimizer.state
        },
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_04_a_probe_leaves_no_trace(dropout: float) -> None:
    toy = Toy(vision={"name": "toys:NormedPatches"})
    toy.model.backbone.model.config.attention_dropout = dropout
    schedule = commit(weight=1.0)
    toy.step(schedule, toy.batch())
    probe = schedule.probe
    toy.backward(toy.batch(4))
    before = everything(toy)
    seen, old = probe.reference(toy.state), copies(probe.params)
    provisional(probe.params, toy.state)
    probe.distances(seen, old, toy.state)
    assert same(before, everything(toy))


def trained(folder: Path, schedule: dict[str, Any], steps: int = 12, **changes: Any) -> dict[str, Tensor]:
    node = tree(folder, tuning=TRAINED, schedule=schedule, trainer__max_steps=steps, trainer__save_every=4, **changes)
    run.train({**node, "metrics": {}})
    return load_file(folder / "checkpoints" / f"step_{steps:06d}" / "model.safetensors")


def test_04_a_monitor_changes_no_bit_of_a_run(tmp_path: Path) -> None:
    cosine = {"name": "cosine", "lr": 1e-2, "warmup": 0.2}
    plain = trained(tmp_path / "plain", cosine)
    watched = trained(tmp_path / "watched", {**EASY, **cosine, "name": "commit", "act": False})
    acting = trained(tmp_path / "acting", {**EASY, **cosine, "name": "commit", "warmup": 0.0})
    assert same(plain, watched)
    assert not same(plain, acting)


@pytest.mark.parametrize("point", ["none", "lookahead", "lagged"])
def test_13_a_continued_run_ends_bit_for_bit_the_same(tmp_path: Path, point: str) -> None:
    schedule = {**EASY, "update_every": 3, "measure_every": 2 if point == "none" else 1}
    schedule |= {} if point == "none" else {"weight": 0.5, "point": point}
    whole = trained(tmp_path / "whole", schedule)
    node = tree(tmp_path / "parts", tuning=TRAINED, schedule=schedule, trainer__max_steps=12, trainer__save_every=4)
    node["metrics"] = {}
    run.train({**node, "trainer": {**node["trainer"], "keep": None}})
    for step in (8, 12):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / f"step_{step:06d}")
    run.train({**node, "resume": "auto"})
    assert same(whole, load_file(tmp_path / "parts" / "checkpoints" / "step_000012" / "model.safetensors"))


# ---------------------------------------------------------------- rates


def test_12_13_rates_are_schedule_times_multiplier_and_change_in_time() -> None:
    toy, plain = Toy(), Toy()
    schedule = commit(warmup=0.1, final=0.1, window=6, update_every=3, min_samples=2)
    cosine = build(Schedule, {"name": "cosine", "lr": 1e-2, "warmup": 0.1, "final": 0.1})
    measured: list[float] = []
    expected = {"encoder": 1.0, "llm": 1.0}
    for step in range(20):
        plain.state.step = step
        cosine.before_step(plain.state)
        toy.step(schedule, toy.batch(step))
        for ours, base in zip(toy.state.optimizer.param_groups, plain.state.optimizer.param_groups, strict=True):
            component = "llm" if ours["part"] == "backbone" else "encoder"
            assert ours["lr"] == pytest.approx(base["lr"] * expected[component], rel=1e-12)
            assert ours["weight_decay"] == base["weight_decay"]
        measured.append(schedule.values["d/llm"] / schedule.values["d/encoder"])
        if (step + 1) % 3 == 0 and step + 1 >= 4:  # the warm-up is over after 4 steps
            k = sum(measured[-6:]) / len(measured[-6:])
            expected = {"encoder": 2 / (1 / k + 1), "llm": 2 / (k + 1)}
    assert expected["llm"] != pytest.approx(1.0, rel=1e-2)


def test_15_balanced_components_keep_their_rates() -> None:
    schedule = commit()
    schedule.balance.push([0.25, 0.25])
    assert schedule.balance.multipliers() == [1.0, 1.0]


def test_another_schedule_can_stand_below() -> None:
    toy = Toy()
    schedule = commit(base={"name": "constant", "lr": 3e-3})
    toy.step(schedule, toy.batch())
    assert {group["lr"] for group in toy.state.optimizer.param_groups} == {3e-3}


# ---------------------------------------------------------------- precision


def test_09_bf16_training_is_probed_in_float32() -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        toy = Toy(trainer={"precision": precision})
        encoder, llm = partition(toy.model, None)
        probe = Probe(toy.model, [encoder, llm], "sqrt_js", every_batch=False)
        probe.listening = True
        toy.backward(toy.batch())
        seen, old = probe.reference(toy.state), copies(probe.params)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in probe.params:
                p += 2e-5 * torch.randn(p.shape, generator=generator)
        d_encoder, d_llm = probe.distances(seen, old, toy.state)
        found[precision] = d_llm / d_encoder
    assert found["bf16"] == pytest.approx(found["fp32"], rel=1e-3)


def test_half_precision_weights_are_refused() -> None:
    toy = Toy()
    toy.model.backbone.bfloat16()
    with pytest.raises(ConfigError, match=r"weights are bfloat16.*backbone\.dtype=float32"):
        commit()._attached(toy.state)


# ---------------------------------------------------------------- the regulariser


def test_16_weight_zero_is_the_scheduler_alone(tmp_path: Path) -> None:
    assert same(
        trained(tmp_path / "a", {**EASY, "weight": 0.0}), trained(tmp_path / "b", {**EASY, "weight": 0.0, "cap": 0.5})
    )


@pytest.mark.parametrize("name", ["kl", "js", "sqrt_js"])
def test_17_at_coincidence_the_gradient_is_zero_and_one_step_ahead_it_is_not(name: str) -> None:
    toy = Toy(torch.float64)
    encoder, llm = partition(toy.model, None)
    probe = Probe(toy.model, [encoder, llm], name, every_batch=False)
    toy.backward(toy.batch())
    seen = probe.reference(toy.state)
    for group in toy.state.optimizer.param_groups:
        group["lr"] = 1e-2
    regularizer = Regularizer(1.0, "lookahead", None)
    here = copies(probe.params)
    if ORDER[name] == 2:
        _, at_zero = regularizer._gradient(probe, seen, llm, here, here, toy.state)
        assert max(float(g.abs().max()) for g in at_zero) < 1e-10
    ahead = provisional(probe.params, toy.state)
    d, gradient = regularizer._gradient(probe, seen, llm, here, ahead, toy.state)
    assert d > 1e-6
    assert max(float(g.abs().max()) for g in gradient) > 1e-6


@pytest.mark.parametrize("name", ["kl", "sqrt_js"])
def test_18_the_gradient_is_that_of_brute_force(name: str) -> None:
    toy = Toy(torch.float64, trainer={"clip": 0.5})
    batch = toy.batch()
    schedule = commit(distance=name, weight=0.7, cap=None)
    toy.backward(batch)
    plain = {n: p.grad.clone() for n, p in toy.model.named_parameters() if p.grad is not None}
    before = copy.deepcopy(toy.model)
    stepped = copy.deepcopy(toy.model)
    grads = dict(toy.model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {
                **{k: v for k, v in g.items() if k != "params"},
                "lr": 1e-2,
                "params": [
                    dict(stepped.named_parameters())[n] for n, p in grads.items() if any(p is q for q in g["params"])
                ],
            }
            for g in toy.state.optimizer.param_groups
        ]
    )
    for n, p in stepped.named_parameters():
        p.grad = plain[n].clone() if n in plain else None
    nn.utils.clip_grad_norm_(stepped.parameters(), 0.5)
    optimizer.step()
    z = torch.cat(token_logits(before, batch))
    schedule.before_step(toy.state)
    for is_llm in (False, True):
        mixed = copy.deepcopy(before).eval()
        inside, ahead = dict(mixed.named_parameters()), dict(stepped.named_parameters())
        own = [n for n in plain if n.startswith("backbone") == is_llm]
        put([inside[n] for n in own], [ahead[n].detach() for n in own])
        after = mixed(batch, logits=True).logits
        tokens = DISTANCES[name](z.log_softmax(-1), after.log_softmax(-1))
        counts = (batch.labels[:, 1:] != IGNORE_INDEX).sum(1)
        d = torch.stack([part.mean() for part in tokens.split(counts.tolist())]).mean()
        expected = torch.autograd.grad(d, [inside[n] for n in own])
        for n, g in zip(own, expected, strict=True):
            now = dict(toy.model.named_parameters())[n].grad
            torch.testing.assert_close(now, plain[n] - 0.7 * g, rtol=1e-6, atol=1e-12)
    assert same(dict(before.named_parameters()), dict(toy.model.named_parameters()))


def test_19_the_step_becomes_longer() -> None:
    found = []
    for weight in (0.0, 1e-3):
        toy = Toy(torch.float64, trainer={"clip": None})
        toy.state.optimizer = torch.optim.SGD(
            [{k: v for k, v in g.items() if k in ("name", "part", "params")} for g in toy.state.optimizer.param_groups],
            lr=0.0,
        )
        schedule = commit(distance="kl", lr=1e-2, weight=weight, cap=None)
        encoder, llm = partition(toy.model, None)
        probe = Probe(toy.model, [encoder, llm], "kl", every_batch=False)
        toy.backward(toy.batch())
        seen, old = probe.reference(toy.state), copies(probe.params)
        schedule.before_step(toy.state)
        toy.state.optimizer.step()
        found.append(probe.distances(seen, old, toy.state))
    assert all(longer > plain for plain, longer in zip(*found, strict=True))


def test_20_the_cap_holds() -> None:
    toy = Toy()
    toy.backward(toy.batch())
    before = {n: p.grad.clone() for n, p in toy.model.named_parameters() if p.grad is not None}
    commit(weight=1e6, cap=0.2).before_step(toy.state)
    for is_llm in (False, True):
        own = [n for n in before if n.startswith("backbone") == is_llm]
        size = math.sqrt(sum(float(before[n].double().square().sum()) for n in own))
        grads = {n: p.grad for n, p in toy.model.named_parameters() if p.grad is not None}
        change = math.sqrt(sum(float((grads[n] - before[n]).double().square().sum()) for n in own))
        assert change == pytest.approx(0.2 * size, rel=1e-4)


# ---------------------------------------------------------------- cost


@contextmanager
def counted(toy: Toy) -> Iterator[dict[str, int]]:
    counts = {"llm": 0, "encoder": 0, "backward": 0}

    def count(what: str) -> Any:
        def hook(*_: Any) -> None:
            counts[what] += 1

        return hook

    handles = [
        toy.model.backbone.register_forward_hook(count("llm")),
        toy.model.encoders["vision"].register_forward_hook(count("encoder")),
    ]
    original, grad = Tensor.backward, torch.autograd.grad

    def backward(*args: Any, **kwargs: Any) -> None:
        counts["backward"] += 1
        original(*args, **kwargs)

    def counted_grad(*args: Any, **kwargs: Any) -> Any:
        counts["backward"] += 1
        return grad(*args, **kwargs)

    Tensor.backward, torch.autograd.grad = backward, counted_grad  # type: ignore[method-assign,assignment]
    try:
        yield counts
    finally:
        Tensor.backward, torch.autograd.grad = original, grad  # type: ignore[method-assign,assignment]
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(("weight", "backward"), [(0.0, 0), (1.0, 2)])
def test_21_forwards_and_backwards_are_counted(weight: float, backward: int) -> None:
    toy = Toy()
    schedule = commit(weight=weight, cap=None)
    for i in range(3):  # hooks attach in the first step, what they catch is checked in the second
        toy.step(schedule, toy.batch(4 * i))
    with counted(toy) as counts:
        toy.step(schedule, toy.batch(12))
    assert counts == {"llm": 1 + 2, "encoder": 1 + 1, "backward": 1 + backward}


def test_21_measuring_every_third_step_costs_a_third() -> None:
    toy = Toy()
    schedule = commit(measure_every=3, window=6, update_every=6)
    for i in range(6):
        toy.step(schedule, toy.batch(i))
    with counted(toy) as counts:
        for i in range(6):
            toy.step(schedule, toy.batch(i))
    assert counts == {"llm": 6 + 2 * 2, "encoder": 6 + 2, "backward": 6}


def test_a_frozen_encoder_is_not_run_again() -> None:
    toy = Toy(tuning={**TRAINED, "vision": {"name": "frozen"}})
    schedule = commit()
    for i in range(3):
        toy.step(schedule, toy.batch(4 * i))
    with counted(toy) as counts:
        toy.step(schedule, toy.batch(12))
    assert counts == {"llm": 3, "encoder": 1, "backward": 1}


# ---------------------------------------------------------------- accumulation, partition


def test_23_accumulated_batches_give_the_kappa_of_the_whole() -> None:
    one, four = Toy(torch.float64), Toy(torch.float64)
    schedules = [commit(batches="all") for _ in range(2)]
    one.step(schedules[0], one.batch(0, 8))
    four.step(schedules[1], *(four.batch(2 * i, 2) for i in range(4)))
    for name in ("d/encoder", "d/llm"):
        assert schedules[1].values[name] == pytest.approx(schedules[0].values[name], rel=1e-6)


@pytest.mark.parametrize(
    ("components", "tuning", "says"),
    [
        (None, {**TRAINED, "backbone": {"name": "frozen"}}, "'llm'.*no trainable parameter"),
        (None, {**TRAINED, "vision": {"name": "frozen"}, "projector": {"name": "frozen"}}, "'encoder'.*no trainable"),
        ({"a": ["vision"], "b": ["backbone"]}, TRAINED, "'projector' learns but is in no component"),
        ({"a": ["vision", "projector"], "b": ["projector", "backbone"]}, TRAINED, "'projector' is in two components"),
        ({"a": ["visoin", "projector"], "b": ["backbone"]}, TRAINED, "no part 'visoin'; did you mean 'vision'"),
        ({"a": ["vision", "projector", "backbone"]}, TRAINED, "two components or more"),
    ],
)
def test_a_partition_that_is_none_is_refused(components: Any, tuning: Any, says: str) -> None:
    toy = Toy(tuning=tuning)
    with pytest.raises(UserError, match=says):
        toy.step(commit(components=components), toy.batch())


def test_three_components() -> None:
    toy = Toy()
    schedule = commit(components={"vision": ["vision"], "projector": ["projector"], "llm": ["backbone"]})
    for i in range(4):
        toy.step(schedule, toy.batch(i))
    assert sum(schedule.multipliers.values()) == pytest.approx(3.0)
    assert set(schedule.multipliers) == {"vision", "projector", "llm"}
    assert "balance/kappa/vision" in schedule.readings()


def test_what_is_logged() -> None:
    toy = Toy()
    schedule = commit()
    for i in range(4):
        toy.backward(toy.batch(i))
        expected = {
            c: math.sqrt(
                sum(
                    float(p.grad.square().sum())
                    for n, p in toy.model.named_parameters()
                    if p.grad is not None and n.startswith("backbone") == (c == "llm")
                )
            )
            for c in ("encoder", "llm")
        }
        schedule.before_step(toy.state)
        toy.state.optimizer.step()
        schedule.after_step(toy.state)
        toy.state.step += 1
        toy.state.optimizer.zero_grad()
    values = schedule.readings()
    for c in ("encoder", "llm"):
        assert values[f"balance/grad_norm/{c}"] == pytest.approx(expected[c], rel=1e-5)
        assert values[f"balance/multiplier/{c}"] > 0
    pictures = sum(float(item.double().square().sum()) ** 0.5 for item in toy.batch(3).media["vision"]) / 4
    assert values["balance/H/llm"] == pytest.approx(values["balance/d/llm"] / pictures, rel=1e-6)
    assert all(math.isfinite(v) for v in values.values())
    assert isinstance(toy.state, TrainState)
