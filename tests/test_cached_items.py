"""Loader workers that send the places of cached features: the same training, fewer pictures decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from toys import Colours, Patches, tree

from mllm_factory import Sample, media
from mllm_factory.assemble import build_collator, build_model
from mllm_factory.cached_items import CachedItems, digests
from mllm_factory.features import cache_features


class Files(Colours):
    """The same pictures in files."""

    def __init__(self, folder: str, n: int = 32) -> None:
        super().__init__(n)
        self.folder = Path(folder)

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index % 12)
        path = self.folder / f"{index % 12}.png"
        if not path.exists():
            sample.media["vision"][0].save(path)
        return Sample(f"{index}", sample.messages, {"vision": (str(path),)})


def test_what_is_stored_is_told_by_place(tmp_path: Path) -> None:
    encoder = Patches()
    encoder.requires_grad_(False)
    plain, seen = Patches(), CachedItems(tmp_path / "features.f32")
    plain.load_state_dict(encoder.state_dict())
    items = torch.rand(5, 3, 8, 8)
    assert seen.all_of(["a"]) is None, "nothing is cached before the run starts"
    assert cache_features(encoder, tmp_path / "features.f32")
    for name, item in zip("abcde", items, strict=True):
        seen.learn(name, item[None])
    assert seen.all_of(["a", "b"]) is None, "known but not stored"
    with torch.no_grad():
        wanted = plain(items)
        encoder(items[:3])
        assert seen.all_of(["a", "d"]) is None, "one of them is not stored"
        places = seen.all_of(["c", "a", "c"])
        assert places is not None and [p.tolist() for p in places] == [[2], [0], [2]]
        torch.testing.assert_close(encoder(torch.cat(places)), wanted[[2, 0, 2]])
        encoder(items)
        places = seen.all_of(["e", b"bytes"])
        assert places is None, "bytes that were never seen"
    seen.learn(b"bytes", items[3:5])  # a tiled picture: two items
    assert [p.tolist() for p in seen.all_of([b"bytes", "a"]) or []] == [[3, 4], [0]]
    seen.learn(items, items)
    assert seen.all_of([items]) is None, "decoded items have no name"
    assert digests(items)[3:5] == seen.items[next(k for k in seen.items if isinstance(k, bytes))]


def test_a_batch_of_cached_items_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = tree()
    model = build_model(node)
    cache_features(model.encoders["vision"], tmp_path / "v.f32")
    collator = build_collator(node, model)
    training = collator.for_training(stored={"vision": CachedItems(tmp_path / "v.f32")})
    source = Files(str(tmp_path))
    samples = [source[i] for i in (0, 1, 2, 1)]
    with torch.no_grad():
        first = training(samples)
        assert first.media["vision"].shape == (4, 3, 8, 8)
        loss = model(first).loss_sum

        def refuse(raw: Any) -> Any:
            raise AssertionError(raw)

        monkeypatch.setitem(media.LOADERS, "vision", refuse)
        again = training(samples)
        assert again.media["vision"].tolist() == [0, 1, 2, 1]
        assert again.media_row["vision"].tolist() == [0, 1, 2, 3]
        assert torch.equal(model(again).loss_sum, loss)
        with pytest.raises(AssertionError):
            training([*samples, source[3]])
        with pytest.raises(AssertionError):
            collator(samples)  # an evaluation looks at the pictures


@pytest.mark.slow
def test_training_is_the_same_with_workers_and_cached_items(tmp_path: Path) -> None:
    """Bit for bit, whoever decodes; in the end nothing is decoded any more."""
    folders = {}
    for name, workers, cached in (("plain", 0, False), ("cached", 0, True), ("workers", 2, True)):
        folder = folders[name] = tmp_path / name
        node = tree(folder, data__train={"name": "test_cached_items:Files", "folder": str(tmp_path), "n": 32})
        node["trainer"] |= {"max_steps": 24, "workers": workers, "cache_features": cached, "save_every": 24}
        node["metrics"] = {}
        jobs.run(node, tmp_path / f"{name}.log")
    found = {name: [line["loss"] for line in jobs.lines(folder)] for name, folder in folders.items()}
    assert found["cached"] == found["workers"] and len(found["cached"]) == 24
    assert found["cached"] == pytest.approx(found["plain"], rel=1e-5)
    assert (tmp_path / "workers/features/vision_0.items").stat().st_size == 16 * 4, "four pictures differ"


def test_reading_pixels_is_announced() -> None:
    from mllm_factory.components.schedules.commit import Commit
    from mllm_factory.components.schedules.cosine import Cosine

    assert Commit.reads_media and not Cosine.reads_media
