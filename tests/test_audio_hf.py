"""The hf_audio encoder against transformers used by hand: its feature extractors, its models, its folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as library_of_models
import yaml
from huggingface_hub import constants

from mllm_factory import ConfigError, DataError, Encoder, build

transformers: Any = library_of_models  # its annotations leave no room for a dict of sizes
CONF = Path(__file__).parent.parent / "conf" / "audio"
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
CONVS = {"conv_dim": [8, 8, 8, 8, 8, 8, 8], "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 20,
    "max_source_positions": 50,
}
AST = {**SMALL, "max_length": 64, "num_mel_bins": 32}
CLAP = {
    "hidden_size": 32,
    "patch_embeds_hidden_size": 4,
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 2],
}
STABLE = {**CONVS, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
FAMILIES: dict[str, tuple[str, dict[str, Any], float]] = {  # architecture, sizes, seconds of the whole window
    "whisper": ("whisper", WHISPER, 1.0),
    "wav2vec2": ("wav2vec2", {**SMALL, **CONVS}, 1.0),
    "wav2vec2 large": ("wav2vec2", {**SMALL, **STABLE}, 1.0),
    "hubert": ("hubert", {**SMALL, **CONVS}, 1.0),
    "wavlm": ("wavlm", {**SMALL, **CONVS}, 1.0),
    "ast": ("audio-spectrogram-transformer", AST, 0.64),
    "clap": ("clap", CLAP, 10.0),
    "sew": (
        "sew",
        {**SMALL, "conv_dim": [8] * 13, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
        1.0,
    ),
    "data2vec": ("data2vec-audio", {**SMALL, "conv_dim": [8] * 7, "num_conv_pos_embedding_groups": 2}, 1.0),
}


def encoder(architecture: str | None, sizes: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    node = {"name": "hf_audio", "architecture": architecture, "sizes": sizes, **options}
    return build(Encoder, node).eval()


def library(family: str) -> tuple[Any, Any]:
    """A tiny random model of the whole kind that is published, and its feature extractor, both the library's own."""
    architecture, sizes, _ = FAMILIES[family]
    torch.manual_seed(5)
    if architecture == "whisper":
        config = transformers.WhisperConfig(
            **sizes, decoder_attention_heads=2, decoder_ffn_dim=32, decoder_layers=1, vocab_size=60
        )
        config.pad_token_id = 0
        extractor = transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=1)
        return transformers.WhisperForConditionalGeneration(config).eval(), extractor
    if architecture == "clap":
        text = {**SMALL, "vocab_size": 50, "projection_hidden_size": 16}
        config = transformers.ClapConfig(audio_config=sizes, text_config=text, projection_dim=8)
        extractor = transformers.ClapFeatureExtractor(truncation="rand_trunc", frequency_min=50)
        return transformers.ClapModel(config).eval(), extractor
    config = transformers.CONFIG_MAPPING[architecture](**sizes)
    if architecture.startswith("audio"):
        extractor = transformers.ASTFeatureExtractor(max_length=64, num_mel_bins=32, mean=-3.0)
    else:
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=architecture != "wavlm")
    return transformers.AutoModel.from_config(config).eval(), extractor


def saved(family: str, folder: Path) -> tuple[Any, Any]:
    model, extractor = library(family)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return model, extractor


def hidden_states(model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """(last hidden state, all hidden states) of the audio side."""
    inputs.pop("is_longer", None)
    inputs.pop("attention_mask", None)
    part = getattr(model, "audio_model", None) or (model.model.encoder if hasattr(model, "model") else model)
    out = part(**inputs, output_hidden_states=True)
    return out.last_hidden_state, out.hidden_states


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_library(family: str, tmp_path: Path) -> None:
    model, extractor = saved(family, tmp_path)
    architecture, sizes, seconds = FAMILIES[family]
    ours = encoder(architecture, sizes, pretrained=str(tmp_path), seconds=seconds)
    rate = extractor.sampling_rate
    wave = torch.randn(1, round(rate * seconds), generator=torch.Generator().manual_seed(1)) * 0.2
    inputs = dict(extractor(wave[0].numpy(), sampling_rate=rate, return_tensors="pt"))
    with torch.no_grad():
        expected, hidden = hidden_states(model, inputs)
        tokens = expected if expected.ndim == 3 else expected.flatten(2).transpose(1, 2)
        items = ours.transform((wave, rate))
        torch.testing.assert_close(ours(items), tokens, atol=1e-5, rtol=1e-5)
        assert (ours.num_tokens, ours.dim) == tuple(tokens.shape[1:])
        ours_first = encoder(architecture, sizes, pretrained=str(tmp_path), seconds=seconds, layer=0)
        first = ours_first(items)
    assert sum(p.numel() for p in ours_first.parameters()) < sum(p.numel() for p in ours.parameters())
    state = hidden[1] if hidden[1].ndim == 3 else hidden[1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(first, state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_learns_in_every_step_and_no_item_depends_on_another(family: str) -> None:
    architecture, sizes, seconds = FAMILIES[family]
    ours = encoder(architecture, sizes, seconds=seconds)
    items = ours.transform((torch.randn(2, 2 * 48000), 48000))[:2]
    with torch.no_grad():
        together = ours(items)
        torch.testing.assert_close(ours(items[:1]), together[:1], atol=1e-5, rtol=1e-5)
    for part in (ours.train(), encoder(architecture, sizes, seconds=seconds, layer=1).train()):
        for _ in range(3):
            part.zero_grad()
            part(items).square().sum().backward()
            assert [name for name, p in part.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recording_of_any_kind_gives_numbers(family: str) -> None:
    architecture, sizes, seconds = FAMILIES[family]
    ours = encoder(architecture, sizes, seconds=seconds, max_windows=2)
    for wave, rate in ((torch.zeros(8, 9600), 96000), (torch.ones(1, 1), 8000), (torch.zeros(1, 1), 16000)):
        items = ours.transform((wave, rate))
        assert items.shape == (1, *items.shape[1:])
        assert ours(items).isfinite().all()
    assert len(ours.transform((torch.randn(1, round(12000 * seconds)), 8000))) == 2
    with pytest.raises(DataError, match="max_windows is 2"):
        ours.transform((torch.randn(1, round(24000 * seconds)), 8000))
    with pytest.raises(DataError, match="NaN"):
        ours.transform((torch.full((1, 8000), torch.nan), 8000))


# ---------------------------------------------------------------- windows


def test_whisper_keeps_the_frames_of_a_shorter_window() -> None:
    whole, half = encoder("whisper", WHISPER, seconds=1.0), encoder("whisper", WHISPER, seconds=0.5)
    half.model.load_state_dict(whole.model.state_dict())
    wave = torch.randn(1, 8000)
    assert (whole.num_tokens, half.num_tokens) == (50, 25)
    with torch.no_grad():
        items = half.transform((wave, 16000))
        assert torch.equal(items, whole.transform((wave, 16000)))  # both fill up with silence
        assert torch.equal(half(items), whole(items)[:, :25])


@pytest.mark.parametrize("masked", [False, True])
def test_short_waveforms_are_filled_and_normalised_in_the_librarys_way(masked: bool) -> None:
    ours = encoder("wav2vec2", {**SMALL, **CONVS}, seconds=1.0, features={"return_attention_mask": masked})
    wave = torch.randn(1, 4000) + 3
    items = ours.transform((wave, 16000))
    counted = wave[0] if masked else torch.cat([wave[0], torch.zeros(12000)])  # with a mask, silence does not count
    expected = (wave[0] - counted.mean()) / (counted.var(correction=0) + 1e-7).sqrt()
    torch.testing.assert_close(items[0, :4000], expected, atol=1e-5, rtol=1e-5)
    assert items.shape == (1, 16000)


# ---------------------------------------------------------------- sources


def test_a_folder_says_everything(tmp_path: Path) -> None:
    saved("ast", tmp_path)
    ours = encoder(None, pretrained=str(tmp_path), seconds=0.5)
    assert ours.transform.extractor.mean == -3.0
    assert type(ours.model).__name__ == "ASTModel"


def test_what_a_folder_says_must_agree(tmp_path: Path) -> None:
    saved("ast", tmp_path)
    for options, says in (
        ({"architecture": "wav2vec2"}, "'audio-spectrogram-transformer' where architecture says 'wav2vec2'"),
        ({"sizes": {"hidden_size": 32}}, "hidden_size 16 where sizes says 32"),
        ({"features": {"mean": -4.0}}, "mean -3.0 where features says -4.0"),
    ):
        node: dict[str, Any] = {
            "architecture": "audio-spectrogram-transformer",
            "pretrained": str(tmp_path),
            "seconds": 0.5,
            **options,
        }
        with pytest.raises(ConfigError, match=says) as caught:
            encoder(**node)
        assert "\n" not in str(caught.value)


def test_damaged_folders(tmp_path: Path) -> None:
    saved("whisper", tmp_path / "a")
    (tmp_path / "a" / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no preprocessor_config\.json"):
        encoder(None, pretrained=str(tmp_path / "a"), seconds=1.0)
    assert encoder(None, pretrained=str(tmp_path / "a"), seconds=1.0, features={}).num_tokens == 50
    weights = tmp_path / "a" / "model.safetensors"
    state = dict(transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "a").state_dict())
    state.pop("proj_out.weight")
    state.pop("model.encoder.layers.1.fc1.weight")
    from safetensors.torch import save_file

    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"does not fill 1 tensors of WhisperEncoder, such as layers\.1\.fc1\.weight"):
        encoder(None, pretrained=str(tmp_path / "a"), seconds=1.0, features={})
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        encoder(None, pretrained=str(tmp_path / "a"), seconds=1.0, features={})
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json; give a folder"):
        encoder(None, pretrained=str(tmp_path / "b"))
    (tmp_path / "b" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="no audio model 'llama'"):
        encoder(None, pretrained=str(tmp_path / "b"))


def test_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model, _ = saved("hubert", tmp_path / "models--some--hubert" / "snapshots" / "abc")
    ours = encoder("hubert", pretrained="some/hubert", seconds=1.0)
    key = "feature_projection.projection.weight"
    assert torch.equal(ours.model.state_dict()[key], model.state_dict()[key])
    with pytest.raises(ConfigError, match="hub cannot be asked"):
        encoder("hubert", pretrained="some/other")


def test_on_meta_nothing_is_read_or_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    saved("wavlm", tmp_path / "local")
    (tmp_path / "local" / "model.safetensors").write_bytes(b"never read")
    with torch.device("meta"):
        part = encoder("wavlm", pretrained=str(tmp_path / "local"), seconds=1.0)
        assert encoder("wavlm", {**SMALL, **CONVS}, pretrained="nobody/nothing", seconds=1.0).num_tokens == 49
        with pytest.raises(ConfigError, match="name the architecture, too"):
            encoder(None, pretrained="nobody/nothing")
        shutil.rmtree(tmp_path / "local")
        with pytest.raises(ConfigError, match="does not exist"):
            encoder("wavlm", pretrained=str(tmp_path / "local"))
    assert {p.device.type for p in part.parameters()} == {"meta"}
    assert (part.num_tokens, part.dim) == (49, 16)


def test_building_draws_no_number_of_its_own() -> None:
    part = encoder("wav2vec2", {**SMALL, **CONVS}, seconds=1.0)
    after = torch.rand(1)
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(**SMALL, **CONVS, mask_time_prob=0.0)
    theirs = transformers.Wav2Vec2Model(config).state_dict()
    assert torch.equal(after, torch.rand(1))
    assert all(torch.equal(value, theirs[key]) for key, value in part.model.state_dict().items())


# ---------------------------------------------------------------- presets


def reference(preset: str) -> Any:
    """The audio side of the published model that a preset names, from transformers alone, on the meta device."""
    c = transformers
    with torch.device("meta"):
        if preset.startswith("whisper"):
            width, layers, heads, mels = {
                "base": (512, 6, 8, 80),
                "small": (768, 12, 12, 80),
                "large_v3": (1280, 32, 20, 128),
            }[preset.removeprefix("whisper_")]
            sizes = {"d_model": width, "encoder_layers": layers, "encoder_attention_heads": heads}
            decoder = {"decoder_layers": 1, "decoder_attention_heads": heads}
            whisper = c.WhisperConfig(**sizes, **decoder, encoder_ffn_dim=4 * width, num_mel_bins=mels)
            return c.WhisperModel(whisper).encoder
        if preset == "clap":
            return c.ClapModel(c.ClapConfig()).audio_model
        if preset == "ast":
            return c.ASTModel(c.ASTConfig())
        return c.AutoModel.from_config(c.CONFIG_MAPPING[preset.removesuffix("_base")](mask_time_prob=0.0))


@pytest.mark.parametrize(
    ("preset", "tokens", "dim", "published"),
    [
        ("whisper_base", 1500, 512, 20590592),
        ("whisper_small", 1500, 768, 88154112),
        ("whisper_large_v3", 1500, 1280, 636968960),
        ("wav2vec2_base", 499, 768, 94371712 - 768),
        ("hubert_base", 499, 768, 94371712 - 768),
        ("wavlm_base", 499, 768, 94381936 - 768),
        ("ast", 1214, 768, None),
        ("clap", 64, 768, None),
    ],
)
def test_presets_have_the_sizes_of_the_published_models(
    preset: str, tokens: int, dim: int, published: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    node = yaml.safe_load((CONF / f"{preset}.yaml").read_text())
    assert node["pretrained"]
    with torch.device("meta"):
        part: Any = build(Encoder, node)
    assert (part.num_tokens, part.dim) == (tokens, dim)
    count = sum(p.numel() for p in part.parameters())
    assert count == sum(p.numel() for p in reference(preset).parameters())
    assert published is None or count == published


@pytest.mark.parametrize("file", sorted(CONF.glob("*_mini.yaml")), ids=lambda file: file.stem)
def test_small_presets_build_and_run(file: Path) -> None:
    node = yaml.safe_load(file.read_text())
    part: Any = build(Encoder, node).eval()
    with torch.no_grad():
        assert part(part.transform((torch.randn(1, 8000), 8000))).shape == (1, part.num_tokens, part.dim)
    assert sum(p.numel() for p in part.parameters()) < 6e6


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "wisper"}, "no audio model 'wisper'; did you mean 'whisper'"),
        ({"architecture": "bert"}, "no audio model 'bert'"),
        ({"architecture": None}, "architecture: needed for random weights"),
        ({"sizes": {"hidden_sise": 3}}, "has no 'hidden_sise'; did you mean 'hidden_size'"),
        ({"sizes": {**SMALL, "layerdrop": 0.1}}, "'layerdrop' is always 0.0 here"),
        ({"sizes": {**SMALL, **CONVS, "num_attention_heads": 3}}, "sizes: "),
        ({"layer": 3}, r"layer: 3 is out of range, 'wav2vec2' has 3 layers \(0 to 2"),
        ({"layer": -4}, "layer: -4 is out of range"),
        ({"seconds": 0.01}, "correct features, seconds or layer"),
        (
            {"features": {"do_normalise": True}},
            "Wav2Vec2FeatureExtractor has no 'do_normalise'; did you mean 'do_normalize'",
        ),
        ({"architecture": "whisper", "sizes": WHISPER, "seconds": 1.5}, "seconds: 1.5 s are more than the 1 s"),
        ({"architecture": "whisper", "sizes": {**WHISPER, "max_source_positions": 60}}, "multiple of 50"),
        (
            {"architecture": "whisper", "sizes": WHISPER, "features": {"feature_size": 30}},
            r"items \[30, 100\] do not fit",
        ),
        ({"pretrained": "pkg://no_such_weights"}, "pip install no-such-weights"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    node: dict[str, Any] = {"architecture": "wav2vec2", "sizes": {**SMALL, **CONVS}, "seconds": 1.0, **options}
    with pytest.raises(ConfigError, match=says) as caught:
        encoder(**node)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
