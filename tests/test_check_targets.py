"""What ``check`` says of a tuning: the modules that each strategy came to, in full for programs and in short for eyes."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
from torch import nn

from mllm_factory import ConfigError, MultimodalModel, Tuning, build, names, run
from mllm_factory.assemble import build_model
from mllm_factory.config import compose
from mllm_factory.doctor import LINES, grouped
from mllm_factory.doctor import check as check_verb
from mllm_factory.testing_model import small_tree
from mllm_factory.weightless import weightless

LLAMA = [
    *(f"model.model.layers.{i}.self_attn.{name}" for i in range(30) for name in ("q_proj", "k_proj")),
    *(f"model.model.layers.{i}.mlp.down_proj" for i in range(30)),
]
WHOLE = {"frozen", "full"}
"""Strategies that mean a part as a whole."""


class Biases(Tuning):
    """Trains the biases, and says nothing of them."""

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        for name, parameter in part.named_parameters():
            parameter.requires_grad = name.endswith("bias")


def tree(**tuning: Any) -> dict[str, Any]:
    parts = {"vision": {"name": "frozen"}, "projector": {"name": "full"}, "backbone": {"name": "frozen"}}
    return {**small_tree(), "tuning": {**parts, **tuning}}


# ---------------------------------------------------------------- every strategy


@pytest.mark.parametrize("name", names("Tuning"))
def test_every_strategy_says_what_it_came_to(name: str) -> None:
    """Its modules are there by these names, and what learns lies in them or was inserted into the part."""
    with weightless():
        model = build_model(small_tree("full"))
        before = {key for key, _ in model.backbone.named_parameters()}
        strategy = build(Tuning, {"name": name})
        strategy.apply(model.backbone, model)
    assert bool(strategy.resolved) == (name not in WHOLE)
    assert len(set(strategy.resolved)) == len(strategy.resolved)
    for module in strategy.resolved:
        model.backbone.get_submodule(module)
    learns = [key for key, p in model.backbone.named_parameters() if p.requires_grad]
    inside = [key for key in learns if key.startswith(tuple(f"{module}." for module in strategy.resolved))]
    assert not strategy.resolved or {*learns} - {*inside} <= {*learns} - before


def test_a_strategy_of_ones_own_need_not_say_it() -> None:
    found = run.check(tree(backbone={"name": "test_check_targets:Biases"}, vision={"name": "layers", "last": 2}))
    assert found["targets"]["backbone"] == [{"name": "test_check_targets:Biases", "modules": []}]
    blocks = ["model.blocks.4", "model.blocks.5"]
    assert found["targets"]["vision"] == [{"name": "layers", "modules": blocks}]


# ---------------------------------------------------------------- check


def test_check_lists_the_modules_of_each_strategy_in_order() -> None:
    lists = [
        {"name": "mores", "layers": [1]},
        {"name": "lora", "rank": 2, "targets": ["q_proj", "1.mlp.up_proj"]},
    ]
    found = run.check(tree(backbone=lists, projector={"name": "adapter", "width": 2}))["targets"]
    assert found["vision"] == [{"name": "frozen", "modules": []}]
    assert found["projector"] == [{"name": "adapter", "modules": ["layers.0", "layers.2"]}]
    assert found["backbone"] == [
        {"name": "mores", "modules": ["model.model.layers.1"]},
        {
            "name": "lora",
            "modules": [
                "model.model.layers.0.self_attn.q_proj",
                "model.model.layers.1.self_attn.q_proj",
                "model.model.layers.1.mlp.up_proj",
            ],
        },
    ]


def test_check_prints_them_in_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_verb(["experiment=smoke", "tuning=lora", "tuning.vision.name=layers", "+tuning.vision.last=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[(start := lines.index("vision: layers on 1 module")) + 1] == "  model.blocks.5"
    assert lines[start + 2 : start + 5] == [
        "backbone: lora on 14 modules",
        "  model.model.layers.{0,1}.self_attn.{q_proj,k_proj,v_proj,o_proj}",
        "  model.model.layers.{0,1}.mlp.{gate_proj,up_proj,down_proj}",
    ]
    assert not any(line.startswith("projector: full") for line in lines)


def test_what_is_no_pattern_is_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    from mllm_factory.doctor import _targets

    modules = [f"a{i}.b{i}" for i in range(LINES + 3)]
    lines = list(_targets({"vision": [{"name": "lora", "modules": modules}]}))
    assert lines[0] == f"vision: lora on {LINES + 3} modules"
    assert lines[1] == "  a0.b0"
    assert lines[-1] == "  ... and 3 more lines like these; --json lists every module"
    assert len(lines) == 1 + LINES + 1


def test_a_target_that_names_nothing_is_an_error_with_its_neighbours() -> None:
    composed = compose("train", ["experiment=smoke", "tuning=lora", "tuning.backbone.targets=[q_porj]"])
    assert composed.tree is not None
    with pytest.raises(ConfigError, match=r"tuning.backbone: lora: targets: .*'q_porj'; did you mean 'q_proj'"):
        run.check(composed.tree)


# ---------------------------------------------------------------- names in short


@pytest.mark.parametrize(
    ("full", "short"),
    [
        (
            LLAMA,
            [
                "model.model.layers.{0..29}.self_attn.{q_proj,k_proj}",
                "model.model.layers.{0..29}.mlp.down_proj",
            ],
        ),
        (["layers.0", "layers.2"], ["layers.{0,2}"]),
        (["x.0", "x.1", "x.2", "x.5", "x.7", "x.8", "x.9"], ["x.{{0..2},5,{7..9}}"]),
        (["a", "a.b", "a.b.c"], ["a", "a.b", "a.b.c"]),
        (
            [f"s.{i}.b.{j}.qkv" for i in range(4) for j in range(2 + 4 * (i == 2))],
            ["s.{0,1,3}.b.{0,1}.qkv", "s.2.b.{0..5}.qkv"],
        ),
        (["head"], ["head"]),
        ([], []),
    ],
)
def test_names_in_short_mean_exactly_the_names(full: list[str], short: list[str]) -> None:
    """Judged by bash, whose notation it is."""
    assert grouped(full) == short
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {' '.join(short)}"], capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.split()) == sorted(full)
