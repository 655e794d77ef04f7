"""Any causal language model of transformers as a backbone: from the hub, a folder, a GGUF file, or from scratch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm_factory import Backbone, on_meta, register
from mllm_factory.components.backbones import hf_build

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


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
        kernel = hf_build.checked_attention(attention)
        options = {"dtype": hf_build.checked_dtype(dtype), "attn_implementation": kernel}
        if (architecture is None) == (pretrained is None):
            raise ValueError("give either architecture (random weights) or pretrained, and set the other to null")
        if pretrained is not None and sizes:
            raise ValueError("sizes: they belong to architecture; with pretrained weights remove them (sizes: {})")
        source = None if pretrained is None else hf_build.find_source(pretrained)
        self.tokenizer = hf_build.make_tokenizer(tokenizer, source, template)
        if source is not None:
            self.model = hf_build.load_model(source, **options)
        else:
            self.model = hf_build.new_model(str(architecture), sizes or {}, self.tokenizer, **options)
        table: Any = self.model.get_input_embeddings()
        rows, self.dim = table.weight.shape
        if len(self.tokenizer) > rows:
            raise ValueError(
                f"tokenizer: it has {len(self.tokenizer)} tokens but the model {rows}; use the model's own"
            )
        self.max_positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._layers = _layers_of(self.model)
        self._takes_positions = "position_ids" in inspect.signature(self.model.get_decoder().forward).parameters
        if not on_meta() and kernel in ("sdpa", "eager"):  # other kernels need a device of their own
            self._check_parts()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last."""
        found: Any = self.model.get_submodule(self._layers)
        return found

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
    def _check_parts(self) -> None:
        """Refuse an architecture whose parts used one by one give something else than the whole, or that looks ahead."""
        training, ids = self.training, torch.arange(3)[None]
        self.eval()
        whole = self.model(input_ids=ids, use_cache=False).logits[:, :1].float()
        parts = self.logits(self(self.embed(ids[:, :1]))).float()
        self.train(training)
        near = 1e-4 if self.model.dtype == torch.float32 else 5e-2
        if not torch.allclose(parts, whole, rtol=0, atol=near * float(whole.abs().max())):
            raise ValueError(
                f"{type(self.model).__name__} cannot be a backbone: it looks ahead, or treats embeddings or scores in a way "
                "of its own"
            )

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
            output = self._decode(
                embeds, mask, use_cache=use_cache, **({} if cache is None else {"past_key_values": cache})
            )
            token = (
                self.logits(output.last_hidden_state[:, -1]).argmax(-1).masked_fill(done, self.tokenizer.pad_token_id)
            )
            new.append(token)  # [B]
            done |= torch.isin(token, stops)
            if done.all():
                break
            cache = output.get("past_key_values")
            step = self.embed(token[:, None])  # [B, 1, D]
            embeds = step if cache is not None else torch.cat([embeds, step], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return torch.stack(new, dim=1) if new else attention_mask.new_zeros(len(embeds), 0, dtype=torch.long)


def _layers_of(model: PreTrainedModel) -> str:
    """Name of the list that holds the decoder layers, found by its length."""
    count = model.config.get_text_config().num_hidden_layers
    inside = {id(module) for module in model.get_decoder().modules()}
    for name, module in model.named_modules():
        if id(module) in inside and isinstance(module, nn.ModuleList) and len(module) == count:
            return name
    raise ValueError(
        f"{type(model).__name__} keeps its {count} decoder layers in no ModuleList, so it cannot be a backbone"
    )


def _finished(scores: Tensor, config: PretrainedConfig) -> Tensor:
    """What some architectures do after the head, read from their config: Cohere and Granite scale, Gemma caps."""
    if (scale := getattr(config, "logit_scale", None)) is not None:
        scores = scores * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scores = scores / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        scores = torch.tanh(scores / cap) * cap
    return scores
