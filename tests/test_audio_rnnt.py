"""The rnnt encoder against torchaudio used directly: spectrogram, frames, weights, statistics; and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torchaudio
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torchaudio.models.rnnt import RNNT
from torchaudio.pipelines import rnnt_pipeline

from mllm_factory import ConfigError, Encoder, MultimodalModel, Tuning, build
from mllm_factory.weightless import weightless

EMFORMER: dict[str, Any] = {
    "name": "rnnt",
    **yaml.safe_load((Path(__file__).parent / "cheap" / "rnnt.yaml").read_text()),
}
CONFORMER: dict[str, Any] = {
    **{"name": "rnnt", "architecture": "conformer_rnnt_base", "seconds": 0.5},
    "sizes": {
        **{"input_dim": 20, "encoding_dim": 12, "conformer_input_dim": 16, "conformer_ffn_dim": 24},
        **{"conformer_num_layers": 2, "conformer_depthwise_conv_kernel_size": 5},
    },
}
REST = {
    **{"num_symbols": 7, "symbol_embedding_dim": 4, "num_lstm_layers": 1, "lstm_layer_norm": True},
    **{"lstm_layer_norm_epsilon": 1e-3, "lstm_dropout": 0.0},
}
STATISTICS = {"mean": [0.1 * i for i in range(20)], "invstddev": [1 / (1 + 0.2 * i) for i in range(20)]}


def encoder(node: dict[str, Any] = EMFORMER, **options: Any) -> Any:
    torch.manual_seed(0)
    return build(Encoder, {**node, **options}).eval()


def recogniser(**sizes: Any) -> RNNT:
    """torchaudio's own model of the small sizes, of other random weights."""
    torch.manual_seed(5)
    values = {**encoder().recipe.sizes, **EMFORMER["sizes"], **sizes}
    return torchaudio.models.emformer_rnnt_model(**values, **REST).eval()


def waves(count: int, seconds: float = 0.5) -> Tensor:
    return 0.2 * torch.randn(count, round(16000 * seconds), generator=torch.Generator().manual_seed(1))


def their_features(wave: Tensor) -> Tensor:
    """[time] -> [frames, 20]: the stages of torchaudio's pipeline, which downloads its statistics."""
    mel = torchaudio.transforms.MelSpectrogram(sample_rate=16000, n_fft=400, n_mels=20, hop_length=160)
    x = rnnt_pipeline._piecewise_linear_log(mel(wave).transpose(1, 0) * rnnt_pipeline._gain)
    return (x - torch.tensor(STATISTICS["mean"])) * torch.tensor(STATISTICS["invstddev"])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a whole recogniser and the statistics of its training data, as torchaudio's recipe writes them."""
    torch.save(recogniser().state_dict(), tmp_path / "emformer.pt")
    (tmp_path / "global_stats.json").write_text(json.dumps(STATISTICS))
    return tmp_path


# ---------------------------------------------------------------- against torchaudio


def test_tokens_are_those_of_torchaudios_recogniser(saved: Path) -> None:
    """Three recordings at once, with the padding that its pipeline puts behind them."""
    ours, theirs, given = encoder(pretrained=str(saved)), recogniser(), waves(3)
    features = torch.stack([torch.nn.functional.pad(their_features(wave), (0, 0, 0, 4)) for wave in given])
    with torch.no_grad():
        expected, _ = theirs.transcribe(features, torch.full((3,), features.shape[1]))
        items = torch.cat([ours.transform((wave[None], 16000)) for wave in given])
        torch.testing.assert_close((items - ours.mean) * ours.invstddev, features[:, :-4], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(items), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(items[1:2]), expected[1:2], atol=1e-4, rtol=1e-4)
    assert (ours.num_tokens, ours.dim) == tuple(expected.shape[1:])


def test_a_layer_is_the_recognisers_own(saved: Path) -> None:
    ours, theirs = encoder(pretrained=str(saved), layer=0), recogniser()
    seen: list[Tensor] = []
    theirs.transcriber.transformer.emformer_layers[0].register_forward_hook(lambda m, a, out: seen.append(out[0]))
    items = ours.transform((waves(1), 16000))
    features = torch.nn.functional.pad(their_features(waves(1)[0]), (0, 0, 0, 4))[None]
    with torch.no_grad():
        theirs.transcribe(features, torch.tensor([features.shape[1]]))
        torch.testing.assert_close(ours(items), seen[0].transpose(0, 1), atol=1e-4, rtol=1e-4)
    assert ours.dim == 16  # four frames of width 4
    assert not [
        name for name in ours.state_dict() if "layers.1" in name or "output_linear" in name or "layer_norm.w" in name
    ]


def test_conformer_is_torchaudios() -> None:
    ours = encoder(CONFORMER)
    items = torch.randn(3, 51, 20)
    with torch.no_grad():
        x = ours.model.input_linear(items[:, :48].unflatten(1, (12, 4)).flatten(2))
        x, _ = ours.model.conformer(x, torch.full((3,), 12))
        torch.testing.assert_close(
            ours(items), ours.model.layer_norm(ours.model.output_linear(x)), atol=1e-5, rtol=1e-5
        )
    assert (ours.num_tokens, ours.dim) == (12, 12)
    first = encoder(CONFORMER, layer=0)
    assert (first.num_tokens, first.dim) == (12, 16)


def test_the_models_of_full_size_have_torchaudios_tensors() -> None:
    with weightless():
        ours = encoder(architecture="emformer_rnnt_base", sizes=None, seconds=10.0)
        theirs = torchaudio.models.emformer_rnnt_base(4097).transcriber
        conformer = encoder({"name": "rnnt", "architecture": "conformer_rnnt_base", "seconds": 10.0})
        empty = torch.empty(2, 1001, 80)
        assert ours(empty).shape == conformer(empty).shape == (2, 250, 1024)
    assert {k: v.shape for k, v in ours.model.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert (ours.num_tokens, ours.dim) == (conformer.num_tokens, conformer.dim) == (250, 1024)


# ---------------------------------------------------------------- invariance


def test_silence_behind_a_recording_changes_no_token_of_emformer() -> None:
    """Windows of one and of two seconds: the tokens whose segment and look-ahead lie within the recording are the same."""
    wave = waves(1, 0.9)
    short, long = encoder(seconds=1.0), encoder(seconds=2.0)
    with torch.no_grad():
        one, two = (part(part.transform((wave, 16000)))[0] for part in (short, long))
    assert (len(one), len(two)) == (25, 50)
    torch.testing.assert_close(one[:20], two[:20])  # five segments of 160 ms, and 40 ms behind them
    assert not torch.allclose(one[20:], two[20:25], atol=1e-4)  # padding of torchaudio against silence


def test_sound_that_comes_later_changes_no_token_of_emformer() -> None:
    part, wave = encoder(seconds=1.0), waves(1, 1.0)
    other = wave.clone()
    other[:, 12000:] *= 3
    with torch.no_grad():
        one, two = (part(part.transform((w, 16000)))[0] for w in (wave, other))
    torch.testing.assert_close(one[:16], two[:16])
    assert not torch.allclose(one[16:], two[16:], atol=1e-3)


@pytest.mark.parametrize("node", [EMFORMER, CONFORMER], ids=["emformer", "conformer"])
def test_each_item_has_a_dropout_of_its_own_and_all_learns(node: dict[str, Any]) -> None:
    part = encoder(node).train()
    items = part.transform((waves(1), 16000)).repeat(2, 1, 1)
    found = part(items)
    assert not torch.equal(found[0], found[1])
    found.square().sum().backward()
    assert [name for name, p in part.named_parameters() if p.grad is None] == []
    part.eval()
    torch.testing.assert_close(part(items)[0], part(items)[1])


@pytest.mark.parametrize("node", [EMFORMER, CONFORMER], ids=["emformer", "conformer"])
@pytest.mark.parametrize(
    "strategy", [{"name": "lora", "rank": 2}, {"name": "adapter", "width": 2}], ids=["lora", "adapter"]
)
def test_what_a_strategy_inserts_learns_under_the_pass_over_all_items(
    node: dict[str, Any], strategy: dict[str, Any]
) -> None:
    part = encoder(node)
    items = part.transform((waves(1), 16000)).repeat(2, 1, 1)
    plain = part(items)
    tuned = build(Tuning, strategy)
    tuned.apply(part, cast(MultimodalModel, None))  # it looks at the part alone
    torch.testing.assert_close(part(items), plain)
    assert any("emb_to_query" in name or "ffn1" in name for name in tuned.resolved)
    part(items).square().sum().backward()
    assert [name for name, p in part.named_parameters() if p.requires_grad and p.grad is None] == []


def test_silence_and_tiny_recordings_give_numbers() -> None:
    part = encoder()
    for wave in (torch.zeros(8, 5000), torch.ones(1, 1), torch.zeros(1, 16000)):
        assert part(part.transform((wave, 96000))).isfinite().all()


# ---------------------------------------------------------------- weights


def test_the_file_of_a_transcriber_alone_does_too(saved: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    save_file(recogniser().transcriber.state_dict(), alone / "weights.safetensors")
    (alone / "global_stats_mine.json").write_text(json.dumps(STATISTICS))
    one, other = encoder(pretrained=str(alone / "weights.safetensors")), encoder(pretrained=str(saved / "emformer.pt"))
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    assert one.mean.tolist() == pytest.approx(STATISTICS["mean"])
    assert encoder().invstddev.tolist() == [1.0] * 20


def test_the_bundle_lies_where_torchaudio_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    bundle = torchaudio.pipelines.EMFORMER_RNNT_BASE_LIBRISPEECH
    with pytest.raises(ConfigError, match=r"emformer_rnnt_base_librispeech\.pt cannot be had .* put it at"):
        encoder(pretrained="bundle")
    with weightless():
        awaited = encoder(pretrained="bundle").absent
    assert awaited.startswith(
        "bundle is not on this machine; the first run downloads https://download.pytorch.org/torchaudio/"
    )
    for place, write in (
        (bundle._rnnt_path, lambda file: torch.save(recogniser().state_dict(), file)),
        (bundle._global_stats_path, lambda file: file.write_text(json.dumps(STATISTICS))),
    ):
        file = tmp_path / "hub" / "torchaudio" / place
        assert str(file) in awaited
        file.parent.mkdir(parents=True)
        write(file)
        assert torchaudio.utils._download_asset(place) == str(file)
    with weightless():
        assert encoder(pretrained="bundle").absent is None
    state = recogniser().transcriber.state_dict()
    found = encoder(pretrained="bundle")
    assert all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())
    assert found.mean.tolist() == pytest.approx(STATISTICS["mean"])


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({}, r"0 files global_stats\*\.json lie beside .*emformer\.pt"),
        ({"global_stats.json": "{}", "global_stats_2.json": "{}"}, "2 files"),
        ({"global_stats.json": "{"}, "holds no mean and invstddev"),
        ({"global_stats.json": '{"mean": [1.0]}'}, "holds no mean and invstddev .KeyError"),
        ({"global_stats.json": '{"mean": [1.0], "invstddev": [1.0]}'}, "no lists of 20 numbers"),
    ],
)
def test_statistics_that_do_not_fit(saved: Path, written: dict[str, str], says: str) -> None:
    (saved / "global_stats.json").unlink()
    for name, text in written.items():
        (saved / name).write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        encoder(pretrained=str(saved))
    assert "\n" not in str(caught.value)


def test_weights_of_another_architecture_are_refused(saved: Path) -> None:
    torch.save(recogniser(transformer_num_layers=1).state_dict(), saved / "emformer.pt")
    with pytest.raises(ConfigError, match="does not fit by name"):
        encoder(pretrained=str(saved))
    with pytest.raises(ConfigError, match="does not fit by name"):
        encoder(CONFORMER, pretrained=str(saved))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "emformer_rnnt"}, "did you mean 'emformer_rnnt_base'"),
        ({"sizes": {"num_layers": 2}}, "has no 'num_layers'; did you mean"),
        ({"sizes": {**EMFORMER["sizes"], "transformer_num_heads": 3}}, "sizes: they do not fit together"),
        ({"sizes": {"transformer_num_layers": 0}}, "0 layers are none"),
        ({"sizes": {"input_dim": 0}}, "0 bands hold no sound"),
        ({"layer": 2}, r"layer: 2 is out of range, 'emformer_rnnt_base' has 2 layers"),
        ({"seconds": 0.01}, "seconds: 0.01 s hold no frame"),
        ({"seconds": 0.02}, "seconds: 0.02 s"),
        ({"pretrained": "org/emformer"}, "(on no hub|cannot be asked)"),
        ({"pretrained": "no/such/file.pt"}, "does not exist"),
        ({**CONFORMER, "pretrained": "bundle"}, "offers no weights of 'conformer_rnnt_base'"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        encoder(**options)
    assert "\n" not in str(caught.value)
