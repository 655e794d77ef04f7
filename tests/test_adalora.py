"""AdaLoRA against peft's own model trained by hand, its budget against the paper's formula, and a run that goes on in the middle."""

from __future__ import annotations

import shutil
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jobs
import pytest
import torch
from torch import nn
from toys import Colours, tree

from mllm_factory import Batch, ConfigError, MultimodalModel, Schedule, Tuning, build, run, runs
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.config import compose
from mllm_factory.distributed import World
from mllm_factory.errors import CheckpointError
from mllm_factory.follower import restore
from mllm_factory.trainer import Trainer, TrainState

ALONE = World(0, 1, torch.device("cpu"))
STEPS, RANK, BUDGET, LAYERS, CLIP = 20, 4, 2, 14, 0.05
NODE = {"name": "adalora", "rank": RANK, "budget": BUDGET, "alpha": 6.0, "every": 3}  # t_i = 2, t_f = 6


class Watch(Schedule):
    """One rate; keeps which singular values each step left, and takes the gradients of some steps."""

    def __init__(self, resting: set[int] | None = None) -> None:
        self.resting, self.left = resting or set(), []

    def before_step(self, state: TrainState) -> None:
        for group in state.optimizer.param_groups:
            group["lr"] = 1e-2
        for p in state.model.parameters() if state.step in self.resting else ():
            p.grad = None

    def after_step(self, state: TrainState) -> None:
        self.left.append(left(state.model))


def left(model: nn.Module) -> dict[str, list[bool]]:
    """Which singular values are not zero, by the layer's name in the backbone."""
    found = [(name, p) for name, p in model.named_parameters() if "lora_E" in name]
    return {name.partition("backbone.")[2]: (p != 0).flatten().tolist() for name, p in found}


def count(values: dict[str, list[bool]]) -> int:
    return sum(map(sum, values.values()))


def made(*strategies: dict[str, Any]) -> tuple[MultimodalModel, list[Batch]]:
    """A model of which the backbone's factors learn and nothing else, and a batch for each step."""
    node = tree(tuning__projector={"name": "frozen"}, tuning__backbone=list(strategies or [NODE]))
    model = build_model(node)
    source, collator = Colours(4 * STEPS), build_collator(node, model)
    return model, [collator([source[4 * i + j] for j in range(4)]) for i in range(STEPS)]


def fit(
    model: MultimodalModel,
    batches: list[Batch],
    schedule: Watch | None = None,
    steps: int = STEPS,
    start: int = 0,
    clip: float = 1.0,
) -> Watch:
    """Train from a step on; what was left after each."""
    trainer, watch = Trainer(max_steps=steps, device="cpu", clip=clip), schedule or Watch()
    wrapped, state = trainer.prepare(model, ALONE)
    state.step = start
    given = (batch for forever in repeat(batches) for batch in forever)
    trainer.fit(wrapped, state, watch, given, lambda state, facts: None)
    return watch


def b(t: int) -> int:
    """Eq. 12 by hand, for the totals of all layers."""
    first, last = LAYERS * RANK, LAYERS * BUDGET
    if t <= 2:
        return first
    return last if t >= STEPS - 6 else int(last + (first - last) * (1 - (t - 2) / (STEPS - 2 - 6)) ** 3)


# ---------------------------------------------------------------- the method


class Loss(nn.Module):
    """A model that gives its mean loss as peft's own forward expects it."""

    def __init__(self, model: MultimodalModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Any:
        output = self.model(batch)
        return SimpleNamespace(loss=output.loss_sum / output.num_labels)


def peft_twin(ours: MultimodalModel) -> Any:
    """The same model adapted by peft alone, its factors set to ours."""
    from peft import AdaLoraConfig, get_peft_model

    plain, _ = made({"name": "frozen"})
    names = "|".join(f"model.backbone.{name}" for name in ours.strategies["backbone"][0].resolved)
    config = AdaLoraConfig(
        **{"init_r": RANK, "target_r": BUDGET, "lora_alpha": 6, "target_modules": names.replace(".", r"\.")},
        **{"tinit": 2, "tfinal": 6, "deltaT": 3, "total_step": STEPS, "orth_reg_weight": 0.5},
    )
    twin: Any = get_peft_model(Loss(plain), config).base_model
    factors = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert len(factors) == 3 * LAYERS
    with torch.no_grad():
        for name, p in factors.items():
            twin.get_parameter(f"model.model.{name}").copy_(p)
    return twin


def test_it_is_pefts_own_model_trained_by_hand() -> None:
    """Weights, masks and ranks of every step; ours through the trainer, theirs in peft's documented loop."""
    model, batches = made()
    twin = peft_twin(model)
    learning = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    theirs, norms = [], []
    for t, batch in enumerate(batches, 1):
        twin(batch).loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(learning, CLIP)))
        optimizer.step()
        twin.update_and_allocate(t)
        optimizer.zero_grad()
        theirs.append(left(twin))
    ours = fit(model.train(), batches, clip=CLIP).left
    assert ours == theirs
    pattern = {name.partition("backbone.")[2]: kept for name, kept in twin.peft_config["default"].rank_pattern.items()}
    assert model.strategies["backbone"][0].kept == pattern  # type: ignore[attr-defined]
    assert len({sum(kept) for kept in pattern.values()}) > 1, "no rank moved from one layer to another"
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p, twin.get_parameter(f"model.model.{name}"), rtol=0, atol=1e-6, msg=name)
    assert min(norms) < CLIP < max(norms), "clipping is part of it"


def test_as_many_are_left_as_the_budget_says() -> None:
    model, batches = made()
    counts = [count(values) for values in fit(model.train(), batches).left]
    for t, found in enumerate(counts, 1):
        allots = 2 < t < 14 and t % 3 == 0
        assert found == (b(t) if allots or t >= 14 else LAYERS * RANK), t
    assert [b(t) for t in (2, 3, 8, 14)] == [56, 49, 31, 28]
    readings = model.strategies["backbone"][0].readings()
    ranks = [sum(values) for values in left(model).values()]
    assert readings == {"rank_mean": BUDGET, "rank_min": min(ranks), "rank_max": max(ranks)}


def test_the_penalty_is_what_pefts_forward_adds() -> None:
    model, batches = made()
    twin, strategy = peft_twin(model), model.strategies["backbone"][0]
    added = twin(batches[0]).loss - twin.model(batches[0]).loss
    torch.testing.assert_close(strategy.penalty(), added)  # type: ignore[attr-defined]
    total = torch.zeros(())
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_E" not in name:
            product = p @ p.T if "lora_A" in name else p.T @ p
            total = total + (product - torch.eye(RANK)).square().sum().sqrt()
    torch.testing.assert_close(added, 0.5 * total / (2 * LAYERS))


def test_without_the_penalty_gradients_are_those_of_the_loss() -> None:
    model, batches = made({**NODE, "orthogonality": 0.0})
    state = Trainer(max_steps=STEPS, device="cpu").prepare(model, ALONE)[1]
    model(batches[0]).loss_sum.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.strategies["backbone"][0].before_step(state)
    assert before and all(torch.equal(model.get_parameter(name).grad, g) for name, g in before.items())


def backbone(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, _ = made({**NODE, **options})
    return model.backbone, model.strategies["backbone"][0]


def stir(part: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in part.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def test_a_layer_by_its_formula_and_merged() -> None:
    part, strategy = backbone()
    layer = part.model.model.layers[1].mlp.up_proj
    x, weight = torch.randn(3, 16), layer.base_layer.weight.clone()
    assert torch.equal(layer(x), x @ weight.T)  # untouched at the start
    stir(part)
    p, e, q = layer.lora_B.default, layer.lora_E.default, layer.lora_A.default
    torch.testing.assert_close(
        layer(x), x @ (weight + 6.0 / RANK * p @ torch.diag(e[:, 0]) @ q).T, rtol=1e-5, atol=1e-6
    )
    ids = torch.randint(0, 256, (2, 7))
    with torch.no_grad():
        expected = part.logits(part(part.embed(ids)))
        strategy.merge(part, None)
        torch.testing.assert_close(part.logits(part(part.embed(ids))), expected, rtol=0, atol=1e-5)
    assert type(part.model.model.layers[1].mlp.up_proj) is nn.Linear
    assert not [name for name, _ in part.named_parameters() if "lora_" in name or "ranknum" in name]


def test_what_learns_is_float32_on_a_half_precision_part() -> None:
    part: Any = made({"name": "frozen"})[0].backbone.bfloat16()
    build(Tuning, NODE).apply(part, None)  # type: ignore[arg-type]
    learning = [p for p in part.parameters() if p.requires_grad]
    out = part(torch.randn(1, 3, 16, dtype=torch.bfloat16))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and len(learning) == 3 * LAYERS
    assert {(p.dtype, p.grad is None) for p in learning} == {(torch.float32, False)}
    assert [float(p) for name, p in part.named_parameters() if "ranknum" in name] == [RANK] * LAYERS


# ---------------------------------------------------------------- among others


def test_lora_beside_it_keeps_its_ranks() -> None:
    """The budget is that of the strategy's own layers."""
    mine = {**NODE, "targets": ["q_proj", "k_proj"]}
    model, batches = made({"name": "lora", "rank": 3, "targets": ["v_proj"]}, mine)
    fit(model.train(), batches)
    assert list(model.stepping()) == ["backbone.1"]
    assert [len(left(model)), count(left(model))] == [4, 4 * BUDGET]
    plain = [p for name, p in model.named_parameters() if "lora_B.default.weight" in name]
    assert [p.shape for p in plain] == [(16, 3)] * 2 and all(p.all(dim=0).all() for p in plain)


@pytest.mark.parametrize("resting", [{0, 1, 2, 3, 7, 13}, {4, 8, 12, 16, 19}, set(range(13))])
def test_a_schedule_may_let_it_rest(resting: set[int]) -> None:
    model, batches = made()
    watch = fit(model.train(), batches, Watch(resting))
    if len(resting) == 13:
        assert count(watch.left[12]) == 0  # never moved: singular values begin at zero
    assert count(watch.left[-1]) == LAYERS * BUDGET


def test_one_step_is_enough_to_allot() -> None:
    model, batches = made()
    assert count(fit(model.train(), batches, steps=1).left[0]) == LAYERS * BUDGET


@pytest.mark.parametrize(("before", "after"), [(20, 30), (8, 9)])
def test_going_on_with_another_number_of_steps(before: int, after: int) -> None:
    """Ranks that were final are allotted again where the end moved; where it passed, at once."""
    model, batches = made()
    watch, strategy = Watch(), model.strategies["backbone"][0]
    trainer = Trainer(max_steps=before, device="cpu")
    wrapped, state = trainer.prepare(model, ALONE)
    state.max_steps = STEPS
    trainer.fit(wrapped, state, watch, iter(batches), lambda state, facts: None)
    again = made()[0]
    again.load_state_dict(model.state_dict())
    again.strategies["backbone"][0].load_state_dict(strategy.state_dict())
    assert count(fit(again.train(), batches, steps=after, start=before).left[-1]) == LAYERS * BUDGET


# ---------------------------------------------------------------- runs


def composed(folder: Path, **changes: Any) -> dict[str, Any]:
    """Six steps of allotting and two after it; saved after each."""
    options = {"rank": 4, "budget": 2, "every": 2, "warmup": 0, "final": 0.25, "dropout": 0.2}
    words = [
        *("experiment=smoke", "tuning=adalora", "metrics=null", f"output_dir={folder}", "data.train.limit=32"),
        *(f"tuning.backbone.{key}={value}" for key, value in options.items()),
        *("trainer.max_steps=8", "trainer.batch_size=2", "trainer.log_every=1", "trainer.save_every=1"),
        *("trainer.keep=null", "trainer.gradient_checkpointing=true"),
        *(f"{key}={value}" for key, value in changes.items()),
    ]
    found = compose("train", words)
    assert found.check() == []
    assert found.tree is not None
    return found.tree


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run.train(composed(folder))
    return folder


@pytest.mark.parametrize("step", [3, 7])
def test_a_run_goes_on_bit_for_bit(whole: Path, tmp_path: Path, step: int) -> None:
    """In the middle of allotting, and when ranks are final."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    for later in range(step + 1, 9):
        shutil.rmtree(runs.folder_of(folder, later))
    run.train(composed(folder, resume="auto"))
    jobs.assert_same_end(folder, whole, 8)
    state = torch.load(runs.folder_of(folder, 3) / "trainer.pt", weights_only=True)["strategies"]
    assert list(state) == ["backbone"] and all(v.any() for v in state["backbone"]["importance"].values())


def test_the_log_tells_the_ranks(whole: Path) -> None:
    lines = jobs.lines(whole)
    assert [line["tuning/backbone/rank_mean"] for line in lines][::7] == [4.0, 2.0]
    assert all(0 <= line["tuning/backbone/rank_min"] <= line["tuning/backbone/rank_max"] <= 4 for line in lines)


@pytest.mark.slow
def test_two_processes_allot_like_one_that_accumulates(tmp_path: Path) -> None:
    """Bit for bit: a process that allotted otherwise would spoil the average of the next gradients."""
    from test_distributed import settings, together, weights

    def node(name: str, **trainer: Any) -> dict[str, Any]:
        result = settings(tmp_path / name, **trainer)
        result["tuning"]["backbone"] = {**NODE, "every": 1, "warmup": 0.0}
        return {**result, "metrics": {}}

    jobs.run(node("one", accumulate=2), tmp_path / "one.log")
    together(node("two"), tmp_path / "two.log")
    jobs.assert_same(weights(tmp_path / "two"), weights(tmp_path / "one"), "weights")
    ranks = [[line["tuning/backbone/rank_max"] for line in jobs.lines(tmp_path / name)] for name in ("one", "two")]
    assert ranks[0] == ranks[1]


# ---------------------------------------------------------------- refusals


def test_sharded_weights_are_refused() -> None:
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, _ = made()
    state = Trainer(max_steps=STEPS, device="cpu").prepare(model, ALONE)[1]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ConfigError, match=r"^adalora: .*sharded weights; set trainer.strategy=ddp"):
            model.strategies["backbone"][0].before_step(state)
    finally:
        dist.destroy_process_group()


def test_a_checkpoint_without_states_is_for_strategies_without_one() -> None:
    progress = {"optimizer": {}, "schedule": {}, "step": 3, "random": [], "counts": {}}
    for strategy in ({"name": "lora", "rank": 2}, NODE):
        model, _ = made(strategy)
        state = Trainer(max_steps=STEPS, device="cpu").prepare(model, ALONE)[1]
        if strategy is not NODE:
            assert model.stepping() == {}
            restore(progress, state, Watch())
            assert state.step == 3
            continue
        with pytest.raises(CheckpointError, match=r"no state of tuning.backbone \(AdaLora\).*init_from"):
            restore(progress, state, Watch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget: 0 is no rank; use 1 or more"),
        ({"rank": 4, "budget": 4}, "budget: 4 takes nothing away from rank 4"),
        ({"rank": 4, "budget": 5}, "budget: 5 takes nothing away from rank 4"),
        ({"alpha": 0.0}, "alpha: 0.0 must be above 0"),
        ({"dropout": 1.0}, "dropout: 1.0"),
        ({"targets": []}, "targets: nothing to adapt"),
        ({"targets": ["q_prj"]}, "adalora: targets: no linear layer .*did you mean 'q_proj'"),
        ({"warmup": 1.0}, "warmup: 1.0 is no share"),
        ({"final": -0.1}, "final: -0.1 is no share"),
        ({"warmup": 0.7, "final": 0.3}, "warmup: 0.7 and final: 0.3 leave no step to allot ranks in"),
        ({"every": 0}, "every: 0 must be 1 or more"),
        ({"beta1": 1.0}, "beta1: 1.0 is no averaging factor"),
        ({"beta2": 0.0}, "beta2: 0.0 is no averaging factor"),
        ({"orthogonality": -1.0}, "orthogonality: -1.0 must be 0 or more"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        made({**NODE, **options})
    assert "\n" not in str(found.value)
