"""What the tests of attention share: tiny models of many architectures, batches padded on either side, and eager maps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from toys import Colours, tree

from mllm_factory import IGNORE_INDEX, MODALITIES, PAD, TEXT, Batch, Message, MultimodalModel, Sample
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.components.metrics.attention_groups import GROUPS
from mllm_factory.data import Collator

COMMON = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**COMMON, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "mistral": {**GROUPED, "sliding_window": 9},
    "gemma2": {
        **GROUPED,
        "head_dim": 8,
        "sliding_window": 9,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 5,
    },
    "gemma3_text": {
        **GROUPED,
        "head_dim": 8,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": GROUPED,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3},
    "opt": {
        **{
            "hidden_size": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 16,
        },
        **{"max_position_embeddings": 256, "init_std": 0.3},
    },
    "gpt_neox": {**COMMON, "max_position_embeddings": 256, "initializer_range": 0.3},
    "gpt_oss": {**GROUPED, "head_dim": 8, "sliding_window": 9, "num_local_experts": 2, "num_experts_per_tok": 1},
}
EAGER = {"gemma2", "gpt_oss"}
"""Without an sdpa kernel: capped scores, learned sinks."""


def made(architecture: str = "llama", seed: int = 0, **sizes: Any) -> tuple[MultimodalModel, Collator]:
    """A tiny model with a vision encoder, random weights, and its collator."""
    node = tree(seed=seed)
    node["backbone"] |= {
        "architecture": architecture,
        "sizes": {**ARCHITECTURES[architecture], **sizes},
        "attention": "eager" if architecture in EAGER else "sdpa",
    }
    model = build_model(node)
    return model.eval(), build_collator(node, model)


def samples(*numbers: int, **options: Any) -> list[Sample]:
    source = Colours(1000, **options)
    return [source[i] for i in numbers]


def talk(*turns: str, pictures: int = 0) -> Sample:
    """A conversation of alternating user and assistant turns."""
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(turns))
    return Sample("talk", messages, {"vision": samples(0)[0].media["vision"] * pictures} if pictures else {})


def left(batch: Batch) -> Batch:
    """The same rows padded on the left."""
    shift = (~batch.attention_mask).sum(1)

    def rolled(values: Tensor) -> Tensor:
        return torch.stack([v.roll(int(s)) for v, s in zip(values, shift, strict=True)])

    names = ("input_ids", "labels", "attention_mask", "modality", "role")
    return replace(batch, **{name: rolled(getattr(batch, name)) for name in names}, left_padded=None)


def wider(batch: Batch, more: int) -> Batch:
    """The same rows with more padding on the right."""
    fills = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": False, "modality": TEXT, "role": PAD}
    changed = {n: torch.nn.functional.pad(getattr(batch, n), (0, more), value=v) for n, v in fills.items()}
    return replace(batch, **changed)


@torch.no_grad()
def maps(model: MultimodalModel, batch: Batch) -> Tensor:
    """[L, B, H, T, T] the eager attention maps, padding masked wherever it stands."""
    language: Any = model.backbone.model
    before = language.config._attn_implementation
    language.set_attn_implementation("eager")
    try:
        positions = (batch.attention_mask.long().cumsum(1) - 1).clamp(min=0)
        given = {"inputs_embeds": model.embed(batch), "attention_mask": batch.attention_mask.long()}
        if model.backbone._takes_positions:
            given["position_ids"] = positions
        found = language.get_decoder()(**given, output_attentions=True, use_cache=False).attentions
    finally:
        language.set_attn_implementation(before)
    return torch.stack(found)


def brute_rows(batch: Batch, row: int) -> list[int]:
    """Positions whose next token carries a label, one by one."""
    labels = batch.labels[row].tolist()
    return [t for t in range(len(labels) - 1) if labels[t + 1] != IGNORE_INDEX]


def brute_group(batch: Batch, row: int, t: int) -> str | None:
    """A key's group, spelled out."""
    if not batch.attention_mask[row, t]:
        return None
    for name, code in MODALITIES.items():
        if batch.modality[row, t] == code:
            return name
    return {1: "system", 2: "user", 3: "answer"}[int(batch.role[row, t])]


def brute_mass(batch: Batch, A: Tensor, row: int, rows: list[int]) -> Tensor:
    """[L, H, rows, G] sums of the maps A [L, B, H, T, T] over the keys of each group."""
    result = torch.zeros(A.shape[0], A.shape[2], len(rows), len(GROUPS))
    for i, q in enumerate(rows):
        for k in range(A.shape[-1]):
            group = brute_group(batch, row, k)
            if group is not None:
                result[:, :, i, GROUPS.index(group)] += A[:, row, :, q, k]
    return result
