"""Labels of the families' own chat templates: what is learnt is exactly each answer and the token that ends it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import AddedToken
from toy_tokenizers import ZEPHYR, byte_level, metaspace
from transformers import PreTrainedTokenizerFast

from mllm_factory.template import TEMPLATES, ChatTemplate, Text
from mllm_factory.types import Message

LLAMA3 = (  # a system block that is always there, with dates; texts are trimmed
    "{{ bos_token }}{% set first = messages[0]['role'] == 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' }}"
    "{% if first %}{{ messages[0]['content'] | trim }}{% endif %}{{ '<|eot_id|>' }}"
    "{% for m in messages[1:] if first %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% for m in messages if not first %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN25 = (  # a default system turn, no newline rule of its own for the last turn
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OLMO2 = (  # role marks are ordinary text; begin and end are one token; a newline only between turns
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + m['content'] + eos_token + ('' if loop.last else '\n') }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
STABLELM2 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CONTROL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def one_token(template: str) -> PreTrainedTokenizerFast:
    """Begin and end are the same token, as in GPT-2 and its heirs."""
    return byte_level(template, ["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>")


FAMILIES: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "llama_3_2": (
        lambda: byte_level(LLAMA3, CONTROL, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
        "<|eot_id|>",
    ),
    "qwen2_5": (
        lambda: byte_level(QWEN25, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>"),
        "<|im_end|>",
    ),
    "olmo2": (lambda: one_token(OLMO2), "<|endoftext|>"),
    "stablelm_2": (lambda: one_token(STABLELM2), "<|endoftext|>"),
    "tinyllama": (  # Zephyr's turns behind sentencepiece's blanks
        lambda: metaspace(ZEPHYR, ["<unk>", "<s>", "</s>"], "legacy", bos_token="<s>", eos_token="</s>"),
        "</s>",
    ),
    "phi_2": (lambda: one_token(TEMPLATES["vicuna"]), "<|endoftext|>"),
    "gpt2": (lambda: one_token(TEMPLATES["plain"]), "<|endoftext|>"),
    "opt": (
        lambda: byte_level(
            TEMPLATES["plain"], ["</s>", "<pad>"], bos_token="</s>", eos_token="</s>", pad_token="<pad>"
        ),
        "</s>",
    ),
    "smollm2": (
        lambda: byte_level(
            QWEN25,
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            (AddedToken("<repo_name>", special=True),),
            eos_token="<|im_end|>",
        ),
        "<|im_end|>",
    ),
}
TALK = [
    Message("user", "What is the colour of the shape?"),
    Message("assistant", "The shape is blue, I think."),
    Message("user", "<|assistant|>\nASSISTANT: no\n\nand the second line?"),
    Message("assistant", "Two circles:\n\na red rectangle (10 000 items)!"),
]


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerFast, str]:
    make, end = FAMILIES[request.param]
    return make(), end


@pytest.mark.parametrize("system", [False, True])
def test_labels_decode_to_the_answers_and_their_end(family: tuple[PreTrainedTokenizerFast, str], system: bool) -> None:
    tokenizer, end = family
    template = ChatTemplate(tokenizer)
    talk = [Message("system", "You are a helpful assistant."), *TALK] if system else TALK
    segments = [segment for segment in template.encode(talk) if isinstance(segment, Text)]
    learnt = [str(tokenizer.decode(segment.ids)).lstrip() for segment in segments if segment.labelled]
    assert learnt == [talk[-3].text + end, talk[-1].text + end]
    assert template.end_token == end
    assert template.stop_ids[0] == tokenizer.convert_tokens_to_ids(end)
    assert all(segment.ids[-1] == template.stop_ids[0] for segment in segments if segment.labelled)


def test_the_tokens_are_those_of_the_rendered_talk(family: tuple[PreTrainedTokenizerFast, str]) -> None:
    tokenizer, _ = family
    harmless = [Message(m.role, m.text.replace("<|assistant|>\n", "")) for m in TALK]
    chat = [{"role": m.role, "content": m.text} for m in harmless]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    ids = [i for segment in ChatTemplate(tokenizer).encode(harmless) if isinstance(segment, Text) for i in segment.ids]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_prompt_is_what_training_puts_before_the_answer(family: tuple[PreTrainedTokenizerFast, str]) -> None:
    tokenizer, _ = family
    template = ChatTemplate(tokenizer)
    whole = [segment for segment in template.encode(TALK) if isinstance(segment, Text)]
    last = [i for i, segment in enumerate(whole) if segment.labelled][-1]
    before = [i for segment in whole[:last] for i in segment.ids]
    prompt = [i for s in template.encode(TALK[:-1], generation_prompt=True) if isinstance(s, Text) for i in s.ids]
    assert prompt == before
