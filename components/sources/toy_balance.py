"""A task made in code that encoder and language model must both adapt to: the experiment ``commit_tiny``.

A picture is a square of 2 x 2 patches. Each patch shows three attributes a, b, c out of K values each, as the sum of three
fixed random patterns of pixels, one per attribute value; a question names a patch, an answer has two letters.

    stage pretrain     letters (a, b)           of the patch, patterns P
    stage adapt        letters pi(b), pi(c)     patterns (1 - shift) P + shift P': another rendering, a new attribute and a
                                                permuted answer vocabulary
"""

from __future__ import annotations

import numpy as np

from mllm_factory import Message, Sample, Source, hint, register

STAGES = ("pretrain", "adapt")
SIDE = 4
"""Pixels of a patch's side; a picture is twice as wide."""
BLOCK = 4096
"""Samples that are drawn together."""
LETTERS = "abcdefghijklmnop"
PLACES = ("nw", "ne", "sw", "se")


@register("toy_balance")
class ToyBalance(Source):
    """One question about one of four patches a sample, answered in two letters. Sample i is a pure function of seed, split and i.

    Args:
        stage: ``pretrain`` or ``adapt``.
        split: ``train`` or ``test``: the same patterns, other samples.
        n: samples.
        values: K, values of each attribute, at most 16.
        shift: share of the other rendering in ``adapt``, in [0, 1].
        noise: standard deviation of each pixel's noise, as a share of the patterns' own deviation.
        seed: of patterns, permutation and samples.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        stage: str,
        split: str = "train",
        n: int = 20000,
        values: int = 12,
        shift: float = 0.4,
        noise: float = 0.1,
        seed: int = 0,
    ) -> None:
        if stage not in STAGES:
            raise ValueError(f"stage: '{stage}'{hint(stage, STAGES)}")
        if split not in ("train", "test"):
            raise ValueError(f"split: '{split}'{hint(split, ('train', 'test'))}")
        if n < 1:
            raise ValueError(f"n: {n} is no number of samples; use 1 or more")
        if not 2 <= values <= len(LETTERS):
            raise ValueError(f"values: {values} is out of range; use 2 to {len(LETTERS)}")
        if not 0 <= shift <= 1 or noise < 0:
            raise ValueError(f"shift: {shift} and noise: {noise} are a share of 0 to 1 and a number of 0 or more")
        self.modalities = frozenset({"vision"})
        self.stage, self.split, self.n, self.seed = stage, split, n, seed
        fixed = np.random.default_rng([seed, 0])
        plain, other = (fixed.standard_normal((3, values, SIDE, SIDE, 3)) for _ in range(2))
        adapts = stage == "adapt"
        self.patterns = (
            (1 - shift) * plain + shift * other if adapts else plain
        )  # [attribute, value, row, column, colour]
        order = fixed.permutation(values) if adapts else np.arange(values)
        self.letters = [LETTERS[i] for i in order]
        self.asked = (1, 2) if adapts else (0, 1)
        self.shown = self._random(0).integers(values, size=(n, 4, 3))  # of each patch, its attributes
        self.place = self._random(1).integers(4, size=n)  # the patch that is asked about
        self.pictures = self._drawn(noise)

    def _random(self, of: int) -> np.random.Generator:
        """A generator for one property of all samples, drawn in their order: sample i does not depend on ``n``."""
        return np.random.default_rng([self.seed, 1, self.split == "test", self.stage == "adapt", of])

    def _drawn(self, noise: float) -> np.ndarray:
        """All pictures at once, [n, 2 SIDE, 2 SIDE, 3] uint8: one by one they would take longer than a step of training."""
        found = np.empty((self.n, 2 * SIDE, 2 * SIDE, 3), np.uint8)
        random = self._random(2)
        for start in range(0, self.n, BLOCK):
            shown = self.shown[start : start + BLOCK]
            pixels = sum(self.patterns[a, shown[:, :, a]] for a in range(3)) / np.sqrt(3)  # [b, 4, SIDE, SIDE, 3]
            pixels = pixels + noise * random.standard_normal(pixels.shape)
            grey = np.clip(128 + 40 * pixels, 0, 255).astype(np.uint8).reshape(-1, 2, 2, SIDE, SIDE, 3)
            found[start : start + BLOCK] = grey.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 2 * SIDE, 2 * SIDE, 3)
        return found

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        """``<image>`` and the name of a patch, then its two letters."""
        from PIL import Image

        if not 0 <= index < self.n:
            raise IndexError(f"sample {index} of {self.n}")
        place = int(self.place[index])
        answer = "".join(self.letters[self.shown[index, place, a]] for a in self.asked)
        messages = (Message("user", f"<image>{PLACES[place]}"), Message("assistant", answer))
        return Sample(
            f"toy_balance/{self.stage}/{self.split}/{index}",
            messages,
            {"vision": (Image.fromarray(self.pictures[index]),)},
        )
