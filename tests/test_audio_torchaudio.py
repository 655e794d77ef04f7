"""The torchaudio encoder against torchaudio used directly: features, layers, weights, sizes and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio
import yaml
from safetensors.torch import save_file

from mllm_factory import ConfigError, Encoder, build

CHEAP = yaml.safe_load((Path(__file__).parent / "cheap" / "torchaudio.yaml").read_text())
SIZES = CHEAP["sizes"]
NODE = {"name": "torchaudio", **CHEAP}


def encoder(**options: Any) -> Any:
    torch.manual_seed(0)
    return build(Encoder, {**NODE, **options}).eval()


def plain(bundle: str = "WAV2VEC2_BASE", seed: int = 5, **more: Any) -> Any:
    """torchaudio's own model of the small sizes."""
    torch.manual_seed(seed)
    of = getattr(torchaudio.pipelines, bundle)
    make = torchaudio.models.wavlm_model if of._model_type == "WavLM" else torchaudio.models.wav2vec2_model
    return make(**{**of._params, **SIZES, "aux_num_out": None, **more}).eval()


@pytest.mark.parametrize("bundle", ["WAV2VEC2_BASE", "HUBERT_BASE", "WAVLM_BASE", "WAVLM_LARGE", "HUBERT_LARGE"])
@pytest.mark.parametrize("layer", [-1, 0])
def test_features_are_those_of_torchaudio(bundle: str, layer: int, tmp_path: Path) -> None:
    model = plain(bundle)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    ours = encoder(architecture=bundle, layer=layer, pretrained=str(tmp_path))
    wave = torch.randn(1, 16000)
    theirs = model
    if getattr(torchaudio.pipelines, bundle)._normalize_waveform:
        theirs = torchaudio.pipelines._wav2vec2.utils._extend_model(model, normalize_waveform=True)
    with torch.no_grad():
        expected = theirs.extract_features(wave)[0][layer]
        items = ours.transform((wave, 16000))
        assert torch.equal(ours(items), expected)
        alone = ours(torch.cat([items, torch.randn(1, 16000) * 9]))[:1]
    torch.testing.assert_close(alone, expected)  # no item depends on another
    assert (ours.num_tokens, ours.dim) == tuple(expected.shape[1:])


def test_a_fine_tuned_file_with_a_classifier_and_a_pth_wrapper(tmp_path: Path) -> None:
    model = plain(aux_num_out=29)
    file = tmp_path / "asr.pth"
    torch.save({"state_dict": model.state_dict()}, file)
    ours = encoder(pretrained=str(file))
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in ours.model.state_dict().items())


def test_nothing_behind_the_layer_is_kept_and_everything_learns() -> None:
    first, last = encoder(layer=0), encoder(layer=-1)
    one = sum(p.numel() for p in plain().encoder.transformer.layers[1].parameters())
    assert sum(p.numel() for p in last.parameters()) - sum(p.numel() for p in first.parameters()) == 2 * one
    for part in (first, last, encoder(architecture="HUBERT_LARGE"), encoder(architecture="WAVLM_LARGE")):
        part.train()(torch.randn(2, 16000)).square().sum().backward()
        assert [name for name, p in part.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("bundle", "published"), [("WAV2VEC2_BASE", 94371712), ("WAVLM_BASE", 94381936), ("HUBERT_LARGE", None)]
)
def test_sizes_are_those_of_the_published_models(bundle: str, published: int | None) -> None:
    with torch.device("meta"):
        part = encoder(architecture=bundle, sizes=None, layer=-1, seconds=10.0)
        whole = getattr(torchaudio.models, bundle.lower())()
    theirs = sum(p.numel() for p in whole.parameters())
    unused = 2 * part.dim if bundle == "HUBERT_LARGE" else 0  # the norm behind the last layer
    assert sum(p.numel() for p in part.parameters()) == theirs - unused
    assert published is None or published == theirs + part.dim  # the published ones have a vector for masking, too
    assert part.num_tokens == 499


def test_zeros_and_tiny_recordings_give_numbers() -> None:
    part = encoder(architecture="WAVLM_LARGE")
    for wave in (torch.zeros(8, 5000), torch.ones(1, 1), torch.zeros(1, 16000)):
        assert part(part.transform((wave, 96000))).isfinite().all()


def test_the_bundle_is_read_from_torchs_folder_of_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(ConfigError, match=r"wav2vec2_fairseq_base_ls960\.pth cannot be had .* put it at") as caught:
        encoder(pretrained="bundle")
    assert "\n" not in str(caught.value)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    model = plain()
    torch.save(model.state_dict(), folder / "wav2vec2_fairseq_base_ls960.pth")
    ours = encoder(pretrained="bundle", layer=-1)
    assert torch.equal(
        ours.model.encoder.transformer.layers[2].layer_norm.weight,
        model.state_dict()["encoder.transformer.layers.2.layer_norm.weight"],
    )
    with torch.device("meta"):  # counting asks nobody
        assert encoder(architecture="HUBERT_BASE", pretrained="bundle").num_tokens == 49


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_file(plain(encoder_num_layers=2).state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match="does not fit by name"):
        encoder(pretrained=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "WAV2VEC_BASE"}, "did you mean 'WAV2VEC2_BASE'"),
        ({"sizes": {"encoder_layers": 2}}, "sizes: 'WAV2VEC2_BASE' has no 'encoder_layers'; did you mean"),
        ({"sizes": {**SIZES, "aux_num_out": 3}}, "'aux_num_out' has no effect"),
        ({"sizes": {**SIZES, "encoder_num_heads": 3}}, "sizes: they do not fit together"),
        ({"sizes": {**SIZES, "encoder_num_layers": 0}}, "0 layers are none"),
        ({"layer": 3}, r"layer: 3 is out of range, 'WAV2VEC2_BASE' has 3 layers \(0 to 2"),
        ({"layer": -4}, "layer: -4 is out of range"),
        ({"seconds": 0.02}, "seconds: the architecture cannot take 0.02 s"),
        ({"seconds": 0.0}, "seconds: 0 s"),
        ({"pretrained": "facebook/wav2vec2-base"}, "(on no hub|cannot be asked)"),
        ({"pretrained": "no/such/file.pth"}, "does not exist"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        encoder(**options)
    assert "\n" not in str(caught.value)
