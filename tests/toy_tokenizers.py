"""Tokenizers of every common build, trained in code on a few sentences, each with a real family's chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mllm_factory.template import TEMPLATES

CORPUS = [
    "What is the colour of the shape in this picture? The shape is blue, I think.",
    "Describe the image. There are two circles and a red rectangle: nothing else!",
    "You are a helpful assistant. Hello there, how are you? Fine, thanks. USER ASSISTANT",
    "Ça va? Été 2024 - naïve café, 10 000 items\nsecond line\n\nthird line",
] * 4

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (  # the thinking block stands before the last answer only, and there is a default system message
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _finish(
    raw: Tokenizer, template: str | None, added: tuple[AddedToken, ...] = (), **special: str
) -> PreTrainedTokenizerFast:
    raw.add_tokens(list(added))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = template
    return tokenizer


def byte_level(
    template: str | None, special: list[str], added: tuple[AddedToken, ...] = (), **names: str
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Qwen, SmolLM and Llama 3."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return _finish(raw, template, added, **names)


def metaspace(template: str | None, special: list[str], scheme: str, **names: str) -> PreTrainedTokenizerFast:
    """BPE behind sentencepiece's blanks. ``scheme``: first or always (Metaspace), or legacy (Llama's old normalizer)."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "legacy":
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    raw.train_from_iterator([word for line in CORPUS for word in line.split()], trainer)
    built = json.loads(raw.to_str())
    for i in range(256):  # what no merge covers, as bytes; ordinary entries of the vocabulary, not added tokens
        built["model"]["vocab"].setdefault(f"<0x{i:02X}>", len(built["model"]["vocab"]))
    return _finish(Tokenizer.from_str(json.dumps(built)), template, **names)


def wordpiece(template: str | None, special: list[str], **names: str) -> PreTrainedTokenizerFast:
    """WordPiece over words and punctuation, as BERT (cased): blanks are lost."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", *special], show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    return _finish(raw, template, unk_token="[UNK]", **names)


BUILDERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes-chatml": lambda: byte_level(TEMPLATES["chatml"], ["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>"),
    "bytes-zephyr": lambda: byte_level(ZEPHYR, ["</s>", "<s>"], eos_token="</s>", bos_token="<s>"),
    "bytes-vicuna": lambda: byte_level(TEMPLATES["vicuna"], ["<s>", "</s>"], eos_token="</s>", bos_token="<s>"),
    "bytes-phi3": lambda: byte_level(
        PHI3,
        ["<|endoftext|>"],
        tuple(AddedToken(f"<|{w}|>", rstrip=True, special=True) for w in ("system", "user", "assistant", "end")),
        eos_token="<|endoftext|>",
    ),
    "bytes-qwen3": lambda: byte_level(
        QWEN3,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        tuple(AddedToken(w, special=False, normalized=False) for w in ("<think>", "</think>")),
        eos_token="<|im_end|>",
    ),
    "first-llama2": lambda: metaspace(LLAMA2, ["<unk>", "<s>", "</s>"], "first", bos_token="<s>", eos_token="</s>"),
    "always-llama2": lambda: metaspace(LLAMA2, ["<unk>", "<s>", "</s>"], "always", bos_token="<s>", eos_token="</s>"),
    "legacy-llama2": lambda: metaspace(LLAMA2, ["<unk>", "<s>", "</s>"], "legacy", bos_token="<s>", eos_token="</s>"),
    "legacy-vicuna": lambda: metaspace(
        TEMPLATES["vicuna"], ["<unk>", "<s>", "</s>"], "legacy", bos_token="<s>", eos_token="</s>"
    ),
    "first-gemma": lambda: metaspace(
        GEMMA,
        ["<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "first",
        bos_token="<bos>",
        eos_token="<eos>",
    ),
    "words-vicuna": lambda: wordpiece(TEMPLATES["vicuna"], ["[BOS]", "[EOS]"], bos_token="[BOS]", eos_token="[EOS]"),
    "bytes-plain": lambda: byte_level(TEMPLATES["plain"], ["<s>", "</s>"], eos_token="</s>", bos_token="<s>"),
}
"""Named after how they tokenise and whose template they carry."""


@cache
def toy(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of that name; built once, shared by all tests."""
    return BUILDERS[name]()
