"""Export: plain folders that give the logits of the model they were made from, with and without this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from toys import tree as toy_tree

from mllm_factory import (
    CheckpointError,
    ConfigError,
    Message,
    MultimodalModel,
    Sample,
    Tuning,
    UserError,
    cli,
    llava,
    runs,
)
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.checkpoint import Writer, fingerprints, load
from mllm_factory.completion import candidates
from mllm_factory.distributed import World
from mllm_factory.export import export, write
from mllm_factory.types import VISION

ALONE = World(0, 1, torch.device("cpu"))
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
CLIP = {"name": "hf_vision", "architecture": "clip_vision_model", "sizes": TOWER}
SIGLIP = {"name": "hf_vision", "architecture": "siglip_vision_model", "sizes": TOWER}
LORA = {"name": "lora", "rank": 3}


class Extra(Tuning):
    """Inserts one vector that learns and nothing can fold."""

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        part.requires_grad_(False)
        part.register_parameter("extra", nn.Parameter(torch.zeros(3)))


def trained(folder: Path, **changes: Any) -> tuple[Path, MultimodalModel]:
    """A checkpoint in which every trained value was moved, and the model it was made from."""
    tree = toy_tree(folder, **changes)
    model = build_model(tree)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    writer = Writer(folder, tree, fingerprints(model), None, ALONE)
    return writer.save(model, {"step": 7}), model.eval()


def sample() -> Sample:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((48, 32), Image.Resampling.BICUBIC)
    return Sample("one", (Message("user", "<image>what is it?"), Message("assistant", "red")), {"vision": (picture,)})


@torch.no_grad()
def logits(model: MultimodalModel, tree: dict[str, Any]) -> tuple[Tensor, Any]:
    """Logits of every position of the sample, and its batch."""
    batch = build_collator(tree, model)([sample()])
    with model._sees(batch):
        return model.backbone.logits(model.backbone(model.embed(batch))), batch


# ---------------------------------------------------------------- LLaVA


@pytest.mark.parametrize(
    ("vision", "changes"),
    [
        (CLIP, {"tuning__backbone": LORA}),
        (CLIP, {"tuning__backbone": {"name": "full"}}),
        ({**CLIP, "select": "cls_patch", "layer": -1}, {"tuning__backbone": {**LORA, "dora": True}}),
        ({**CLIP, "layout": "pad"}, {"tuning__vision": LORA}),
        (SIGLIP, {"tuning__backbone": {"name": "oft", "blocks": 2}}),
        (SIGLIP, {"tuning__projector": {"name": "ia3"}, "tuning__backbone": {"name": "vera", "rank": 4}}),
    ],
    ids=["clip_lora", "clip_full", "clip_cls", "clip_pad", "siglip_oft", "siglip_vera"],
)
def test_a_llava_folder_gives_the_same_logits_without_us(
    tmp_path: Path, vision: dict[str, Any], changes: dict[str, Any]
) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    checkpoint, model = trained(tmp_path / "run", vision=vision, **changes)
    done = write(str(checkpoint), merge=True)
    assert (done.format, done.reason) == ("llava", "")
    assert done.folder == tmp_path / "run" / "export_step_000007"
    theirs: Any = LlavaForConditionalGeneration.from_pretrained(done.folder).eval()
    processor: Any = AutoProcessor.from_pretrained(done.folder)
    ours, batch = logits(model, runs.read_config(checkpoint))
    turns = [{"role": m.role, "content": m.text} for m in sample().messages]
    text = processor.tokenizer.apply_chat_template(turns, tokenize=False)
    inputs = processor(text=text, images=sample().media["vision"][0], return_tensors="pt", add_special_tokens=False)
    expected = batch.input_ids.masked_fill(batch.modality == VISION, theirs.config.image_token_id)
    assert torch.equal(inputs["input_ids"], expected)
    pixels = batch.media["vision"]
    assert float((inputs["pixel_values"] - pixels).abs().max()) < 0.05  # two libraries shrink pictures
    with torch.no_grad():
        got = theirs(input_ids=expected, pixel_values=pixels).logits[..., : ours.shape[-1]]
    assert float((got - ours).abs().max()) <= 1e-5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vision": {**SIGLIP, "layer": -1}}, "gives other logits"),
        ({"vision": {"name": "toys:Patches"}}, "vision is Patches, which holds no transformers model"),
        ({"vision": CLIP, "projector": {"name": "mlp", "depth": 1}}, "no linear layer, activation, linear layer"),
        ({"vision": CLIP, "projector": {"name": "mlp", "hidden_dim": 8}}, "8 wide inside, LLaVA's 16"),
        ({"vision": {**CLIP, "layout": "anyres"}}, "no image processor"),
    ],
    ids=["after_norm", "own_encoder", "depth", "width", "tiles"],
)
def test_what_is_no_llava_is_native_and_the_reason_is_told(
    tmp_path: Path, changes: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, model = trained(tmp_path / "run", **changes)
    words = [f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}", "merge=true", "trust_components=true"]
    assert export(words) == 0
    said = capsys.readouterr().out
    assert reason in said
    assert f"wrote a native folder: {tmp_path / 'out'}" in said
    if "layout" not in changes["vision"]:
        same_logits(tmp_path / "out", model, runs.read_config(checkpoint))


def test_a_model_without_eyes_is_no_llava(tmp_path: Path) -> None:
    with pytest.raises(llava.MisfitError, match="this model takes text"):
        llava.write(build_model(toy_tree(vision=None, projector=None)), tmp_path)


def same_logits(folder: Path, model: MultimodalModel, tree: dict[str, Any]) -> MultimodalModel:
    """A native folder's model, which has to compute what ``model`` does."""
    found = runs.resolve(folder)
    exported = runs.read_config(found)
    other = build_model({**exported, "seed": 99})
    load(found, other)
    ours, theirs = logits(model, tree)[0], logits(other.eval(), exported)[0]
    assert float((ours - theirs).abs().max()) <= 1e-5
    return other


# ---------------------------------------------------------------- native


@pytest.mark.parametrize("strategy", [{"name": "adapter", "width": 4}, LORA, {"name": "vera", "rank": 4}], ids=str)
def test_without_merge_the_tuning_stays_and_the_folder_holds_everything(
    tmp_path: Path, strategy: dict[str, Any]
) -> None:
    checkpoint, model = trained(tmp_path / "run", vision=CLIP, tuning__backbone=strategy)
    done = write(str(tmp_path / "run"))
    assert done.format == "native"
    assert "merge=true" in done.reason
    exported = runs.read_config(runs.resolve(done.folder))
    assert exported["tuning"]["backbone"] == [strategy, {"name": "full"}]
    other = same_logits(done.folder, model, runs.read_config(checkpoint))
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("strategy", [{"name": "adapter", "width": 4}, LORA], ids=["adapter", "lora"])
def test_pretrained_sources_are_not_needed_any_more(tmp_path: Path, strategy: dict[str, Any]) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from mllm_factory.components.backbones.byte_tokenizer import byte_tokenizer

    torch.manual_seed(0)
    tower, language = tmp_path / "clip", tmp_path / "llama"
    CLIPVisionModel(CLIPVisionConfig(**TOWER)).save_pretrained(tower)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-3,
    }
    tokenizer = byte_tokenizer()
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(language)
    tokenizer.save_pretrained(language)
    checkpoint, model = trained(
        tmp_path / "run",
        vision={**CLIP, "pretrained": str(tower)},
        backbone={"name": "hf", "pretrained": str(language)},
        tuning__backbone=strategy,
    )
    tree = runs.read_config(checkpoint)
    done = write(str(checkpoint))
    for folder in (tower, language):
        folder.rename(folder.with_name("gone_" + folder.name))
    exported = runs.read_config(runs.resolve(done.folder))
    assert exported["vision"]["pretrained"] is None
    assert exported["backbone"]["pretrained"] is None
    assert exported["backbone"]["tokenizer"] == str(done.folder / "tokenizer")
    same_logits(done.folder, model, tree)
    readme = (done.folder / "README.md").read_text()
    assert "these sources are still read" not in readme
    assert "Trained from" in readme


# ---------------------------------------------------------------- bad input


def test_what_cannot_be_merged_says_why(tmp_path: Path) -> None:
    checkpoint, _ = trained(tmp_path / "run", tuning__backbone={"name": "adapter", "width": 4})
    with pytest.raises(ConfigError, match=r"adapter: f is not linear.*export without merge"):
        write(str(checkpoint), merge=True, trust_components=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints"]


def test_steering_behind_decoder_layers_is_not_merged(tmp_path: Path) -> None:
    checkpoint, _ = trained(tmp_path / "run", vision=CLIP, tuning__backbone={"name": "mores"})
    with pytest.raises(ConfigError, match="merge"):
        write(str(checkpoint), merge=True)
    assert write(str(checkpoint)).format == "native"


def test_tuning_that_inserts_without_a_way_to_merge_is_refused(tmp_path: Path) -> None:
    checkpoint, _ = trained(tmp_path / "run", tuning__backbone={"name": "test_export:Extra"})
    with pytest.raises(
        ConfigError, match=r"merge: 1 tensors of the tuning have no place .*backbone.extra; export without"
    ):
        write(str(checkpoint), merge=True, trust_components=True)


def test_classes_outside_the_registry_need_trust(tmp_path: Path) -> None:
    checkpoint, _ = trained(tmp_path / "run")
    with pytest.raises(ConfigError, match="trust_components"):
        write(str(checkpoint))


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    checkpoint, _ = trained(tmp_path / "run", vision=CLIP)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"output: .*out exists; choose another"):
        write(str(checkpoint), output=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "export needs a checkpoint"),
        (["checkpoint"], "export takes option=value, got 'checkpoint'"),
        (["chekpoint=x"], "did you mean 'checkpoint'"),
        (["checkpoint=x", "merge=yes"], "merge: 'yes' is neither true nor false"),
        (["checkpoint=/nowhere"], "there is no checkpoint at /nowhere"),
    ],
)
def test_bad_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=message):
        export(words)
    assert cli.main(["export", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_its_options_are_completed() -> None:
    assert candidates("mllm-factory exp") == ["export "]
    assert candidates("mllm-factory export ") == ["checkpoint=", "merge=", "output=", "trust_components="]
    assert candidates("mllm-factory export checkpoint=x me") == ["merge="]
