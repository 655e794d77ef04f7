"""Several data sets as one, in shares that the user chooses."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate

import numpy as np

from mllm_factory import Sample, Source, register


@register("mixture")
class Mixture(Source):
    """Samples of named sources in the shares w_k: of N samples of an epoch, floor(N w_k + 1/2) are of source k.

    With ``samples: null`` every source is seen whole: N = max over k of len_k / w_k. A source with fewer samples than its
    share repeats them, the rest of an uneven last round drawn by ``seed``; so does one with more samples than its share,
    which is then not seen whole. The order of an epoch mixes all of them.

    Args:
        sources: nodes by name; the name stands before each sample's id.
        weights: by the same names, above 0; they are divided by their sum. None: by size.
        samples: N; None: as above.
        seed: of what is drawn.

    Raises:
        ValueError: names that do not agree, or a weight or number out of range.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        weights: dict[str, float] | None = None,
        samples: int | None = None,
        seed: int = 0,
    ) -> None:
        if not sources:
            raise ValueError("sources: name at least one source")
        if weights is None:
            weights = {name: float(len(source)) for name, source in sources.items()}
        if sources.keys() != weights.keys():
            odd = ", ".join(sorted(sources.keys() ^ weights.keys()))
            raise ValueError(f"weights: {odd} is named in one of sources and weights only; name each in both")
        for name, weight in weights.items():
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"weights: {name} has {weight}; use a number above 0, or leave the source out")
        if samples is not None and samples < len(sources):
            raise ValueError(f"samples: {samples} is less than one of each source; use {len(sources)} or more")
        total = sum(weights.values())
        self._names, self._sources = list(sources), list(sources.values())
        shares = [weights[name] / total for name in self._names]
        n = samples or math.ceil(max(len(s) / share for s, share in zip(self._sources, shares, strict=True)) - 1e-9)
        counts = [max(1, math.floor(n * share + 0.5)) for share in shares]
        self._ends = list(accumulate(counts))
        self._seed = seed
        self._rest = [
            self._drawn(name, len(s), c) for name, s, c in zip(self._names, self._sources, counts, strict=True)
        ]
        self.modalities = frozenset().union(*(source.modalities for source in self._sources))

    def _drawn(self, name: str, size: int, count: int) -> np.ndarray:
        """[count % size] the samples of the uneven round."""
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        return np.sort(generator.permutation(size)[: count % size])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index`` of an epoch: the sources one after the other, each round by round."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        k = bisect_right(self._ends, index)
        source, count = self._sources[k], self._ends[k] - (self._ends[k - 1] if k else 0)
        place = index - (self._ends[k] - count)
        turn, i = divmod(place, len(source))
        if turn == count // len(source):
            i = int(self._rest[k][i])
        sample = source[i]
        name = f"{self._names[k]}/{sample.id}"
        return replace(sample, id=f"{name}#{turn}" if turn else name)
