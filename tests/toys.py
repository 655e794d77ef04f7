"""A model and data so small that an engine test takes milliseconds, and parts that misbehave in one way each."""

from __future__ import annotations

import os
import random
import signal
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from mllm_factory import Batch, Encoder, Message, Metric, MultimodalModel, Output, Projector, Sample, Source

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "almost white": (250, 250, 250)}


class Colours(Source):
    """Pictures of one colour, questions and answers of uneven length."""

    def __init__(self, n: int = 32, first: int = 0, text_every: int = 0, pictures: int = 1) -> None:
        self.modalities = frozenset({"vision"})
        self.n, self.first, self.text_every, self.pictures = n, first, text_every, pictures

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        i = index + self.first
        name = list(COLOURS)[i % 4]
        question = " ".join(["which colour"] * (1 + i % 3)) + "?"
        if self.text_every and i % self.text_every == 0:
            return Sample(f"text {i}", (Message("user", f"say {name}"), Message("assistant", name)))
        shown = [list(COLOURS)[(i + j) % 4] for j in range(self.pictures)]
        messages = (Message("user", "<image>" * self.pictures + question), Message("assistant", name))
        return Sample(f"colour {i}", messages, {"vision": tuple(Image.new("RGB", (12, 12), COLOURS[s]) for s in shown)})


class Announced(Colours):
    """Sends a signal to the training process, and to the loader worker if one reads, where sample ``at`` is read first.

    ``flag`` is made then; where it exists nothing is sent.
    """

    def __init__(self, flag: str, at: int, n: int = 32, number: int = signal.SIGTERM) -> None:
        super().__init__(n, text_every=6)
        self.flag, self.at, self.number = Path(flag), at, number

    def __getitem__(self, index: int) -> Sample:
        if index == self.at and not self.flag.exists():
            self.flag.touch()
            for process in {os.getpid(), os.getppid()} if get_worker_info() else {os.getpid()}:
                os.kill(process, self.number)
        return super().__getitem__(index)


class TextThenPictures(Colours):
    """The first half of each pair of batches of ``batch`` samples has pictures, the second has none."""

    def __init__(self, n: int = 32, batch: int = 2) -> None:
        super().__init__(n)
        self.batch = batch

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        if (index // self.batch) % 2 == 0:
            return sample
        return Sample(sample.id, (Message("user", "colour?"), sample.messages[-1]))


class Empty(Source):
    """No sample."""

    modalities = frozenset({"vision"})

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Sample:
        raise IndexError(index)


class FailsLate(Colours):
    """Reading sample ``at`` raises, as a broken file would."""

    def __init__(self, n: int = 32, at: int = 9) -> None:
        super().__init__(n)
        self.at = at

    def __getitem__(self, index: int) -> Sample:
        if index == self.at:
            raise OSError(f"sample {index} is broken")
        return super().__getitem__(index)


class Stalls(Colours):
    """Reading sample ``at`` takes longer than anybody waits."""

    def __init__(self, n: int = 32, at: int = 9) -> None:
        super().__init__(n)
        self.at = at

    def __getitem__(self, index: int) -> Sample:
        if index == self.at:
            time.sleep(600)
        return super().__getitem__(index)


def pixels(picture: Image.Image) -> Tensor:
    """A picture -> [1, 3, 8, 8] in [0, 1]"""
    raw = torch.frombuffer(bytearray(picture.resize((8, 8)).tobytes()), dtype=torch.uint8)
    return raw.view(1, 8, 8, 3).permute(0, 3, 1, 2).float() / 255


class Patches(Encoder):
    """Four patches, each the mean colour of its quarter, projected."""

    modality = "vision"

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.dim, self.num_tokens, self.transform = dim, 4, pixels
        self.linear = nn.Linear(3, dim)

    def forward(self, items: Tensor) -> Tensor:
        """[n, 3, 8, 8] -> [n, 4, dim]"""
        return self.linear(nn.functional.avg_pool2d(items, 4).flatten(2).transpose(1, 2))


class NormedPatches(Encoder):
    """The same with running statistics, and brightness that Python's and numpy's generators change while it learns."""

    modality = "vision"

    def __init__(self, dim: int = 6, jitter: float = 0.0) -> None:
        super().__init__()
        self.jitter = jitter
        self.dim, self.num_tokens, self.transform = dim, 4, pixels
        self.conv, self.norm = nn.Conv2d(3, dim, 4, 4), nn.BatchNorm2d(dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, items: Tensor) -> Tensor:
        """[n, 3, 8, 8] -> [n, 4, dim]"""
        if self.training and self.jitter:
            items = items + self.jitter * (random.random() + np.random.rand())
        return self.out(self.norm(self.conv(items)).flatten(2).transpose(1, 2))


class DeadWeight(Projector):
    """Has a parameter that it does not use."""

    def __init__(self, in_dim: int, out_dim: int, in_tokens: int) -> None:
        super().__init__()
        self.num_tokens = in_tokens
        self.linear, self.unused = nn.Linear(in_dim, out_dim), nn.Parameter(torch.ones(3))

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, in_tokens, out_dim]"""
        return self.linear(features)


class Liar(Projector):
    """Says it gives one token more than it does."""

    def __init__(self, in_dim: int, out_dim: int, in_tokens: int) -> None:
        super().__init__()
        self.num_tokens = in_tokens + 1
        self.linear = nn.Linear(in_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, in_tokens, out_dim]"""
        return self.linear(features)


class Stubborn(Projector):
    """Takes features of width 5 and no other."""

    def __init__(self, in_dim: int, out_dim: int, in_tokens: int) -> None:
        super().__init__()
        self.num_tokens, self.linear = in_tokens, nn.Linear(5, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, 5] -> [n, in_tokens, out_dim]"""
        return self.linear(features)


class TurnsNan(Projector):
    """Gives what is not a number once it has seen ``after`` batches."""

    def __init__(self, in_dim: int, out_dim: int, in_tokens: int, after: int = 2) -> None:
        super().__init__()
        self.num_tokens, self.linear, self.left = in_tokens, nn.Linear(in_dim, out_dim), after

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, in_tokens, out_dim]"""
        self.left -= self.training
        return self.linear(features) * (torch.nan if self.left < 0 else 1.0)


class Greedy(Projector):
    """Asks for a quarter of an exabyte."""

    def __init__(self, in_dim: int, out_dim: int, in_tokens: int) -> None:
        super().__init__()
        self.num_tokens, self.linear = in_tokens, nn.Linear(in_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, in_tokens, out_dim]"""
        return self.linear(features) + torch.empty(1 << 56)[0]


class Killer(Metric):
    """Ends the process with SIGKILL in its ``at``-th batch unless ``flag`` exists; makes it first."""

    max_new_tokens = 1

    def __init__(self, flag: str, at: int = 1) -> None:
        self.flag, self.left = Path(flag), at

    def update(self, model: MultimodalModel, batch: Batch, output: Output) -> None:
        """One batch less to live."""
        self.left -= 1
        if self.left == 0 and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def compute(self) -> dict[str, float]:
        """Nothing."""
        return {}


def tree(folder: Path | str = "unused", **changes: Any) -> dict[str, Any]:
    """The tree of a toy run; ``trainer__max_steps=3`` changes ``trainer.max_steps``, and so on."""
    sizes = {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "max_position_embeddings": 256},
    }
    result: dict[str, Any] = {
        "name": "toy",
        "seed": 0,
        "output_dir": str(folder),
        "resume": None,
        "init_from": None,
        "vision": {"name": "toys:Patches"},
        "audio": None,
        "projector": {"name": "mlp", "depth": 2},
        "backbone": {"name": "hf", "architecture": "llama", "sizes": sizes, "tokenizer": "bytes"},
        "tuning": {"vision": {"name": "frozen"}, "projector": {"name": "full"}, "backbone": {"name": "full"}},
        "schedule": {"name": "cosine", "lr": 1e-2, "warmup": 0.2},
        "data": {
            "train": {"name": "toys:Colours", "n": 32},
            "eval": {"name": "toys:Colours", "n": 8, "first": 100},
            "max_length": 128,
        },
        "trainer": {
            "max_steps": 4,
            "batch_size": 4,
            "eval_batch_size": 4,
            "log_every": 1,
            "save_every": 2,
            "device": "cpu",
        },
        "metrics": {"exact_match": {"name": "exact_match", "max_new_tokens": 2}},
    }
    result = deepcopy(result)
    for key, value in changes.items():
        *path, last = key.split("__")
        node = result
        for part in path:
            node = node[part]
        node[last] = value
    return result
