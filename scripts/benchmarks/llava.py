"""Two LLaVA of equal sizes and data for the `step` benchmark: our composite, and transformers' own for its own Trainer."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mllm_factory import IGNORE_INDEX, VISION, Batch, Encoder, Message, MultimodalModel, Sample, Source
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.components.encoders.pixels import SquarePixels
from mllm_factory.data import Collator

MODES = {"everything": "full", "projector": "frozen"}
"""What trains besides the projector: the backbone's tuning. The vision tower is frozen in both."""
MARKS = ["<|end|>", "<|user|>", "<|assistant|>", "<|pad|>", "<image>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Sizes:
    """Both models and their data. ``words`` is the median number of words of a conversation's text."""

    vocabulary: int = 49152
    dim: int = 128
    layers: int = 4
    heads: int = 4
    hidden: int = 384
    vision_dim: int = 128
    vision_layers: int = 4
    image: int = 96
    patch: int = 16
    samples: int = 512
    batch: int = 16
    words: int = 46
    spread: float = 0.6
    share: float = 0.10

    @property
    def image_tokens(self) -> int:
        """Patches of a picture."""
        return (self.image // self.patch) ** 2


SMALL = Sizes(
    vocabulary=512, dim=32, layers=2, heads=2, hidden=64, vision_dim=32, vision_layers=2, image=32, samples=32, batch=4
)


# ---------------------------------------------------------------- data


def write_tokenizer(folder: Path, sizes: Sizes) -> None:
    """A tokenizer of one token a word: w0, w1, ..., and the template's marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(sizes.vocabulary - len(MARKS))}
    core = Tokenizer(models.WordLevel(vocab=words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(MARKS)
    marks = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "unk_token": "w0"}
    PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **marks).save_pretrained(folder)


class Conversations(Source):
    """One picture, a question and an answer of log-normal length each; answers are a fixed share of a sample's tokens."""

    def __init__(self, sizes: Sizes) -> None:
        self.modalities = frozenset({"vision"})
        draw = random.Random(0)
        self.samples = [self._sample(draw, sizes, i) for i in range(sizes.samples)]

    @staticmethod
    def _sample(draw: random.Random, sizes: Sizes, i: int) -> Sample:
        from PIL import Image

        words = min(max(round(sizes.words * math.exp(draw.gauss(0, sizes.spread))), 8), 6 * sizes.words)
        answer = max(1, round(sizes.share * (words + sizes.image_tokens + 4)) - 1)  # the end token is learnt, too
        text = [f"w{draw.randrange(sizes.vocabulary - len(MARKS))}" for _ in range(words + answer)]
        picture = Image.frombytes("RGB", (sizes.image, sizes.image), draw.randbytes(3 * sizes.image**2))
        question, reply = " ".join(text[answer:]), " ".join(text[:answer])
        return Sample(
            str(i), (Message("user", f"<image> {question}"), Message("assistant", reply)), {"vision": (picture,)}
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


# ---------------------------------------------------------------- ours


def clip_config(dim: int, layers: int, image: int, patch: int) -> Any:
    """The vision tower of both sides."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=dim,
        intermediate_size=4 * dim,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=image,
        patch_size=patch,
    )


class Clip(Encoder):
    """CLIP's vision tower up to the layer before the last, without the class token, as LLaVA takes it."""

    modality = "vision"

    def __init__(self, dim: int, layers: int, image: int, patch: int) -> None:
        super().__init__()
        from transformers import CLIPVisionModel

        self.model = CLIPVisionModel(clip_config(dim, layers, image, patch))
        del self.model.encoder.layers[-1]
        self.dim, self.num_tokens = dim, (image // patch) ** 2
        self.transform = SquarePixels(image, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    def forward(self, items: Tensor) -> Tensor:
        """[n, 3, image, image] -> [n, num_tokens, dim]"""
        return self.model(items).last_hidden_state[:, 1:]


def llama_sizes(sizes: Sizes) -> dict[str, Any]:
    """Of the language model of both sides."""
    return {
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "max_position_embeddings": 1024,
    }


def our_model(sizes: Sizes, tokenizer: Path, mode: str) -> tuple[MultimodalModel, Collator]:
    """Our composite, from a tree, and its collator."""
    clip = {"dim": sizes.vision_dim, "layers": sizes.vision_layers, "image": sizes.image, "patch": sizes.patch}
    backbone = {"name": "hf", "architecture": "llama", "sizes": llama_sizes(sizes), "tokenizer": str(tokenizer)}
    tuning = {"vision": {"name": "frozen"}, "projector": {"name": "full"}, "backbone": {"name": MODES[mode]}}
    tree = {
        "seed": 0,
        "vision": {"name": "benchmarks.llava:Clip", **clip},
        "projector": {"name": "mlp", "depth": 2},
        "backbone": backbone,
        "tuning": tuning,
        "data": {"max_length": 1024},
    }
    model = build_model(tree)
    return model, build_collator(tree, model)


# ---------------------------------------------------------------- transformers


def their_model(sizes: Sizes, mode: str) -> Any:
    """``LlavaForConditionalGeneration`` with the same sizes and the same frozen parts."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    marks: dict[str, Any] = {
        "pad_token_id": sizes.vocabulary - 2,
        "eos_token_id": sizes.vocabulary - 5,
        "bos_token_id": None,
    }
    config = LlavaConfig(
        vision_config=clip_config(sizes.vision_dim, sizes.vision_layers, sizes.image, sizes.patch),
        text_config=LlamaConfig(vocab_size=sizes.vocabulary, **llama_sizes(sizes), **marks),
        image_token_index=sizes.vocabulary - 1,
        image_seq_length=sizes.image_tokens,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    if mode == "projector":
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
    return model


def copy_weights(ours: MultimodalModel, theirs: Any) -> None:
    """Fill their model with our weights. Theirs has one more vision layer, whose output LLaVA does not use."""
    renames = {
        "encoders.vision.model.": "model.vision_tower.",
        "projectors.vision.layers.0.": "model.multi_modal_projector.linear_1.",
        "projectors.vision.layers.2.": "model.multi_modal_projector.linear_2.",
        "backbone.model.model.": "model.language_model.",
        "backbone.model.lm_head.": "lm_head.",
    }
    weights = {}
    for name, tensor in ours.state_dict().items():
        old = next(old for old in renames if name.startswith(old))
        weights[renames[old] + name.removeprefix(old)] = tensor
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    last = f"model.vision_tower.encoder.layers.{theirs.config.vision_config.num_hidden_layers - 1}."
    if unexpected or not all(name.startswith(last) for name in missing):
        raise RuntimeError(f"the two models differ: missing {missing}, unexpected {unexpected}")


def their_sample(batch: Batch, image_token: int) -> dict[str, Tensor]:
    """A row of ours as transformers takes it: the picture's positions hold the image token."""
    ids = torch.where(batch.modality == VISION, image_token, batch.input_ids)
    mask = batch.attention_mask.long()
    rows = {"input_ids": ids, "labels": batch.labels, "attention_mask": mask, "pixel_values": batch.media["vision"]}
    return {name: tensor[0] for name, tensor in rows.items()}


def their_collator(pad_id: int) -> Any:
    """Rows padded on the right to the longest."""
    fill = {"input_ids": pad_id, "labels": IGNORE_INDEX, "attention_mask": 0}

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        padded = {k: pad_sequence([r[k] for r in rows], batch_first=True, padding_value=v) for k, v in fill.items()}
        return {**padded, "pixel_values": torch.stack([r["pixel_values"] for r in rows])}

    return collate


@cache
def conversations(sizes: Sizes) -> Conversations:
    """The data of both sides, made once."""
    return Conversations(sizes)
