"""Composition: the same tree as Hydra's, every problem at once, each with where it came from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir, initialize_config_module
from omegaconf import OmegaConf

from mllm_factory import presets
from mllm_factory.checks import ROOT_KEYS, check_tree
from mllm_factory.config import Composer, compose

BUILT_IN = Composer("train", keep=True)


def lines(*overrides: str, config_dir: Path | str | None = None, name: str = "train") -> list[str]:
    """All problems as the command line shows them."""
    if config_dir is None and name == "train":
        return [str(p) for p in BUILT_IN.compose(overrides).check()]
    return [str(p) for p in compose(name, overrides, [str(config_dir)] if config_dir else ()).check()]


def write(root: Path, **files: str) -> Path:
    """``write(root, vision__mine="...")`` makes ``root/vision/mine.yaml``."""
    for name, text in files.items():
        file = root / f"{name.replace('__', '/')}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


# ---------------------------------------------------------------- the tree


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=smoke", "trainer.max_steps=3", "projector.hidden_dim=8"],
        ["tuning=lora", "tuning.backbone.targets=[q_proj]", "schedule.lr=1e-3", "metrics=[answer_loss]"],
        ["+projector.extra={a: 1}", "++seed=4", "~schedule.warmup", "vision={image_size: 32}"],
        ["metrics=[]", "~vision", "name='a b'", "data.train.limit=5", "data.eval=null"],
    ],
)
def test_tree_equals_hydras(overrides: list[str]) -> None:
    with initialize_config_module("mllm_factory.conf", version_base="1.3"):
        theirs = OmegaConf.to_container(hydra_compose("train", overrides), resolve=True)
    ours = compose("train", overrides)
    assert ours.problems == []
    assert isinstance(theirs, dict)
    assert isinstance(ours.tree, dict)
    now = ("output_dir",)  # holds the time of day
    tree = {k: v for k, v in ours.tree.items() if k not in now and not (v is None and k in ("vision", "audio"))}
    assert tree == {k: v for k, v in theirs.items() if k not in now and not (v is None and k in ("vision", "audio"))}
    assert str(ours.tree["output_dir"]).startswith(f"outputs/{ours.tree['name']}/20")


USERS = {
    "vision__own": "# @package _global_\nvision: {name: timm, architecture: test_vit}\nseed: 5\n",
    "projector__own": "defaults:\n  - mlp\n  - _self_\ndepth: 3\nhidden_dim: ${seed}\n",
    "experiment__nested": "# @package _global_\ndefaults:\n  - later\n  - /tuning@second: lora\n"
    "  - override /projector: own\n  - override /schedule: constant\nname: nested\nseed: 7\n",
    "experiment__later": "# @package _global_\nseed: 8\ntrainer: {max_steps: 3, betas: [0.1]}\n",
    "experiment__of_hydra": "# @package _global_\nname: ${hydra:job.name}\nhydra: {job: {name: mine}}\n",
}


@pytest.mark.parametrize(
    "overrides",
    [
        ["vision=own"],
        ["projector=own"],
        ["experiment=nested"],
        ["experiment=later"],
        ["experiment=[nested,later]"],
        ["vision=own", "experiment=nested"],
        ["+vision@extra=timm"],
        ["metrics=[answer_loss]", "experiment=nested"],
    ],
)
def test_a_users_tree_is_hydras_too(tmp_path: Path, overrides: list[str]) -> None:
    write(tmp_path, **USERS)
    with initialize_config_module("mllm_factory.conf", version_base="1.3"):
        search = f"hydra.searchpath=[file://{tmp_path}]"
        theirs = OmegaConf.to_container(hydra_compose("train", [search, *overrides]), resolve=False)
    ours = compose("train", overrides, [str(tmp_path)])
    assert ours.problems == []
    assert isinstance(theirs, dict)
    resolved = OmegaConf.to_container(OmegaConf.create({"audio": None, **theirs, "output_dir": ""}), resolve=True)
    assert {**(ours.tree or {}), "output_dir": ""} == resolved


def test_a_value_of_hydras_node_is_found(tmp_path: Path) -> None:
    write(tmp_path, **USERS)
    found = compose("train", ["experiment=of_hydra"], [str(tmp_path)])
    assert found.problems == []
    assert (found.tree or {})["name"] == "mine"


def test_parts_can_be_null() -> None:
    for overrides in (["vision=null"], ["experiment=smoke", "vision=null"], ["audio=null", "vision=null"]):
        composed = compose("train", overrides)
        assert composed.tree is not None
        assert (composed.tree["vision"], composed.tree["audio"]) == (None, None)
    assert compose("train", ["metrics=null", "experiment=null"]).tree is not None
    assert "metrics" not in (compose("train", ["metrics=null"]).tree or {"metrics"})


def test_missing_values_stay_marked() -> None:
    composed = compose("train", ["data=llava_json"])
    assert composed.tree is not None
    assert composed.tree["data"]["train"]["path"] == "???"
    assert [(p.message, p.key) for p in composed.check()] == [
        ("needs a value", "data.train.path"),
        ("needs a value", "data.eval.path"),
    ]


def test_composer_can_be_used_again() -> None:
    composer = Composer("train", keep=True)
    first = composer.compose(["trainer.max_steps=1", "+projector.depth2=1"]).tree
    second = composer.compose(["seed=3"]).tree
    assert first is not None
    assert second is not None
    assert (first["trainer"]["max_steps"], second["trainer"]["max_steps"], second["seed"]) == (1, 1000, 3)
    assert "depth2" not in second["projector"]


# ---------------------------------------------------------------- problems


def test_every_problem_at_once_in_one_line_each() -> None:
    found = lines(
        "tuning=lora", "tuning.backbone.rnk=4", "projctor=mlp", "trainer.max_steps=ten", "seed=-1", "vision=tmm"
    )
    keys = [line.partition(":")[0] for line in found]
    assert keys == ["vision", "tuning.backbone.rnk", "projctor", "seed", "trainer.max_steps"]
    assert all("\n" not in line for line in found)
    assert [line.rpartition("(from ")[2] for line in found] == [
        "override 'vision=tmm')",
        "override 'tuning.backbone.rnk=4')",
        "override 'projctor=mlp')",
        "override 'seed=-1')",
        "override 'trainer.max_steps=ten')",
    ]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["projctor=mlp"], "projctor: no key 'projctor'; did you mean 'projector'? known: "),
        (["visin.layer=1"], "no key 'visin'; did you mean 'vision'?"),
        (
            ["vision=tim"],
            "vision: no vision preset is named 'tim'; did you mean 'timm'? known: ",
        ),
        (["experiment=smok"], "no experiment preset is named 'smok'; did you mean 'smoke'?"),
        (["metrics=[exact_mach]"], "no metrics preset is named 'exact_mach'; did you mean 'exact_match'?"),
        (["projector=3"], "no projector preset is named '3'"),
        (["projector=mine:Gray"], "a class is no preset: write '~projector' '+projector.name=mine:Gray'"),
        (["tuning.backbone.rnk=4"], "no key 'rnk' in tuning.backbone; known: name (from"),
        (
            ["tuning=lora", "tuning.backbone.rnk=4"],
            "no key 'rnk' in tuning.backbone; did you mean 'rank'? known: alpha, ",
        ),
        (["schedule.part_lr.backbon=1"], "no key 'backbon' in schedule.part_lr; did you mean 'backbone'?"),
        (["backbone.sizes.width=1"], "to add it, write +backbone.sizes.width=1"),
        (["data.trian.limit=3"], "no key 'trian' in data; did you mean 'train'?"),
        (["projector.depth.x=3"], "projector.depth is 2, so it has no 'x'; set projector.depth first"),
        (["vision=null", "vision.layer=1"], "vision.layer: vision is null here; choose one first: vision=<preset>"),
        (["+projector.depth=3"], "projector.depth: stands there already; write projector.depth=3, without the +"),
        (["~projector.q"], "projector.q: there is nothing to delete"),
        (["~projector.depth=5"], "projector.depth: is 2, not 5; nothing was deleted"),
        (
            ["trainer.max_steps=1,2"],
            "trainer.max_steps: gives several values; add -m to run one job each, or write a list",
        ),
        (["x=["], "x: no viable alternative"),
        (["just_text"], "just_text: Error parsing override 'just_text'; write key=value"),
        (["projector@q=mlp"], "Could not override 'projector@q'"),
        (["hydra.sweeper.n=3"], "Could not override 'hydra.sweeper.n'"),
        (["name=a/b"], "name: names a folder: text without any of / "),
        (["name=''"], "name: names a folder"),
        (["name=.."], "name: names a folder"),
        (["seed=1.5"], "seed: expected a whole number of 0 or more, got 1.5"),
        (["trust_components=1"], "trust_components: expected true or false, got 1"),
        (["resume=3"], "resume: expected a path or null, got 3"),
        (["backbone=null"], "backbone: needs a value"),
        (["projector=null"], "projector: needs a value: an encoder without a projector"),
        (["schedule=null"], "schedule: needs a value"),
        (["trainer={batch: 3}"], "trainer.batch: no key 'batch' in trainer; did you mean 'batch_size'?"),
        (["+tuning.visoin.name=full"], "tuning.visoin: there is no part 'visoin'; did you mean 'vision'?"),
        (["~tuning.vision"], "tuning.vision: no strategy for this part; for example tuning.vision.name=frozen"),
        (["tuning.vision=null"], "tuning.vision: a Tuning is a mapping with a 'name', got None"),
        (["tuning.backbone=[{name: full}]"], "write '~tuning.backbone' '+tuning.backbone=[{name: full}]'"),
        (
            ["~tuning.backbone", "+tuning.backbone=[{name: full},{name: lor}]"],
            "tuning.backbone.1.name: no Tuning is named 'lor'",
        ),
        (["+data.trian={}"], "data.trian: data has no option 'trian'; did you mean 'train'?"),
        (["data.max_length=long"], "data.max_length: expected a whole number, got 'long'"),
        (["+data.pad_id=3"], "data.pad_id: 'pad_id' of data follows from the other parts; remove it"),
        (["data.train=null"], "data.train: a Source is a mapping with a 'name', got None"),
        (["metrics.ablation=null"], "metrics.ablation: to leave a metric out, write ~metrics.ablation"),
        (["+metrics.mine.max=3"], "metrics.mine: a Metric is a mapping with a 'name'"),
        (["audio_projector={name: mpl}"], "audio_projector.name: no Projector is named 'mpl'; did you mean 'mlp'?"),
        (["+projector.in_dim=3"], "projector.in_dim: 'in_dim' of mlp follows from the other parts; remove it"),
        (["vision.name=mlp"], "vision.name: no Encoder is named 'mlp' ('mlp' is a Projector)"),
        (["backbone.name=???"], "backbone.name: needs a value: the name of a Backbone"),
        (["projector.depth=${nothing.here}"], "projector.depth: Interpolation key 'nothing.here' not found"),
        (["projector.depth=${name}"], "projector.depth: expected a whole number, got 'mllm'"),
    ],
)
def test_problem(overrides: list[str], says: str) -> None:
    found = lines(*overrides)
    assert len(found) == 1, found
    assert says in found[0]


def test_an_unknown_preset_hides_what_depends_on_it() -> None:
    assert len(lines("vision=tmm", "vision.anything=3", "vision.layer=x")) == 1


def test_a_plain_tree_can_be_checked_without_hydra(tree: Any) -> None:
    good = tree()
    assert check_tree(good) == []
    (unknown,) = check_tree({**good, "checkpoint": "x"})
    assert unknown.key == "checkpoint"
    assert unknown.message.startswith("no such key; known: ")
    assert unknown.message.endswith(f"... ({len(ROOT_KEYS)} in all)")
    assert (
        check_tree({**good, "checkpoint": "x", "data": {**good["data"], "train": {"path": "???"}}}, evaluate=True) == []
    )


def test_classes_outside_the_registry(tree: Any) -> None:
    outside = tree()
    outside["metrics"]["ablation"]["score"] = {"name": "nowhere:Metric"}
    outside["projector"] = {"name": "nowhere:Projector"}
    found = {p.key: p.message for p in check_tree(outside, registered_only=True)}
    assert set(found) == {"projector.name", "metrics.ablation.score.name"}
    assert all("is a class outside the registry; add trust_components=true to allow this" in m for m in found.values())
    assert "no module named 'nowhere'" in check_tree(outside)[0].message


def test_root_keys_are_those_of_the_primary_config() -> None:
    root = presets.folder(presets.BUILT_IN)
    assert root is not None
    written = OmegaConf.load(root / "train.yaml")
    named = [next(iter(entry)) for entry in written.defaults if entry != "_self_"]
    groups = [name for name in named if not name.startswith("override ")]
    keys = {*groups, *written} - {"defaults", "hydra", "experiment"}
    assert set(ROOT_KEYS) == keys
    assert {*presets.GROUPS, "trainer"} == set(groups)


# ---------------------------------------------------------------- origins


def test_origin_of_built_in_files() -> None:
    composed = compose("train", ["tuning=lora", "projector.depth=3", "trainer={batch_size: 4}"])
    root = presets.folder(presets.BUILT_IN)
    assert root is not None
    for key, file, text in (
        ("tuning.backbone.rank", "tuning/lora.yaml", "  rank:"),
        ("projector.hidden_dim", "projector/mlp.yaml", "hidden_dim:"),
        ("metrics.ablation.score.max_new_tokens", "metrics/ablation.yaml", "  max_new_tokens:"),
        ("seed", "train.yaml", "seed:"),
        ("trainer.max_steps", "trainer/default.yaml", "max_steps:"),
    ):
        line = next(i for i, row in enumerate((root / file).read_text().splitlines(), 1) if row.startswith(text))
        assert composed.origin(key) == f"conf/{file}:{line}"
    assert composed.origin("projector.depth") == "override 'projector.depth=3'"
    assert composed.origin("trainer.batch_size") == "override 'trainer={batch_size: 4}'"
    assert composed.origin("nothing") == ""


def test_the_last_file_wins_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = "# @package _global_\ndefaults:\n  - override /tuning: lora\n\ntuning:\n  backbone:\n    rank: wide\n"
    write(tmp_path / "my", experiment__mine=experiment, projector__deep="defaults: [mlp]\n\ndepth: two\n")
    assert lines("experiment=mine", "projector=deep", config_dir="my") == [
        "projector.depth: expected a whole number, got 'two' (from my/projector/deep.yaml:3)",
        "tuning.backbone.rank: expected a whole number, got 'wide' (from my/experiment/mine.yaml:7)",
    ]


def test_required_value_is_traced_to_its_node(tmp_path: Path) -> None:
    write(tmp_path, data__mine="train:\n  name: llava_json\neval: null\nmax_length: 64\n")
    found = lines("data=mine", "metrics=[]", config_dir=tmp_path)
    assert found == [f"data.train.path: llava_json needs a value for 'path' (from {tmp_path}/data/mine.yaml:1)"]


# ---------------------------------------------------------------- users' files


def test_own_preset_beside_the_built_in_ones(tmp_path: Path) -> None:
    write(tmp_path, projector__deep="name: mlp\ndepth: 7\nhidden_dim: 8\n")
    composed = compose("train", ["projector=deep", "projector.hidden_dim=9"], [str(tmp_path)])
    assert composed.check() == []
    assert composed.tree is not None
    assert composed.tree["projector"] == {"name": "mlp", "depth": 7, "hidden_dim": 9}


def test_own_primary_config(tmp_path: Path) -> None:
    own = "defaults: [train, _self_]\nhydra:\n  searchpath: [pkg://mllm_factory.conf]\nname: mine\ntrainer:\n  max_steps: 5\n"
    write(tmp_path, mine=own, projector__mlp="name: mlp\ndepth: 9\nhidden_dim: null\n")
    composed = compose("mine", ["vision=timm"], config_path=str(tmp_path))
    assert composed.check() == []
    assert composed.tree is not None
    assert (composed.tree["name"], composed.tree["trainer"]["max_steps"]) == ("mine", 5)
    assert composed.tree["projector"]["depth"] == 9, "one's own root comes first"
    assert composed.origin("trainer.max_steps") == f"{tmp_path}/mine.yaml:6"
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        theirs = OmegaConf.to_container(hydra_compose("mine", ["vision=timm"]), resolve=True)
    assert isinstance(theirs, dict)
    assert composed.tree["projector"] == theirs["projector"]


@pytest.mark.parametrize("search", ["hydra.searchpath=[file://{}]", "hydra.searchpath=['{}']"])
def test_searchpath_override(tmp_path: Path, search: str) -> None:
    write(tmp_path / "a b", projector__deep="name: mlp\ndepth: 7\nhidden_dim: 8\n")
    write(tmp_path / "c", projector__flat="name: mlp\ndepth: 1\nhidden_dim: 8\n")
    path = (
        search.format(tmp_path / "a b") if "'" in search else search.format(str(tmp_path / "a b").replace(" ", "\\ "))
    )
    for config_dir, projector, depth in ((None, "deep", 7), (tmp_path / "c", "deep", 7), (tmp_path / "c", "flat", 1)):
        composed = compose("train", [path, f"projector={projector}"], [str(config_dir)] if config_dir else ())
        assert composed.check() == []
        assert composed.tree is not None
        assert composed.tree["projector"]["depth"] == depth


def test_missing_folders_and_configs(tmp_path: Path) -> None:
    assert lines(config_dir="nowhere")[0] == "there is no folder 'nowhere' (from --config-dir)"
    assert (
        str(compose("train", [], config_path="nowhere").check()[0])
        == "there is no folder 'nowhere' (from --config-path)"
    )
    assert lines("hydra.searchpath=[file://nowhere]")[0].startswith(
        "there is no folder 'file://nowhere' (from override"
    )
    assert lines(name="trian")[0].startswith("conf has no config 'trian'; did you mean 'train'? known: evaluate, train")
    found = compose("mine", [], config_path=str(write(tmp_path, main="a: 1"))).check()
    assert "has no config 'mine'; did you mean 'main'?" in str(found[0])


def test_a_preset_that_exists_twice_names_both_files(tmp_path: Path) -> None:
    write(tmp_path, experiment__smoke="# @package _global_\nname: mine\n", vision__mine="name: timm\n")
    assert lines(config_dir=tmp_path)[0] == (
        f"'experiment/smoke' exists twice: conf/experiment/smoke.yaml and {tmp_path}/experiment/smoke.yaml; rename one"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [("name: mlp\n depth: [1\n", 2), ("name: mlp\ndepth: 1\ndepth: 2\n", 3), ("name: mlp\n\tdepth: 1\n", 2)],
)
def test_broken_yaml_is_named_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    write(tmp_path, projector__mine=text)
    found = lines("projector=mine", config_dir=tmp_path)
    assert len(found) == 1
    assert found[0].startswith("not YAML: ")
    assert found[0].endswith(f"(from {tmp_path}/projector/mine.yaml:{line})")


def test_a_preset_that_names_an_unknown_one(tmp_path: Path) -> None:
    write(tmp_path, experiment__mine="# @package _global_\ndefaults:\n  - override /vision: tmm\n")
    (found,) = lines("experiment=mine", config_dir=tmp_path)
    assert found.startswith("vision: no vision preset is named 'tmm'; did you mean 'timm'? known: ")
    assert found.endswith(f"(from {tmp_path}/experiment/mine.yaml:3)")


def test_interpolations_of_a_preset(tmp_path: Path) -> None:
    write(
        tmp_path,
        projector__mine="name: mlp\ndepth: ${trainer.accumulate}\nhidden_dim: ${nothing}\n",
        experiment__job="# @package _global_\nname: job${hydra:job.num}\n",
    )
    found = lines("projector=mine", config_dir=tmp_path)
    assert found == [
        f"projector.hidden_dim: Interpolation key 'nothing' not found (from {tmp_path}/projector/mine.yaml:3)"
    ]
    assert lines("experiment=job", config_dir=tmp_path) == []


# ---------------------------------------------------------------- cost


def test_compose_and_check_do_not_import_torch() -> None:
    code = (
        "import sys; from mllm_factory.config import compose\n"
        "problems = compose('train', ['tuning=lora', 'tuning.backbone.rnk=4', 'vision.name=mlp', 'backbone=hf']).check()\n"
        "print(len(problems), 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "3 False\n"
