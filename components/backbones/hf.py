"""Any decoder-only language model of transformers as a backbone: from the hub, a folder, a GGUF file, or from scratch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm_factory import Backbone, on_meta, register
from mllm_factory.components.backbones import head, hf_build, hf_tokenizer, packed_attention, structure


@register("hf")
class HFBackbone(Backbone):
    """A decoder of transformers and its head, found by structure: no list of model names is kept.

    The rotary positions of padded rows count the unmasked tokens. Generation is greedy by a loop of its own, so a checkpoint's
    sampling defaults have no influence. A tokenizer without a padding token pads with its end token; padding is masked anyway.

    Args:
        architecture: model type of transformers (``llama``, ``gpt2``, ...); None: read from ``pretrained``.
        sizes: config values of that architecture; those of the special tokens follow from the tokenizer.
        pretrained: a hub id, a local folder, or ``pkg://package``; None: random weights. A GGUF file is de-quantised once and
            cached on disk. Where an architecture is given too, the weights must agree with it.
        tokenizer: ``bytes`` (one token a byte, made in code), a local folder or a hub id; None: that of ``pretrained``.
        template: chat template: ``chatml``, ``vicuna``, ``plain`` or a ``.jinja`` file; None: the tokenizer's own.
        dtype: of the weights: ``float32``, ``bfloat16`` or ``float16``.
        attention: attention kernel: ``sdpa``, ``eager``, ``flash_attention_2``, ...; None: sdpa where the architecture has it,
            else eager.

    Raises:
        ValueError: an unknown architecture, size, dtype or kernel; neither ``architecture`` nor ``pretrained``; weights of
            another architecture; no tokenizer or no chat template; a model that is no decoder.
    """

    def __init__(
        self,
        architecture: str | None = None,
        sizes: dict[str, Any] | None = None,
        pretrained: str | None = None,
        tokenizer: str | None = None,
        template: str | None = None,
        dtype: str = "float32",
        attention: str | None = None,
    ) -> None:
        super().__init__()
        kernel = hf_build.checked_attention(attention)
        options = {"dtype": hf_build.checked_dtype(dtype), "attn_implementation": kernel}
        hf_build.check_choice(architecture, sizes or {}, pretrained)
        source = None if pretrained is None else hf_build.find_source(pretrained)
        self.tokenizer = hf_tokenizer.make_tokenizer(tokenizer, source, template)
        self.model = hf_build.make_model(architecture, sizes or {}, source, self.tokenizer, **options)
        table: Any = self.model.get_input_embeddings()
        rows, self.dim = table.weight.shape
        if len(self.tokenizer) > rows:
            raise ValueError(
                f"tokenizer: it has {len(self.tokenizer)} tokens but the model {rows}; use the model's own"
            )
        self.max_positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._decoder, self._layers = structure.parts_of(self.model)
        self._apart = packed_attention.fits(self.model)
        self._takes_positions = "position_ids" in inspect.signature(self._decoder_module().forward).parameters
        if not on_meta() and kernel in (None, "sdpa", "eager"):  # other kernels need a device of their own
            structure.check_parts(self.model, self)

    def _decoder_module(self) -> Any:
        return self.model.get_submodule(self._decoder)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last."""
        found: Any = self.model.get_submodule(self._layers)
        return found

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]"""
        return self.model.get_input_embeddings()(input_ids)

    def forward(self, embeds: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """[B, T, D], [B, T] bool -> hidden states after the final norm [B, T, D]; None means no padding.

        With ``positions`` [B, T], a row holds several samples: transformers keeps apart what starts again from 0.
        """
        if positions is not None:
            return self._packed(embeds, positions)
        return self._decode(embeds, attention_mask, use_cache=False).last_hidden_state

    def _packed(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """Rows of several samples: on a CPU sample by sample where that can be; flash kernels want one long row."""
        if not self._takes_positions:
            raise ValueError(f"{type(self.model).__name__} takes no position_ids")
        shape = embeds.shape
        if "flash" in (self.model.config._attn_implementation or ""):
            embeds, positions = embeds.reshape(1, -1, shape[-1]), positions.reshape(1, -1)
        given = {"inputs_embeds": embeds, "position_ids": positions, "use_cache": False}
        if self._apart and embeds.device.type == "cpu":
            packed_attention.install(self.model)
            try:
                with packed_attention.apart():
                    return self._decoder_module()(**given).last_hidden_state
            except packed_attention.UnsuitedError:
                self._apart = False
        return self._decoder_module()(**given).last_hidden_state.view(shape)

    def _decode(self, embeds: Tensor, mask: Tensor | None, **cache: Any) -> Any:
        """One pass through the decoder; positions count the unmasked tokens, so padding may stand on either side."""
        given: dict[str, Any] = {"inputs_embeds": embeds, **cache}
        if mask is not None:
            given["attention_mask"] = mask.long()
            if self._takes_positions:
                given["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        return self._decoder_module()(**given)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]"""
        return head.scores(self.model, self._decoder, hidden)

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
