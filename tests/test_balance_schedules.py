"""Baselines of CoMMIT against hand computation on a toy model."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_commit import Toy
from torch import Tensor
from toys import tree

from mllm_factory import ConfigError, Schedule, build, run
from mllm_factory.components.schedules.agm import coefficients
from mllm_factory.components.schedules.balance_masks import mean_scores, responses
from mllm_factory.components.schedules.ogm_ge import factors, probabilities
from mllm_factory.types import IGNORE_INDEX, TEXT, USER, Batch

LEVEL = {"lr": 1e-2, "warmup": 0.0, "final": 1.0}
NAMES = ("coordinate_descent", "grad_ratio", "ogm_ge", "agm")


def made(name: str, **options: Any) -> Any:
    return build(Schedule, {"name": name, **LEVEL, **options})


def sides(toy: Toy) -> dict[str, list[Tensor]]:
    """Trainable parameters before the backbone and in it, told apart by name."""
    found: dict[str, list[Tensor]] = {"encoder": [], "llm": []}
    for name, p in toy.model.named_parameters():
        found["llm" if name.startswith("backbone") else "encoder"].append(p)
    return found


def weights(toy: Toy) -> dict[str, list[Tensor]]:
    return {side: [p.detach().clone() for p in params] for side, params in sides(toy).items()}


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))


def moved(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> set[str]:
    return {
        side for side in before if any(not torch.equal(a, b) for a, b in zip(before[side], after[side], strict=True))
    }


# ---------------------------------------------------------------- coordinate descent


@pytest.mark.parametrize("order", [["encoder", "llm"], ["llm", "encoder"]])
def test_each_component_learns_for_its_share_and_the_other_rests_with_its_optimizer_state(order: list[str]) -> None:
    toy = Toy()
    toy.state.max_steps = 10
    schedule = made("coordinate_descent", order=order, tol=0.0, share=0.3)
    for step in range(10):
        before, state = weights(toy), copy.deepcopy(toy.state.optimizer.state_dict()["state"])
        toy.step(schedule, toy.batch(step))
        active, resting = order if step < 3 else order[::-1]
        assert moved(before, weights(toy)) == {active}
        inside = [i for i, p in enumerate(ordered(toy)) if any(p is q for q in sides(toy)[resting])]
        now = toy.state.optimizer.state_dict()["state"]
        assert {i: i in now for i in inside} == {i: i in state for i in inside}
        assert all(torch.equal(now[i]["exp_avg"], state[i]["exp_avg"]) for i in inside if i in state)
    assert schedule.readings()[f"balance/active/{order[1]}"] == 1.0


def ordered(toy: Toy) -> list[Tensor]:
    return [p for group in toy.state.optimizer.param_groups for p in group["params"]]


def test_a_turn_ends_when_the_weights_are_stable() -> None:
    toy = Toy()
    toy.state.max_steps = 24
    window, tol = 3, 0.015
    schedule = made("coordinate_descent", tol=tol, window=window, share=1.0, lr=3e-3, final=0.0)
    history, ended, looks = [], None, []
    for step in range(24):
        toy.step(schedule, toy.batch(step))
        history.append(weights(toy)["encoder"])
        if (step + 1) % window == 0 and step + 1 >= 2 * window and ended is None:
            change = norm([a - b for a, b in zip(history[-1], history[-1 - window], strict=True)]) / norm(history[-1])
            looks.append(change)
            ended = step if change < tol else None
        assert schedule.turn == (1 if ended is not None else 0), (step, looks)
    assert ended is not None and len(looks) > 1, looks  # neither at once nor never


def test_weights_are_not_looked_at_before_the_warm_up_is_over() -> None:
    toy = Toy()  # of 40 steps
    schedule = made("coordinate_descent", tol=1e9, window=2, share=1.0, warmup=0.25)
    turns = []
    for step in range(14):
        toy.step(schedule, toy.batch(step))
        turns.append(schedule.turn)
    assert turns == [0] * 11 + [1] * 3  # the first look is at the end of step 10, the next one finds them stable


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["encoder", "lm"], "no component 'lm'; did you mean 'llm'"),
        (["llm"], "must name each component once: encoder, llm"),
    ],
)
def test_an_order_names_each_component_once(order: list[str], message: str) -> None:
    toy = Toy()
    with pytest.raises(ConfigError, match=message):
        toy.step(made("coordinate_descent", order=order), toy.batch())


# ---------------------------------------------------------------- grad_ratio


def test_the_slower_component_learns_alone_for_q_steps_after_each_joint_one() -> None:
    toy = Toy()
    schedule = made("grad_ratio", eps=0.01, steps=2)
    speeds = {"encoder": 0.0, "llm": 0.0}
    for step in range(9):
        before = weights(toy)
        toy.backward(toy.batch(step))
        if step % 3 == 0:
            for side, params in sides(toy).items():
                grads = [p.grad for p in params if p.grad is not None]
                speeds[side] += norm(grads) ** 2 / norm([p.detach() for p in params]) ** 2
        slow = min(speeds, key=lambda side: speeds[side])
        toy.model.zero_grad()
        toy.step(schedule, toy.batch(step))
        assert moved(before, weights(toy)) == ({"encoder", "llm"} if step % 3 == 0 else {slow})
        for side, speed in speeds.items():
            assert schedule.readings()[f"balance/speed/{side}"] == pytest.approx(speed, rel=1e-5)
    logs = sorted(math.log10(speed) for speed in speeds.values())
    assert schedule.readings()["balance/difference"] == pytest.approx(logs[1] - logs[0], rel=1e-4)


def test_speeds_closer_than_eps_or_a_warm_up_leave_every_step_joint() -> None:
    for options in ({"eps": 100.0}, {"warmup": 1.0}):
        toy = Toy()
        schedule = made("grad_ratio", **options)
        for step in range(4):
            before = weights(toy)
            toy.step(schedule, toy.batch(step))
            assert moved(before, weights(toy)) == {"encoder", "llm"}


# ---------------------------------------------------------------- masked responses


def by_hand(toy: Toy, batch: Batch, media: bool, text: bool) -> Tensor:
    """[N, V] logits of a forward pass whose inputs are put together here."""
    model = toy.model.eval()
    ids = batch.input_ids.clone()
    for b in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            if not text and batch.role[b, t] == USER and batch.modality[b, t] == TEXT:
                ids[b, t] = model.backbone.tokenizer.pad_token_id
    with torch.no_grad():
        embeds = model.backbone.embed(ids)
        features = model.projectors["vision"](model.encoders["vision"](batch.media["vision"]))
        for i, (b, t) in enumerate((batch.modality == 1).nonzero().tolist()):
            embeds[b, t] = features.flatten(0, 1)[i] * media
        hidden = model.backbone(embeds)
        rows = [hidden[b, t] for b in range(len(ids)) for t in range(ids.shape[1] - 1) if batch.labels[b, t + 1] >= 0]
        return model.backbone.logits(torch.stack(rows))


def test_responses_are_those_of_inputs_without_words_or_features_and_nothing_else_changes() -> None:
    toy = Toy()
    batch = toy.batch()
    toy.backward(batch)
    grads = {n: p.grad.clone() for n, p in toy.model.named_parameters() if p.grad is not None}
    generator = torch.get_rng_state()
    found = responses(toy.model, batch)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(
        torch.equal(p.grad, grads[n]) for n, p in toy.model.named_parameters() if n in grads and p.grad is not None
    )
    assert toy.model.training
    for phi, (media, text) in zip(found, ((True, True), (True, False), (False, True)), strict=True):
        torch.testing.assert_close(phi, by_hand(toy, batch, media, text), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def shows(batch: Batch) -> list[int]:
    """Samples that have a picture."""
    return sorted(set(batch.media_row["vision"].tolist()))


def per_sample(batch: Batch, tokens: Tensor, rows: list[int]) -> float:
    counts = [int((row[1:] != IGNORE_INDEX).sum()) for row in batch.labels]
    means = [float(part.double().mean()) for part in tokens.split(counts)]
    return sum(means[r] for r in rows) / len(rows)


def test_scores_are_means_of_samples_that_have_media() -> None:
    toy = Toy(data__train={"name": "toys:Colours", "text_every": 3})
    batch = toy.collator([_with_text(i) for i in range(5)])
    toy.state.batches = [batch]
    found = mean_scores(toy.state, probabilities)
    labels = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORE_INDEX]
    assert found is not None
    for score, (media, text) in zip(found, ((True, False), (False, True)), strict=True):
        p = by_hand(toy, batch, media, text).softmax(-1)[range(len(labels)), labels]
        assert score == pytest.approx(per_sample(batch, p, [1, 2, 4]), rel=1e-4)  # 0 and 3 are text alone
    toy.state.batches = [toy.collator([_with_text(0), _with_text(3)])]
    assert mean_scores(toy.state, probabilities) is None


def _with_text(i: int) -> Any:
    from toys import Colours

    return Colours(text_every=3)[i]


# ---------------------------------------------------------------- ogm_ge


@pytest.mark.parametrize(
    ("media", "text", "expected"),
    [
        (0.6, 0.3, (1 - math.tanh(0.5 * 2.0), 1.0)),
        (0.3, 0.6, (1.0, 1 - math.tanh(0.5 * 2.0))),
        (0.4, 0.4, (1.0, 1.0)),
        (0.4, 0.0, (0.0, 1.0)),
    ],
)
def test_the_better_modality_is_slowed(media: float, text: float, expected: tuple[float, float]) -> None:
    assert factors(media, text, 0.5) == pytest.approx(expected)


def test_ogm_multiplies_each_components_gradients_by_its_k() -> None:
    toy = Toy()
    batch = toy.batch()
    toy.backward(batch)
    labels = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORE_INDEX]
    media, text = (
        per_sample(batch, by_hand(toy, batch, m, not m).softmax(-1)[range(len(labels)), labels], shows(batch))
        for m in (True, False)
    )
    k = dict(zip(("encoder", "llm"), factors(media, text, 0.7), strict=True))
    assert sorted(k.values())[0] < 0.95 and max(k.values()) == 1.0
    before = {side: [p.grad.clone() for p in params if p.grad is not None] for side, params in sides(toy).items()}
    made("ogm_ge", alpha=0.7, noise=False).before_step(toy.state)
    for side, params in sides(toy).items():
        grads = [p.grad for p in params if p.grad is not None]
        for g, old in zip(grads, before[side], strict=True):
            torch.testing.assert_close(g, old * k[side], rtol=1e-4, atol=1e-9)


def test_the_noise_is_as_large_as_the_gradient_and_the_same_for_every_process() -> None:
    found = []
    for draws in (0, 3):  # a process whose generator stands elsewhere
        toy = Toy()
        toy.backward(toy.batch())
        torch.rand(draws)
        plain = {n: p.grad.clone() for n, p in toy.model.named_parameters() if p.grad is not None}
        schedule = made("ogm_ge", alpha=0.5)
        schedule.before_step(toy.state)
        k = {s: schedule.readings()[f"balance/k/{s}"] for s in ("encoder", "llm")}
        noise = {
            n: p.grad - plain[n] * k["llm" if n.startswith("backbone") else "encoder"]
            for n, p in toy.model.named_parameters()
            if p.grad is not None
        }
        found.append(noise)
        for n, h in noise.items():
            if h.numel() > 500:
                assert float(h.std()) == pytest.approx(float(plain[n].std()), rel=0.15), n
                assert abs(float(h.mean())) < 4 * float(h.std()) / math.sqrt(h.numel())
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_ogm_acts_between_start_and_end() -> None:
    toy = Toy()  # of 40 steps
    schedule = made("ogm_ge", start=0.05, end=0.1)
    acted = []
    for step in range(6):
        toy.step(schedule, toy.batch(step))
        acted.append(bool(schedule.readings()))
    assert acted == [False, False, True, True, False, False]


# ---------------------------------------------------------------- agm


def test_coefficients_are_those_of_the_formula() -> None:
    scores, means = (2.0, 1.0), (1.5, 1.2)
    c_media = math.exp(0.5 * (math.exp(1.2 - 1.5) - math.exp(1.0 - 2.0)))
    c_text = math.exp(0.5 * (math.exp(1.5 - 1.2) - math.exp(2.0 - 1.0)))
    assert coefficients(scores, means, 0.5, 10.0) == pytest.approx((c_media, c_text))
    assert c_text < 1 < c_media  # media are behind their mean: they are sped up
    assert coefficients((0.0, 0.0), (0.0, 5.0), 1.0, 2.0)[0] == pytest.approx(math.exp(2.0))
    assert coefficients((0.0, 2000.0), (0.0, 0.0), 1.0, 10.0)[0] == 0.0


def test_agm_scales_by_the_losses_of_both_shapley_values_against_their_running_means() -> None:
    toy = Toy()
    schedule = made("agm", alpha=0.8)
    history: list[tuple[float, float]] = []
    for step in range(4):
        batch = toy.batch(4 * step)
        labels = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORE_INDEX]
        both, media, text = (by_hand(toy, batch, m, t) for m, t in ((True, True), (True, False), (False, True)))
        toy.model.train()
        s = []
        for m in ((both - text + media) / 2, (both - media + text) / 2):
            losses = -m.log_softmax(-1)[range(len(labels)), labels]
            s.append(per_sample(batch, losses, shows(batch)))
        c: tuple[float, ...] = (1.0, 1.0)
        if history:
            S = [sum(h[u] for h in history) / len(history) for u in (0, 1)]
            c = tuple(math.exp(0.8 * min(math.exp(S[1 - u] - S[u]) - math.exp(s[1 - u] - s[u]), 10.0)) for u in (0, 1))
        history.append((s[0], s[1]))
        toy.backward(batch)
        before = {side: [p.grad.clone() for p in params if p.grad is not None] for side, params in sides(toy).items()}
        schedule.before_step(toy.state)
        for side, factor in zip(("encoder", "llm"), c, strict=True):
            grads = [p.grad for p in sides(toy)[side] if p.grad is not None]
            for g, old in zip(grads, before[side], strict=True):
                torch.testing.assert_close(g, old * factor, rtol=1e-3, atol=1e-9)
        toy.state.optimizer.step()
        schedule.after_step(toy.state)
        toy.state.optimizer.zero_grad()
        toy.state.step += 1
    assert abs(c[0] - 1) > 0.02


# ---------------------------------------------------------------- all


def node(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    table: dict[str, dict[str, Any]] = {
        "coordinate_descent": {"window": 2, "share": 0.7, "tol": 0.2},
        "grad_ratio": {"steps": 2},
    }
    schedule = {"name": name, "lr": 1e-2, "warmup": 0.2, **table.get(name, {})}
    return tree(folder, schedule=schedule, trainer__max_steps=12, trainer__save_every=5, metrics=None, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_interrupted_ends_in_the_same_weights(name: str, tmp_path: Path) -> None:
    run.train(node(tmp_path / "whole", name))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for late in (10, 12):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step_{late:06d}", ignore_errors=True)
    run.train(node(tmp_path / "again", name) | {"resume": "auto"})
    whole, again = (
        load_file(tmp_path / f / "checkpoints" / "step_000012" / "model.safetensors") for f in ("whole", "again")
    )
    assert all(torch.equal(whole[n], again[n]) for n in whole)


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_those_of_the_cosine(name: str) -> None:
    options = {"lr": 3e-3, "part_lr": {"vision": 1e-3}, "warmup": 0.1, "final": 0.2}
    one, other = build(Schedule, {"name": name, **options}), build(Schedule, {"name": "cosine", **options})
    toy, plain = Toy(), Toy()
    for step in range(6):
        toy.step(one, toy.batch(step))
        plain.step(other, plain.batch(step))
        rates = [[group["lr"] for group in t.state.optimizer.param_groups] for t in (toy, plain)]
        assert rates[0] == rates[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_component_without_trainable_weights_is_refused(name: str) -> None:
    toy = Toy(tuning={"vision": {"name": "frozen"}, "projector": {"name": "frozen"}, "backbone": {"name": "full"}})
    with pytest.raises(ConfigError, match=r"'encoder' \(.*\) has no trainable parameter.*schedule=cosine"):
        toy.step(made(name), toy.batch())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coordinate_descent", {"share": 0.0}, "share: 0"),
        ("coordinate_descent", {"share": 1.5}, "share: 1.5 is no share"),
        ("coordinate_descent", {"tol": -1.0}, "tol: -1.0"),
        ("coordinate_descent", {"window": 0}, "window: 0"),
        ("grad_ratio", {"eps": 0.0}, "eps: 0.0 must be above 0"),
        ("grad_ratio", {"steps": 0}, "steps: 0 must be above 0"),
        ("ogm_ge", {"alpha": 0.0}, "alpha: 0.0 must be above 0"),
        ("ogm_ge", {"start": 0.5, "end": 0.5}, "end: 0.5 leaves no step"),
        ("agm", {"cap": -1.0}, "cap: -1.0 must be above 0"),
    ],
)
def test_values_out_of_range_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(name, **options)
