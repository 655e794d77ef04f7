"""A walk over the causal language models of transformers: each works as a backbone, or a line says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mllm_factory import Backbone, ConfigError, build

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "sliding_window": 8,
}
REASONS = (
    "cannot be a backbone",  # looks ahead, no list of layers, or sizes that do not run
    "cannot be built with these sizes",  # this generic shrinking does not fit every config
)


def shrunk(architecture: str) -> dict[str, Any] | str:
    """Small sizes for any config that knows their names; a reason where the result is still large."""
    try:
        config: Any = CONFIG_MAPPING[architecture]()
        known = {*config.to_dict(), *config.attribute_map}
        sizes = {name: value for name, value in SMALL.items() if name in known}
        with torch.device("meta"):
            given: dict[str, Any] = {**sizes, "vocab_size": 261, "pad_token_id": 256, "eos_token_id": 257}
            trial = CONFIG_MAPPING[architecture](**given)
            count = sum(p.numel() for p in AutoModelForCausalLM.from_config(trial).parameters())
    except Exception as error:
        return f"not shrunk: {type(error).__name__}"
    return sizes if count < 2_000_000 else "not shrunk: too large"


@pytest.mark.slow
def test_every_third_causal_model_of_transformers_works_or_says_why() -> None:
    works, refused, skipped = [], {}, []
    for architecture in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[::3]:
        sizes = shrunk(architecture)
        if isinstance(sizes, str):
            skipped.append(architecture)
            continue
        torch.manual_seed(0)
        try:
            part: Any = build(
                Backbone, {"name": "hf", "architecture": architecture, "sizes": sizes, "tokenizer": "bytes"}
            )
        except ConfigError as error:
            refused[architecture] = str(error)
            continue
        ids = torch.randint(0, 256, (2, 12))
        with torch.no_grad():
            part.eval()
            whole = part.model(input_ids=ids, use_cache=False).logits
            assert torch.equal(part.logits(part(part.embed(ids))), whole), architecture
        works.append(architecture)
    print(works, refused, skipped)  # shown when it fails
    assert len(works) >= 25
    for architecture, message in refused.items():
        assert "\n" not in message and any(reason in message for reason in REASONS), (architecture, message)
