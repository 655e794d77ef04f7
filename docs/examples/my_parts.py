"""Components of one's own, one for each kind that people write most. Copy this file next to your runs and name its classes as
``my_parts:Gated``; ``docs/own_components.md`` tells how."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mllm_factory import Batch, Encoder, Message, Metric, Output, Projector, Sample, Schedule, Source, Tuning

if TYPE_CHECKING:
    from PIL.Image import Image

    from mllm_factory import MultimodalModel, TrainState


class Gated(Projector):
    """A linear layer whose output is gated by another one (GLU, arXiv 1612.08083), then brought to the backbone's width.

    Args:
        in_dim: given; width of a feature.
        out_dim: given; the backbone's width.
        in_tokens: given; features of one item, and tokens of one item.
        width: between the layers.

    Raises:
        ValueError: a ``width`` below 1.
    """

    def __init__(self, in_dim: int, out_dim: int, in_tokens: int, width: int = 64) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width: {width} is no width; use 1 or more")
        self.num_tokens = in_tokens
        self.up = nn.Linear(in_dim, 2 * width)
        self.down = nn.Linear(width, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[n, in_tokens, in_dim] -> [n, in_tokens, out_dim]"""
        value, gate = self.up(features).chunk(2, dim=-1)  # [n, in_tokens, width] each
        return self.down(value * gate.sigmoid())


class GrayPatches(Encoder):
    """The grey values of a picture, cut into squares: a token is one square's pixels times a fixed random matrix.

    Args:
        size: pixels of the picture's side.
        patch: pixels of a square's side.
        dim: width of a feature.

    Raises:
        ValueError: squares that do not tile the picture.
    """

    modality = "vision"

    def __init__(self, size: int = 32, patch: int = 8, dim: int = 48) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"patch: {patch} does not divide the {size} pixels of a side; use one that does")
        self.size, self.patch, self.dim = size, patch, dim
        self.num_tokens = (size // patch) ** 2
        self.mix = nn.Linear(patch * patch, dim)

    def transform(self, picture: Image) -> Tensor:
        """An RGB picture -> [1, 1, size, size] in 0..1."""
        pixels = torch.tensor(list(picture.convert("L").resize((self.size, self.size)).tobytes()), dtype=torch.float32)
        return pixels.view(1, 1, self.size, self.size) / 255

    def forward(self, items: Tensor) -> Tensor:
        """[n, 1, size, size] -> [n, num_tokens, dim]"""
        squares = nn.functional.unfold(items, self.patch, stride=self.patch)  # [n, patch * patch, num_tokens]
        return self.mix(squares.transpose(1, 2))


class OnlyNorms(Tuning):
    """Only the scales and shifts of normalisation layers learn."""

    def apply(self, part: nn.Module, model: MultimodalModel) -> None:
        """Leave ``requires_grad`` on for the parameters of modules whose class name ends in Norm."""
        part.requires_grad_(False)
        for module in part.modules():
            if type(module).__name__.endswith("Norm"):
                module.requires_grad_(True)


class Linear(Schedule):
    """From ``lr`` straight down to 0 at the last step, the same for every part.

    Args:
        lr: rate of the first step.
    """

    def __init__(self, lr: float = 1e-3) -> None:
        self.lr = lr

    def before_step(self, state: TrainState) -> None:
        """Set the rate of every group."""
        for group in state.optimizer.param_groups:
            group["lr"] = self.lr * (1 - state.step / state.max_steps)


class AnswerLength(Metric):
    """Mean length of the generated answers in characters.

    Args:
        max_new_tokens: longest answer to generate.
    """

    def __init__(self, max_new_tokens: int = 16) -> None:
        self.max_new_tokens = max_new_tokens
        self.characters = self.answers = 0

    def update(self, model: MultimodalModel, batch: Batch, output: Output) -> None:
        """Count the batch's answers."""
        texts = output.texts or []
        self.characters += sum(map(len, texts))
        self.answers += len(texts)

    def compute(self) -> dict[str, float]:
        """``answer_length``; NaN where nothing was seen."""
        return {"answer_length": self.characters / self.answers if self.answers else float("nan")}


class Table(Source):
    """Questions in a tab-separated file with the columns picture, question and answer.

    Args:
        path: the file; pictures are looked for beside it.

    Raises:
        ValueError: no such file, or a column is missing.
    """

    modalities = frozenset({"vision"})

    def __init__(self, path: str) -> None:
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"path: there is no file {file.absolute()}")
        with file.open(encoding="utf-8", newline="") as lines:
            self.rows = list(csv.DictReader(lines, delimiter="\t"))
        for column in ("picture", "question", "answer"):
            if self.rows and column not in self.rows[0]:
                raise ValueError(f"path: {file} has no column '{column}' in its first line")
        self.folder = file.parent

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Row ``index``; the picture stays a path."""
        row = self.rows[index]
        messages = (Message("user", f"<image>\n{row['question']}"), Message("assistant", row["answer"]))
        return Sample(f"row {index}", messages, {"vision": (str(self.folder / row["picture"]),)})
