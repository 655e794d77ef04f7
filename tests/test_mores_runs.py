"""MoReS inside whole models: generation, padding, projectors, training, and checkpoints."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from steered import FROZEN, RANDOM, built, hidden, logits, samples, strengthened
from torch import Tensor
from toys import tree

from mllm_factory import (
    IGNORE_INDEX,
    Batch,
    ConfigError,
    MultimodalModel,
    Projector,
    names,
)
from mllm_factory import run as engine
from mllm_factory.schema import GIVEN

STRONG = {**RANDOM, "rank": 4, "positions": "all"}
CONF = Path(str(find_spec("mllm_factory.conf").origin)).parent  # type: ignore[union-attr]


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("strategy", [STRONG, {"name": "reft", "init": "random", "modalities": ["text", "vision"]}])
def test_a9_cached_is_uncached(strategy: dict[str, Any]) -> None:
    model, collator = built(strategy)
    strengthened(model)
    prompts = collator.prompts(samples(text_every=3))
    cached, again = (model.generate(prompts, 12, use_cache=use_cache) for use_cache in (True, False))
    assert cached == again
    assert cached != built()[0].generate(prompts, 12)


def test_a10_padding_and_neighbours_change_nothing() -> None:
    model, collator = built({**STRONG, "positions": "f1+l2"})
    strengthened(model)
    shown = samples(4, text_every=3, pictures=2)
    for collate in (collator.prompts, collator):
        batch = collate(shown)
        together = hidden(model, batch)
        for row, sample in enumerate(shown):
            alone = hidden(model, collate([sample]))[0]
            torch.testing.assert_close(together[row][batch.attention_mask[row]], alone, atol=1e-5, rtol=1e-5)
    alone_texts = [model.generate(collator.prompts([sample]), 8)[0] for sample in shown]
    assert model.generate(collator.prompts(shown), 8) == alone_texts


def beam_search(model: Any, prompts: Any) -> Tensor:
    with torch.no_grad(), model._sees(prompts):
        return model.backbone.model.generate(
            inputs_embeds=model.embed(prompts),
            attention_mask=prompts.attention_mask.long(),
            num_beams=2,
            do_sample=False,
            min_new_tokens=6,
            max_new_tokens=6,
            pad_token_id=0,
        )


def test_a11_beams() -> None:
    model, collator = built(STRONG)
    strengthened(model)
    shown = samples(2)
    together = beam_search(model, collator.prompts(shown))
    for row, sample in enumerate(shown):
        assert torch.equal(together[row], beam_search(model, collator.prompts([sample]))[0])
    assert not torch.equal(together, beam_search(built()[0], collator.prompts(shown)))


# ---------------------------------------------------------------- where the tokens really are


def projectors() -> list[dict[str, Any]]:
    """A node of every projector that takes four tokens of width 6, by the first preset of each."""
    found: dict[str, dict[str, Any]] = {}
    cheap = {f.stem: yaml.safe_load(f.read_text()) for f in (Path(__file__).parent / "cheap").glob("*.yaml")}
    for file in sorted((CONF / "projector").glob("*.yaml")):
        node = yaml.safe_load(file.read_text())
        sizes = {key: value for key, value in cheap.get(node["name"], {}).items() if key not in GIVEN["Projector"]}
        found.setdefault(node["name"], {**node, **sizes})
    return [node for node in found.values() if node["name"] in names(Projector)]


@pytest.mark.parametrize("template", [None, "vicuna", "plain"])
@pytest.mark.parametrize("node", projectors(), ids=lambda node: node["name"])
def test_a14_steered_embeddings_are_the_projectors_outputs(node: dict[str, Any], template: str | None) -> None:
    backbone = {**tree()["backbone"], "template": template}
    width = 16 if node["name"] == "identity" else 6
    changes = {"projector": node, "backbone": backbone, "vision": {"name": "toys:Patches", "dim": width}}
    try:
        model, collator = built({**RANDOM, "positions": "f1+l1", "layers": [0]}, **changes)
    except ConfigError as error:
        pytest.fail(f"{node['name']} does not fit the toy encoder; give it a cheap override: {error}")
    for collate in (collator, collator.prompts):
        batch = collate(samples(3, text_every=3, pictures=2))
        with torch.no_grad():
            embeds, features = model.embed(batch), model.features("vision", batch.media["vision"])
        flight: Any = model.backbone.steering.flight
        places = flight.positions.places(batch, False)
        k = model.tokens_per_item["vision"]
        picked = embeds[places.rows, places.columns]
        expected = torch.stack([f for item in (0, 2) for f in (features[item, 0], features[item + 1, k - 1])])
        assert torch.equal(picked, expected)
        rows, columns = (behind_hooks(model, batch) != embeds).any(-1).nonzero().unbind(1)
        assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == sorted(
            zip(places.rows.tolist(), places.columns.tolist(), strict=True)
        )


def behind_hooks(model: MultimodalModel, batch: Batch) -> Tensor:
    """What the first layer is given, [B, T, D]."""
    seen: list[Tensor] = []
    handle = model.backbone.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hidden(model, batch)
    handle.remove()
    return seen[0]


# ---------------------------------------------------------------- training


def trained(folder: Path, **changes: Any) -> dict[str, Tensor]:
    engine.train(tree(folder, metrics={}, **changes))
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    return load_file(newest / "model.safetensors")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a17_frozen_is_frozen_and_the_rest_moves(tmp_path: Path, checkpointing: bool) -> None:
    strategy = {**RANDOM, "placement": "block_output"}
    before = dict(built(strategy)[0].named_parameters())
    node = tree(
        tmp_path,
        metrics={},
        tuning__backbone=strategy,
        trainer__max_steps=3,
        trainer__gradient_checkpointing=checkpointing,
    )
    model: Any = None

    def keep(built_model: Any) -> dict[str, Any]:
        nonlocal model
        model = built_model
        return {}

    with pytest.MonkeyPatch.context() as patch:
        original = engine.fingerprints
        patch.setattr(engine, "fingerprints", lambda m: keep(m) or original(m))
        engine.train(node)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    alive = {n for n, p in model.named_parameters() if p.requires_grad and "steering.1" not in n}
    assert alive <= moved
    assert all(model.get_parameter(name).requires_grad for name in moved)
    dead = {f"backbone.steering.1.{name}" for name in ("weight", "bias")}  # A8: no gradient but weight decay
    assert not any((model.get_parameter(n) - before[n]).abs().max() > 1e-3 for n in dead)


def test_a18_it_learns_what_only_the_steered_tokens_tell() -> None:
    """Blind to the pictures, a model cannot get below log(8) / 2: every second label is one letter of eight."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    sizes |= {"num_key_value_heads": 4, "initializer_range": 0.125, "max_position_embeddings": 256}
    backbone = {**tree()["backbone"], "sizes": sizes}
    mores = {"name": "mores", "rank": 8, "positions": "all"}
    found = {"mores": learnt(backbone, mores, "frozen"), "projector": learnt(backbone, FROZEN, "full")}
    print(f"mean loss and share of right labels: {found}")
    assert found["mores"][1] == 1.0, found
    assert found["mores"][0] < math.log(8) / 2, found


def learnt(backbone: dict[str, Any], strategy: dict[str, Any], projector: str) -> tuple[float, float]:
    """Mean loss and share of right labels after 120 steps on eight pictures."""
    model, collator = built(strategy, backbone=backbone, tuning__projector={"name": projector})
    batch = collator(eight_pictures())
    optimizer = torch.optim.Adam([p for p in model.train().parameters() if p.requires_grad], lr=1e-2)
    for _ in range(120):
        output = model(batch)
        optimizer.zero_grad()
        (output.loss_sum / output.num_labels).backward()
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(batch, logits=True)
    wanted = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORE_INDEX]
    return float(found.loss_sum / found.num_labels), float((found.logits.argmax(-1) == wanted).float().mean())


def eight_pictures() -> list[Any]:
    """Eight colours with one question; the answer is one of eight letters."""
    from PIL import Image

    from mllm_factory import Message, Sample

    made = []
    for i in range(8):
        picture = Image.new("RGB", (12, 12), tuple(255 * (i >> bit & 1) for bit in range(3)))
        turns = Message("user", "<image>?"), Message("assistant", "dbgahcfe"[i])
        made.append(Sample(str(i), turns, {"vision": (picture,)}))
    return made


def test_a19_four_steps_are_two_and_two(tmp_path: Path) -> None:
    strategy = {**RANDOM, "positions": "ratio:0.2-0.9", "dropout": 0.1}
    whole = trained(tmp_path / "whole", tuning__backbone=strategy)
    trained(
        tmp_path / "cut", tuning__backbone=strategy, trainer__max_steps=2, schedule={"name": "constant", "lr": 1e-2}
    )
    node = tree(tmp_path / "whole2", metrics={}, tuning__backbone=strategy, schedule={"name": "constant", "lr": 1e-2})
    engine.train(node)
    engine.train(
        {
            **tree(tmp_path / "cut", metrics={}, tuning__backbone=strategy, schedule={"name": "constant", "lr": 1e-2}),
            "resume": "auto",
        }
    )
    files = [tmp_path / run / "checkpoints" / "step_000004" / "model.safetensors" for run in ("whole2", "cut")]
    one, two = map(load_file, files)
    assert one.keys() == two.keys() == whole.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {name.split(".")[0] for name in one} == {"projectors", "backbone"}
    steering = sum(t.numel() for name, t in one.items() if "backbone" in name)
    assert steering == 2 * 1 * (2 * 16 + 1)
    assert files[0].stat().st_size < 4 * sum(t.numel() for t in one.values()) + 120 * len(one)


def test_a19_a_loaded_checkpoint_gives_the_same_outputs(tmp_path: Path) -> None:
    from mllm_factory.checkpoint import load

    saved = trained(tmp_path, tuning__backbone=STRONG, trainer__max_steps=2)
    model, collator = built(STRONG)
    batch = collator(samples())
    start = logits(model, batch)
    load(tmp_path / "checkpoints" / "step_000002", model)
    state = dict(model.named_parameters())
    assert all(torch.equal(state[name], value) for name, value in saved.items())
    assert not torch.equal(logits(model, batch), start)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_one_also_where_one_has_nothing_to_steer(tmp_path: Path, strategy: str) -> None:
    import jobs
    from test_distributed import settings, together

    def node(name: str, **trainer: Any) -> dict[str, Any]:
        found = settings(tmp_path / name, max_steps=3, **trainer)
        found["tuning"]["backbone"], found["metrics"] = {**RANDOM, "rank": 2}, {}
        return found

    together(node("two", strategy=strategy), tmp_path / "two.log")
    jobs.run(node("one", accumulate=2), tmp_path / "one.log")
    one, two = (
        load_file(tmp_path / run / "checkpoints" / "step_000003" / "model.safetensors") for run in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-4)
