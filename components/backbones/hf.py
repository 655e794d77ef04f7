"""Any causal language model of transformers as a backbone: from the hub, a folder, a GGUF file, or from scratch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm_factory import Backbone, hint, locate, on_meta, register
from mllm_factory.components.backbones.byte_tokenizer import byte_tokenizer
from mllm_factory.components.backbones.gguf_cache import dequantised, gguf_in
from mllm_factory.components.backbones.quiet import quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FROM_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")


@register("hf")
class HFBackbone(Backbone):
    """A decoder of transformers and its head. Either ``architecture`` or ``pretrained`` says which one.

    Generation is greedy by a loop of its own, so a checkpoint's sampling defaults have no influence. A tokenizer without a
    padding token pads with its end token; padding is masked anyway.

    Args:
        architecture: model type of transformers (``llama``, ``gpt2``, ...) for random weights.
        sizes: config values of that architecture; its vocabulary follows from the tokenizer.
        pretrained: a hub id, a local folder, or ``pkg://package``; a GGUF file is de-quantised once and cached on disk.
        tokenizer: ``bytes`` (one token a byte, made in code), a local folder or a hub id; None for that of ``pretrained``.
        template: chat template: ``chatml``, ``vicuna``, ``plain`` or a ``.jinja`` file; None for the tokenizer's own.
        dtype: of the weights: ``float32``, ``bfloat16`` or ``float16``.
        attention: attention kernel: ``sdpa``, ``eager``, ``flash_attention_2``, ...

    Raises:
        ValueError: an unknown architecture, size, dtype or kernel; both or neither of ``architecture`` and ``pretrained``;
            no tokenizer or no chat template.
    """

    def __init__(
        self,
        architecture: str | None = None,
        sizes: dict[str, Any] | None = None,
        pretrained: str | None = None,
        tokenizer: str | None = None,
        template: str | None = None,
        dtype: str = "float32",
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        options = {"dtype": _dtype(dtype), "attn_implementation": _attention(attention)}
        if (architecture is None) == (pretrained is None):
            raise ValueError("give either architecture (random weights) or pretrained, and set the other to null")
        if pretrained is not None and sizes:
            raise ValueError("sizes: they belong to architecture; with pretrained weights remove them (sizes: {})")
        source = None if pretrained is None else _source(pretrained)
        self.tokenizer = _tokenizer(tokenizer, source, template)
        self.model = (
            _pretrained(source, **options)
            if source is not None
            else _from_scratch(str(architecture), sizes or {}, self.tokenizer, **options)
        )
        if len(self.tokenizer) > self.model.get_input_embeddings().weight.shape[0]:
            raise ValueError(f"tokenizer: it has {len(self.tokenizer)} tokens, more than the model embeds; use the model's own")
        self.dim = self.model.get_input_embeddings().weight.shape[1]
        self.max_positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._layers = _layers_of(self.model)
        self._takes_positions = "position_ids" in inspect.signature(self.model.get_decoder().forward).parameters

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last."""
        return self.model.get_submodule(self._layers)  # type: ignore[return-value] - found as a ModuleList

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]"""
        return self.model.get_input_embeddings()(input_ids)

    def forward(self, embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T, D], [B, T] bool -> hidden states after the final norm [B, T, D]; None means no padding."""
        return self._decode(embeds, attention_mask, use_cache=False).last_hidden_state

    def _decode(self, embeds: Tensor, mask: Tensor | None, **cache: Any) -> Any:
        """One pass through the decoder; positions count the unmasked tokens, so padding may stand on either side."""
        given: dict[str, Any] = {"inputs_embeds": embeds, **cache}
        if mask is not None:
            given["attention_mask"] = mask.long()
            if self._takes_positions:
                given["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        return self.model.get_decoder()(**given)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]"""
        return _finished(self.model.get_output_embeddings()(hidden), self.model.config.get_text_config())

    @torch.no_grad()
    def generate(
        self,
        embeds: Tensor,
        attention_mask: Tensor,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        use_cache: bool = True,
    ) -> Tensor:
        """Greedy continuation of left-padded prompts: [B, T, D], [B, T] -> new token ids [B, <= max_new_tokens].

        A row that met one of ``stop_ids`` is filled up with the padding id after it.
        """
        stops = torch.tensor(list(stop_ids), dtype=torch.long, device=embeds.device)
        done = torch.zeros(len(embeds), dtype=torch.bool, device=embeds.device)
        mask, cache, new = attention_mask.bool(), None, []
        for _ in range(max_new_tokens):
            output = self._decode(embeds, mask, use_cache=use_cache, **({} if cache is None else {"past_key_values": cache}))
            token = self.logits(output.last_hidden_state[:, -1]).argmax(-1).masked_fill(done, self.tokenizer.pad_token_id)
            new.append(token)  # [B]
            done |= torch.isin(token, stops)
            if done.all():
                break
            cache = output.get("past_key_values")
            step = self.embed(token[:, None])  # [B, 1, D]
            embeds = step if cache is not None else torch.cat([embeds, step], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return torch.stack(new, dim=1) if new else attention_mask.new_zeros(len(embeds), 0, dtype=torch.long)


# ---------------------------------------------------------------- options


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype: '{name}'{hint(name, DTYPES)}")
    return DTYPES[name]


def _attention(name: str) -> str:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key)]
    if name not in known:
        raise ValueError(f"attention: '{name}'{hint(name, known)}")
    return name


def _source(pretrained: str) -> Path | str:
    found = locate(pretrained)
    file = gguf_in(found) if isinstance(found, Path) else None
    return found if file is None else dequantised(file)


def _tokenizer(name: str | None, source: Path | str | None, template: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if name is None and source is None:
        raise ValueError("tokenizer: random weights come without one; set it to bytes, a local folder or a hub id")
    if name == "bytes":
        tokenizer: PreTrainedTokenizerBase = byte_tokenizer()
    else:
        place = locate(name) if name is not None else source
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=isinstance(place, Path))
    if template is not None:
        from mllm_factory import resolve_template

        tokenizer.chat_template = resolve_template(template)
    if not tokenizer.chat_template:
        raise ValueError("template: the tokenizer has none of its own; set it to chatml, vicuna, plain or a .jinja file")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


# ---------------------------------------------------------------- models


def _pretrained(source: Path | str, **options: Any) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    local = isinstance(source, Path)
    with quiet() if local else nullcontext():  # a download shows its progress
        try:
            if on_meta():
                config = AutoConfig.from_pretrained(source, local_files_only=local)
                return AutoModelForCausalLM.from_config(config, **options)
            model, report = AutoModelForCausalLM.from_pretrained(
                source, local_files_only=local, output_loading_info=True, **options
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:400]
            raise ValueError(f"pretrained: {source} cannot be loaded ({type(error).__name__}: {reason})") from error
    lacking = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if lacking:
        what = f"{len(lacking)} tensors of {type(model).__name__}, such as {lacking[0]}"
        raise ValueError(f"pretrained: {source} does not fill {what}; is it a causal language model?")
    return model


def _from_scratch(
    architecture: str, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> PreTrainedModel:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = _near(architecture, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ValueError(f"architecture: transformers has no causal language model '{architecture}'{near}")
    _check_sizes(sizes, architecture, CONFIG_MAPPING[architecture])
    ids = {name: getattr(tokenizer, name) for name in FROM_TOKENIZER if hasattr(tokenizer, name)}
    ids["vocab_size"] = len(tokenizer)
    try:
        config = AutoConfig.for_model(architecture, **sizes, **ids)
        return AutoModelForCausalLM.from_config(config, **options)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"sizes: '{architecture}' cannot be built with them: {' '.join(str(error).split())}") from error


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


def _layers_of(model: PreTrainedModel) -> str:
    count = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder()
    for name, module in model.named_modules():
        inside = any(module is part for part in decoder.modules())
        if inside and isinstance(module, nn.ModuleList) and len(module) == count:
            return name
    raise ValueError(f"{type(model).__name__} keeps its {count} decoder layers in no ModuleList; it cannot be a backbone")


def _finished(scores: Tensor, config: PretrainedConfig) -> Tensor:
    """What some architectures do after the head, read from their config: Cohere and Granite scale, Gemma caps."""
    if (scale := getattr(config, "logit_scale", None)) is not None:
        scores = scores * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scores = scores / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        scores = torch.tanh(scores / cap) * cap
    return scores
