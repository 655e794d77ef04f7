"""A data set whose pictures and sounds belong to other questions: what a model learns from it owes nothing to them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mllm_factory import DataError, Sample, Source, register


@register("exchanged")
class Exchanged(Source):
    """Another source, of which every sample carries the media of another one. Questions and answers stay where they are.

    The samples are put in a random circle, and each takes the media of the next: none keeps its own, and every item is as
    frequent as before. Two samples that show the same picture may still be neighbours.

    Train on it for a control of measures of modality use: a model of the same layout and training that can only be blind.

    Args:
        source: the data set.
        seed: of the circle.

    Raises:
        ValueError: fewer than two samples.
    """

    def __init__(self, source: Source, seed: int = 0) -> None:
        if len(source) < 2:
            raise ValueError(f"source: {len(source)} sample cannot be exchanged; use 2 or more")
        if seed < 0:
            raise ValueError(f"seed: {seed} is negative; use 0 or more")
        self.source, self.modalities = source, source.modalities
        circle = np.random.default_rng(seed).permutation(len(source))
        self._next = np.empty_like(circle)
        self._next[circle] = np.roll(circle, -1)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index`` with the media of the one behind it in the circle.

        Raises:
            DataError: the two carry different numbers of items.
        """
        sample, other = self.source[index], self.source[int(self._next[index])]
        counts = [{name: len(items) for name, items in s.media.items() if items} for s in (sample, other)]
        if counts[0] != counts[1]:
            raise DataError(
                f"{sample.id} and {other.id} carry {counts[0]} and {counts[1]} items and cannot exchange them; use a source whose "
                "samples all carry the same number"
            )
        return replace(sample, media=other.media)
