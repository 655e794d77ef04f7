"""The model of an ``hf`` backbone: its config from options or from weights, both compared, each option checked against transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mllm_factory import hint, locate, on_meta, one_line, quiet
from mllm_factory.components.backbones.gguf_cache import dequantised, gguf_in

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
AWAY = "correct it, or take everything from the weights: architecture: null, sizes: {}"


# ---------------------------------------------------------------- options


def checked_dtype(name: str) -> torch.dtype:
    """The torch type of that name, or ValueError."""
    if name not in DTYPES:
        raise ValueError(f"dtype: '{name}'{hint(name, DTYPES)}")
    return DTYPES[name]


def checked_attention(name: str | None) -> str | None:
    """The name of an attention kernel that transformers knows, or ValueError; None is its own choice."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key)]
    if name is not None and name not in known:
        raise ValueError(f"attention: '{name}'{hint(name, known)}")
    return name


def check_choice(architecture: str | None, sizes: dict[str, Any], pretrained: str | None) -> None:
    """ValueError where the three options together say nothing that can be built."""
    if architecture is None and pretrained is None:
        raise ValueError(
            "architecture: null means that of the pretrained weights, and pretrained is null too; give one of them"
        )
    if architecture is None and sizes:
        raise ValueError("sizes: they belong to an architecture; name it, or remove them (sizes: {})")


def find_source(pretrained: str) -> Path | str:
    """A transformers folder, de-quantised first where it is a GGUF file, or a hub id."""
    found = locate(pretrained)
    if isinstance(found, str):
        return found
    file = gguf_in(found)
    if file is None and not found.is_dir():
        raise ValueError(f"pretrained: {found} is no GGUF file; give the folder that holds config.json and the weights")
    return found if file is None else dequantised(file)


# ---------------------------------------------------------------- config


def new_config(
    architecture: str, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerBase, fixed: bool
) -> PretrainedConfig:
    """The config that the options describe; special tokens are the tokenizer's.

    Args:
        architecture: model type of transformers.
        sizes: values of its config; ``vocab_size`` is at least the tokenizer's length, or exactly this where ``fixed``.
        tokenizer: gives the special tokens, and the vocabulary where ``sizes`` has none.
        fixed: True where weights of that vocabulary belong to it.

    Raises:
        ValueError: transformers has no such architecture, its config no such value, or the values do not fit together.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if architecture not in KNOWN:
        near = _near(architecture, KNOWN)
        raise ValueError(f"architecture: transformers has no causal language model '{architecture}'{near}")
    config_class: Any = CONFIG_MAPPING[architecture]
    _check_sizes(sizes, architecture, config_class)
    rows = sizes.get("vocab_size", len(tokenizer))
    vocabulary = rows if fixed or not isinstance(rows, int) else max(rows, len(tokenizer))
    end = tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    start = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id  # some configs refuse None
    ids = dict(zip(IDS, (tokenizer.pad_token_id, start, end), strict=True))
    try:
        return config_class(**{**sizes, **ids, "vocab_size": vocabulary})
    except Exception as error:
        raise ValueError(_unbuildable(architecture, error)) from error


def _check_sizes(sizes: dict[str, Any], architecture: str, config: type[PretrainedConfig]) -> None:
    """Refuse what transformers would swallow: values its config does not know."""
    known = {*config().to_dict(), *config.attribute_map} - {*IDS, "model_type"}
    for name in sizes:
        if name in IDS:
            raise ValueError(f"sizes: '{name}' follows from the tokenizer; remove it")
        if name not in known:
            raise ValueError(f"sizes: the config of '{architecture}' has no '{name}'{_near(name, known)}")


def read_config(source: Path | str) -> PretrainedConfig:
    """The config that comes with weights; ValueError where there is none that transformers can read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, local_files_only=isinstance(source, Path))
    except Exception as error:
        raise ValueError(f"pretrained: {source} cannot be loaded ({one_line(error, 300, kind=True)})") from error


def require_same(given: PretrainedConfig, sizes: dict[str, Any], found: PretrainedConfig, source: Path | str) -> None:
    """Refuse weights of another model than the options describe.

    Compared are the architecture, every value of ``sizes``, and, for values that only one side names, the shapes of all tensors.

    Raises:
        ValueError: names the first difference.
    """
    if given.model_type != found.model_type:
        raise ValueError(
            f"architecture: '{given.model_type}' here but '{found.model_type}' in {source}; correct it or set it to null"
        )
    for name in sizes:
        ours, theirs = getattr(given, name), getattr(found, name, None)
        if not _agree(ours, theirs):
            raise ValueError(f"sizes: {name} is {ours} here but {theirs} in {source}; {AWAY}")
    if "vocab_size" not in sizes:
        given.vocab_size = found.vocab_size
    ours, theirs = _shapes(given), _shapes(found)
    for name in dict.fromkeys([*theirs, *ours]):
        if ours.get(name) != theirs.get(name):
            here, there = (str(list(s[name])) if name in s else "missing" for s in (ours, theirs))
            raise ValueError(f"sizes: they leave tensor {name} {here} here but {there} in {source}; {AWAY}")


def _agree(ours: Any, theirs: Any) -> bool:
    """Equality, but for floats in the last digits (GGUF rounds them) and for keys of mappings that only the weights have."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return all(_agree(ours[key], theirs.get(key)) for key in ours)
    if isinstance(ours, float) and isinstance(theirs, float | int):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return bool(ours == theirs)


def _shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    with torch.device("meta"), quiet():
        return {name: value.shape for name, value in _empty(config).named_parameters()}


# ---------------------------------------------------------------- model


def make_model(
    architecture: str | None,
    sizes: dict[str, Any],
    source: Path | str | None,
    tokenizer: PreTrainedTokenizerBase,
    **options: Any,
) -> PreTrainedModel:
    """The model with the weights of ``source``, or with random ones where that is None.

    On the meta device no weights are read, and an ``architecture`` is enough to build from: a hub is never asked.

    Args:
        architecture, sizes: what the options describe, or None and nothing.
        source: folder or hub id of the weights.
        tokenizer: for the vocabulary and the special tokens of a model from options.
        options: dtype and attention kernel, as transformers takes them.

    Raises:
        ValueError: unknown values, values that do not fit together or to the weights, or weights that cannot be read.
    """
    given = None if architecture is None else new_config(architecture, sizes, tokenizer, source is not None)
    asked = source is not None and not (on_meta() and given is not None and isinstance(source, str))
    found = read_config(source) if source is not None and asked else None
    if given is not None and found is not None and source is not None:
        require_same(given, sizes, found, source)
    if source is not None and not on_meta():
        return _load(source, **options)
    config = found or given
    if config is None:
        raise ValueError("architecture: null needs pretrained weights to read it from")
    try:
        return _empty(config, **options)
    except Exception as error:
        raise ValueError(_kernel(error, options) or _unbuildable(config.model_type, error)) from error


def _empty(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, **options)


def _load(source: Path | str, **options: Any) -> PreTrainedModel:
    """The model with its weights; ValueError where they cannot be read or leave tensors unfilled."""
    from transformers import AutoModelForCausalLM

    local = isinstance(source, Path)
    with quiet() if local else nullcontext():  # a download shows its progress
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, local_files_only=local, output_loading_info=True, **options
            )
        except Exception as error:
            refused = (
                _kernel(error, options) or f"pretrained: {source} cannot be loaded ({one_line(error, 300, kind=True)})"
            )
            raise ValueError(refused) from error
    model, report = loaded
    lacking = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if lacking:
        what = f"{len(lacking)} tensors of {type(model).__name__}, such as {lacking[0]}"
        raise ValueError(f"pretrained: {source} does not fill {what}; is it a causal language model?")
    return model


# ---------------------------------------------------------------- words


def _near(word: str, known: Iterable[str]) -> str:
    return hint(word, known).partition(" known:")[0].rstrip(";")  # the whole list would be hundreds of words


def _unbuildable(architecture: str, error: Exception) -> str:
    return f"architecture: '{architecture}' cannot be built with these sizes ({one_line(error, 300, kind=True)})"


def _kernel(error: Exception, options: dict[str, Any]) -> str | None:
    """A message about an attention kernel that was asked for by name and that this model or machine does not have."""
    kernel, text = options["attn_implementation"], re.sub("[ _]", "", str(error).lower())
    words = ("attentionimplementation", "attnimplementation", str(kernel).replace("_", ""))
    if kernel is None or not any(word in text for word in words):
        return None
    reason = one_line(error).partition(". ")[0][:160]
    return f"attention: no '{kernel}' for this model here ({reason}); set attention: null for the best one it has"
