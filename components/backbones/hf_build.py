"""What an ``hf`` backbone is made of: its tokenizer and its model, each option checked against what transformers knows."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mllm_factory import hint, locate, on_meta
from mllm_factory.components.backbones.byte_tokenizer import byte_tokenizer
from mllm_factory.components.backbones.gguf_cache import dequantised, gguf_in
from mllm_factory.components.backbones.quiet import quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FROM_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")


def checked_dtype(name: str) -> torch.dtype:
    """The torch type of that name, or ValueError."""
    if name not in DTYPES:
        raise ValueError(f"dtype: '{name}'{hint(name, DTYPES)}")
    return DTYPES[name]


def checked_attention(name: str) -> str:
    """The name of an attention kernel that transformers knows, or ValueError."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key)]
    if name not in known:
        raise ValueError(f"attention: '{name}'{hint(name, known)}")
    return name


def find_source(pretrained: str) -> Path | str:
    """A transformers folder, de-quantised first where it is a GGUF file, or a hub id."""
    found = locate(pretrained)
    if isinstance(found, str):
        return found
    file = gguf_in(found)
    if file is None and not found.is_dir():
        raise ValueError(f"pretrained: {found} is no GGUF file; give the folder that holds config.json and the weights")
    return found if file is None else dequantised(file)


# ---------------------------------------------------------------- tokenizer


def make_tokenizer(name: str | None, source: Path | str | None, template: str | None) -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template and a padding token.

    Raises:
        ValueError: there is none, or it has no template and none is given.
    """
    place = source if name is None else None if name == "bytes" else locate(name)
    if name is None and source is None:
        raise ValueError("tokenizer: random weights come without one; set it to bytes, a local folder or a hub id")
    tokenizer = byte_tokenizer() if place is None else _load_tokenizer(place)
    if template is not None:
        from mllm_factory import resolve_template

        tokenizer.chat_template = resolve_template(template)
    if not tokenizer.chat_template:
        raise ValueError(
            "template: the tokenizer has none of its own; set it to chatml, vicuna, plain or a .jinja file"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer: it has no padding, end or unknown token, so rows cannot be padded; add one to it")
    return tokenizer


def _load_tokenizer(place: Path | str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=isinstance(place, Path))
    except Exception as error:
        raise ValueError(f"tokenizer: none can be loaded from {place} ({_one_line(error)}); set tokenizer") from error


# ---------------------------------------------------------------- model


def load_model(source: Path | str, **options: Any) -> PreTrainedModel:
    """The model with its weights; on the meta device only its architecture.

    Raises:
        ValueError: it cannot be read, or its weights leave tensors unfilled.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    local = isinstance(source, Path)
    with quiet() if local else nullcontext():  # a download shows its progress
        try:
            if on_meta():
                config = AutoConfig.from_pretrained(source, local_files_only=local)
                return AutoModelForCausalLM.from_config(config, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, local_files_only=local, output_loading_info=True, **options
            )
        except Exception as error:
            raise ValueError(f"pretrained: {source} cannot be loaded ({_one_line(error)})") from error
    model, report = loaded
    lacking = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if lacking:
        what = f"{len(lacking)} tensors of {type(model).__name__}, such as {lacking[0]}"
        raise ValueError(f"pretrained: {source} does not fill {what}; is it a causal language model?")
    return model


def new_model(
    architecture: str, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> PreTrainedModel:
    """The architecture with random weights and a vocabulary that fits the tokenizer.

    Raises:
        ValueError: transformers has no such architecture, its config no such value, or the values do not fit together.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if architecture not in KNOWN:
        near = _near(architecture, KNOWN)
        raise ValueError(f"architecture: transformers has no causal language model '{architecture}'{near}")
    config_class: Any = CONFIG_MAPPING[architecture]
    _check_sizes(sizes, architecture, config_class)
    ids = {name: getattr(tokenizer, name) for name in FROM_TOKENIZER[1:]}
    given = {name: value for name, value in ids.items() if value is not None}
    try:
        config = config_class(**sizes, vocab_size=len(tokenizer), **given)
        return AutoModelForCausalLM.from_config(config, **options)
    except Exception as error:
        raise ValueError(
            f"architecture: '{architecture}' cannot be built with these sizes ({_one_line(error)})"
        ) from error


def _check_sizes(sizes: dict[str, Any], architecture: str, config: type[PretrainedConfig]) -> None:
    """Refuse what transformers would swallow: values its config does not know."""
    known = {*config().to_dict(), *config.attribute_map} - set(FROM_TOKENIZER)
    for name in sizes:
        if name in FROM_TOKENIZER:
            raise ValueError(f"sizes: '{name}' follows from the tokenizer; remove it")
        if name not in known:
            raise ValueError(f"sizes: the config of '{architecture}' has no '{name}'{_near(name, known)}")


def _near(word: str, known: Iterable[str]) -> str:
    return hint(word, known).partition(" known:")[0].rstrip(";")  # the whole list would be hundreds of words


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    remedy = "; set attention: eager" if "attn_implementation" in text else ""
    return f"{type(error).__name__}: {text[:300]}{remedy}"
