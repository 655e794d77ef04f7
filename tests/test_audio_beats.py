"""The beats encoder against the package openbeats used directly: spectrogram, features, weights; and its refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from mllm_factory import ConfigError, Encoder, build
from mllm_factory.components.encoders import beats
from mllm_factory.weightless import weightless

beats_encoder = pytest.importorskip("openbeats.beats_encoder")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
NODE: dict[str, Any] = {
    "name": "beats",
    **yaml.safe_load((Path(__file__).parent / "cheap" / "beats.yaml").read_text()),
}
CFG = {  # as the authors' files state it
    **{"encoder_layers": 12, "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072, "encoder_attention_heads": 12},
    **{"activation_fn": "gelu", "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
    **{"encoder_layerdrop": 0.0, "dropout_input": 0.0, "layer_norm_first": False, "conv_bias": False, "conv_pos": 128},
    **{"conv_pos_groups": 16, "relative_position_embedding": True, "num_buckets": 320, "max_distance": 800},
    **{"gru_rel_pos": True, "deep_norm": True, "input_patch_size": 16, "layer_wise_gradient_decay_ratio": 0.6},
    **{"embed_dim": 512, "finetuned_model": False, "predictor_dropout": 0.0, "predictor_class": 527},
}


def encoder(**options: Any) -> Any:
    torch.manual_seed(0)
    return build(Encoder, {**NODE, **options}).eval()


def plain(**cfg: Any) -> Any:
    """The package's own encoder of the small sizes, of other random weights, its norms off one."""
    torch.manual_seed(5)
    model = beats_encoder.BeatsEncoder(0, beats_config={**CFG, **NODE["sizes"], **cfg}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for padding in (model.patch_embedding_pad, model.raw2fbank_pad):
        beats_encoder.freeze_conv_module(padding)
    return model


def save(model: Any, file: Path, **cfg: Any) -> Path:
    """As the authors save it."""
    torch.save({"cfg": {**CFG, **NODE["sizes"], **cfg}, "model": model.state_dict()}, file)
    return file


def waves(count: int, seconds: float = 0.5) -> Tensor:
    return 0.2 * torch.randn(count, round(16000 * seconds), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [-1, 0])
@pytest.mark.parametrize("cfg", [{}, {"layer_norm_first": True, "deep_norm": False}], ids=["post", "pre"])
def test_features_are_those_of_the_package(layer: int, cfg: dict[str, Any], tmp_path: Path) -> None:
    theirs, given = plain(**cfg), waves(3)
    ours = encoder(
        layer=layer, sizes={**NODE["sizes"], **cfg}, pretrained=str(save(theirs, tmp_path / "beats.pt", **cfg))
    )
    seen: list[Tensor] = []
    theirs.encoder.layers[0].register_forward_hook(lambda module, given, out: seen.append(out[0].transpose(0, 1)))
    with torch.no_grad():
        expected, lengths, _ = theirs(given, torch.full((3,), given.shape[1]))
        expected = seen[0] if layer == 0 else expected
        items = torch.cat([ours.transform((wave[None], 16000)) for wave in given])
        torch.testing.assert_close(ours(items), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(items[1:2]), expected[1:2], atol=1e-4, rtol=1e-4)
    assert (ours.num_tokens, ours.dim) == tuple(expected.shape[1:]) == (3 * 8, 16)
    assert set(lengths.tolist()) == {24}
    assert len(ours.model.encoder.layers) == (1 if layer == 0 else 2)


def test_frames_are_those_of_the_package() -> None:
    ours, given = encoder(), waves(2)
    theirs = beats_encoder.beats_frontend(given, ours._mean, ours._scale / 2)
    items = torch.cat([ours.transform((wave[None], 16000)) for wave in given])
    torch.testing.assert_close((items - ours._mean) / ours._scale, theirs, atol=1e-5, rtol=1e-5)


def test_a_file_of_espnet_and_a_bare_one_do_too(tmp_path: Path) -> None:
    model = plain()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(
        {f"encoder.{k}": v for k, v in state.items()} | {"decoder.linear_out.weight": torch.zeros(2, 2)},
        tmp_path / "a.pth",
    )
    save_file(state, tmp_path / "b.safetensors")
    found = [encoder(pretrained=str(file)).state_dict() for file in (tmp_path / "a.pth", tmp_path / "b.safetensors")]
    found.append(encoder(pretrained=str(save(model, tmp_path / "c.pt"))).state_dict())
    assert all(torch.equal(value, other[name]) for other in found[1:] for name, value in found[0].items())
    g = "model.encoder.pos_conv.0.parametrizations.weight.original0"
    assert torch.equal(found[0][g], state["encoder.pos_conv.0.weight_g"])


def test_sizes_that_the_file_contradicts_are_named(tmp_path: Path) -> None:
    file = save(plain(), tmp_path / "beats.pt", deep_norm=False, dropout=0.3)
    with pytest.raises(ConfigError, match=r"was made with deep_norm False, not True; set sizes.deep_norm: False"):
        encoder(pretrained=str(file))
    save(plain(encoder_layers=1), file)
    with pytest.raises(ConfigError, match="does not fit by name"):
        encoder(pretrained=str(file))


def test_the_released_size_on_the_meta_device() -> None:
    with weightless():
        part = encoder(sizes=None, seconds=10.0)
        with beats._CopiesStayOnMeta():
            theirs = sum(p.numel() for p in beats_encoder.BeatsEncoder(0, beats_config=CFG).parameters())
        assert part(torch.empty(2, 998, 128)).shape == (2, 496, 768)
    assert (part.num_tokens, part.dim) == (62 * 8, 768)
    assert sum(p.numel() for p in part.parameters()) == theirs - 16 * 16 - 400  # without what measures padding


def test_all_learns_and_a_copy_is_a_copy() -> None:
    for layer in (-1, 0):
        part = encoder(layer=layer, sizes={**NODE["sizes"], "layer_norm_first": True, "deep_norm": False}).train()
        part(part.transform((waves(1), 16000))).square().sum().backward()
        assert [name for name, p in part.named_parameters() if p.grad is None] == []
        assert all(p.requires_grad for p in part.parameters())
        other = copy.deepcopy(part)
        assert other.state_dict().keys() == part.state_dict().keys()


def test_silence_and_tiny_recordings_give_numbers() -> None:
    part = encoder()
    for wave in (torch.zeros(8, 5000), torch.ones(1, 1), torch.zeros(1, 16000)):
        assert part(part.transform((wave, 96000))).isfinite().all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sizes": {"encoder_layer": 2}}, "sizes: BEATs has no 'encoder_layer'; did you mean 'encoder_layers'"),
        ({"sizes": {"layer_wise_gradient_decay_ratio": 0.6}}, "BEATs has no 'layer_wise_gradient_decay_ratio'"),
        ({"sizes": {"encoder_attention_heads": 7}}, "sizes: they do not fit together"),
        ({"sizes": {"encoder_layers": 0}}, "0 layers are none"),
        ({"sizes": {"fbank_std": 0.0}}, "fbank_std: 0.0 scales nothing"),
        ({"layer": 2}, r"layer: 2 is out of range, 'beats' has 2 layers"),
        ({"seconds": 0.1}, "seconds: 0.1 s hold no patch of 16 frames"),
        ({"pretrained": "espnet/OpenBEATS-Large-i2"}, "(is no local file|cannot be asked)"),
        ({"pretrained": "no/such/file.pt"}, "does not exist"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        encoder(**options)
    assert "\n" not in str(caught.value)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beats, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="beats: the package openbeats, .* is not installed; pip install openbeats"):
        encoder()
