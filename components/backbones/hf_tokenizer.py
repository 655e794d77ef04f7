"""The tokenizer of an ``hf`` backbone: made in code, from a folder, from the hub, or that of the weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_factory import locate, on_meta, resolve_template
from mllm_factory.components.backbones.byte_tokenizer import byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("mllm_factory")


def make_tokenizer(name: str | None, source: Path | str | None, template: str | None) -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template and a padding token.

    On the meta device the hub is not asked: where a tokenizer would have to be downloaded, the byte tokenizer with a template of its
    own stands in for it, and that is said once. Its texts are longer.

    Raises:
        ValueError: there is none, or it has no template and none is given.
    """
    place = source if name is None else None if name == "bytes" else locate(name)
    if name is None and source is None:
        raise ValueError(
            "tokenizer: null is the one that comes with the pretrained weights, and there are none; "
            "set backbone.tokenizer=bytes (or a folder)"
        )
    text = None if template is None else resolve_template(template)
    if isinstance(place, str) and on_meta():
        log.warning("the tokenizer of %s is not on this machine: texts are counted in bytes", place)
        return byte_tokenizer()
    tokenizer = byte_tokenizer() if place is None else _load(place)
    if text is not None:
        tokenizer.chat_template = text
    if not tokenizer.chat_template:
        raise ValueError(
            "template: the tokenizer has none of its own; set backbone.template to chatml, vicuna, plain or a .jinja file"
        )
    return _with_padding(tokenizer)


def _with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer: it has no padding, end or unknown token, so rows cannot be padded; add one to it")
    return tokenizer


def _load(place: Path | str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=isinstance(place, Path))
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"tokenizer: none can be loaded from {place} ({reason}); set backbone.tokenizer=bytes (or a folder)"
        ) from error
