"""A source whose media belong to other samples: nothing lost, nothing kept, and presets that are judged on the true pairs."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from test_components import CONF
from toys import Colours

from mllm_factory import ConfigError, DataError, Sample, Source, build
from mllm_factory.components.sources.exchanged import Exchanged


def exchanged(n: int, seed: int = 0, **options: Any) -> list[Sample]:
    source = Exchanged(Colours(n, **options), seed)
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("n", [2, 3, 50])
def test_every_item_goes_to_another_sample_and_words_stay(n: int) -> None:
    before = [Colours(n)[i] for i in range(n)]
    source = Exchanged(_Fixed(before), 0)
    after = [source[i] for i in range(n)]
    assert source.modalities == {"vision"}
    assert [(s.id, s.messages) for s in after] == [(s.id, s.messages) for s in before]
    owners = [next(i for i, s in enumerate(before) if s.media is sample.media) for sample in after]
    assert sorted(owners) == list(range(n))  # each item once
    assert all(owner != i for i, owner in enumerate(owners))
    place, seen = 0, set()
    while place not in seen:  # one circle
        seen.add(place)
        place = owners[place]
    assert len(seen) == n


class _Fixed(Source):
    """Some samples, the same objects at every call."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples, self.modalities = samples, frozenset({"vision"})

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def test_the_circle_is_that_of_the_seed() -> None:
    assert Exchanged(Colours(50), 3)._next.tolist() == Exchanged(Colours(50), 3)._next.tolist()
    assert Exchanged(Colours(50), 3)._next.tolist() != Exchanged(Colours(50), 4)._next.tolist()


def test_bad_options_and_samples_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="1 sample cannot be exchanged"):
        build(Source, {"name": "exchanged", "source": {"name": "easy_vqa", "split": "train", "limit": 1}})
    with pytest.raises(ConfigError, match="seed: -1 is negative"):
        build(Source, {"name": "exchanged", "source": {"name": "easy_vqa", "split": "train", "limit": 3}, "seed": -1})
    with pytest.raises(DataError, match="cannot exchange them"):
        exchanged(8, text_every=2)


@pytest.mark.parametrize("name", ["easy_vqa", "sounds"])
def test_the_presets_differ_from_the_plain_ones_in_training_data_alone(name: str) -> None:
    plain, control = (yaml.safe_load((CONF / "data" / f"{n}.yaml").read_text()) for n in (name, f"{name}_exchanged"))
    assert control["train"] == {"name": "exchanged", "source": plain["train"], "seed": 0}
    assert {**control, "train": None} == {**plain, "train": None}
