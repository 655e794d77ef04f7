"""Sources over shards, tables and other sources, against the libraries whose formats they read."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllm_factory import ConfigError, DataError, Message, Source, build
from mllm_factory.components.sources.hf_dataset import HFDataset
from mllm_factory.components.sources.mixture import Mixture
from mllm_factory.components.sources.tar_index import groups, members
from mllm_factory.components.sources.webdataset import WebDataset
from mllm_factory.loader import Order


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2), (value, 0, 0)).save(stream, "png")
    return stream.getvalue()


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


# ---------------------------------------------------------------- webdataset


def shards(folder: Path, counts: tuple[int, ...] = (5, 3, 4)) -> str:
    """Shards as the library writes them."""
    import webdataset

    i = 0
    for shard, count in enumerate(counts):
        with webdataset.TarWriter(str(folder / f"s-{shard:03d}.tar")) as writer:
            for _ in range(count):
                said = {"conversations": turns(f"question {i}?", f"answer {i}")}
                writer.write({"__key__": f"{i:06d}", "jpg": png(i), "json": said})
                i += 1
    return str(folder / f"s-{{000..{len(counts) - 1:03d}}}.tar")


def test_samples_are_those_the_library_reads(tmp_path: Path) -> None:
    import webdataset

    pattern = shards(tmp_path)
    source = WebDataset(pattern)
    theirs = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert len(source) == len(theirs) == 12 and source.modalities == {"vision"}
    for i, row in enumerate(theirs):
        sample = source[i]
        assert sample.id == f"s-{0 if i < 5 else 1 if i < 8 else 2:03d}.tar/{row['__key__']}"
        assert sample.media == {"vision": (row["jpg"],)}
        said = json.loads(row["json"])["conversations"]
        assert sample.messages == (
            Message("user", f"<image>\n{said[0]['value']}"),
            Message("assistant", said[1]["value"]),
        )
    assert [g.key for g in WebDataset(str(tmp_path / "*.tar"), limit=6)._groups] == [f"{i:06d}" for i in range(6)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_tarfile_reads_them(tmp_path: Path, form: int) -> None:
    names = ["a.txt", "sub/folder/0001.left.png", "sub/folder/0001.right.png", f"{'d' * 80}/{'n' * 70}.txt", "é 漢.txt"]
    if form != tarfile.USTAR_FORMAT:
        names.append(f"{'x' * 150}/{'long' * 40}.json")
    draw = random.Random(form)
    with tarfile.open(tmp_path / "t.tar", "w", format=form) as tar:
        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            data = draw.randbytes(draw.choice([0, 1, 511, 512, 513, 3000]))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(tmp_path / "t.tar") as tar:
        theirs = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    assert [tuple(m) for m in members(tmp_path / "t.tar")] == theirs
    assert [name for name, *_ in theirs] == names
    endings = {group.key: [part[0] for part in group.parts] for group in groups([tmp_path / "t.tar"])}
    assert endings["sub/folder/0001"] == ["left.png", "right.png"]


def test_shards_that_are_broken_are_named(tmp_path: Path) -> None:
    pattern = shards(tmp_path, (4, 4))
    whole = (tmp_path / "s-001.tar").read_bytes()
    last = max(m.start + m.size for m in members(tmp_path / "s-001.tar"))
    for cut in (100, 700, 1024, len(whole) // 2, last - 1, last):
        (tmp_path / "s-001.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"s-001\.tar: cut off.*; fetch the shard again"):
            WebDataset(pattern)
    (tmp_path / "s-001.tar").write_bytes(b"\x1f\x8b" + whole[2:])
    with pytest.raises(DataError, match=r"s-001\.tar: is compressed; unpack it first"):
        WebDataset(pattern)
    (tmp_path / "s-001.tar").write_bytes(b"junk" * 1000)
    with pytest.raises(DataError, match=r"s-001\.tar: no tar, or damaged at byte 0"):
        WebDataset(pattern)
    (tmp_path / "s-001.tar").unlink()
    with pytest.raises(DataError, match=r"s-001\.tar: no such file \(looked for /.*\); correct the path or fetch"):
        WebDataset(pattern)
    with pytest.raises(DataError, match="no file is named like this"):
        WebDataset(str(tmp_path / "t-*.tar"))
    with pytest.raises(ValueError, match="mix is at least 1"):
        WebDataset(pattern, mix=0)


def test_other_files_of_a_sample(tmp_path: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "t.tar")) as writer:
        writer.write({"__key__": "caption", "png": png(1), "txt": "A red square.", "cls": b"7"})
        writer.write({"__key__": "two", "0.png": png(1), "1.png": png(2), "json": turns("<image> or <image>?", "b")})
        writer.write({"__key__": "mute", "png": png(1)})
        writer.write({"__key__": "broken", "json": b"[{"})
        writer.write({"__key__": "who", "json": b'[{"from": "hman", "value": "a"}]'})
    source = WebDataset(str(tmp_path / "t.tar"), prompt="What is it?")
    assert source[0].messages == (Message("user", "<image>\nWhat is it?"), Message("assistant", "A red square."))
    assert source[1].media == {"vision": (png(1), png(2))}
    assert source[1].messages[0].text == "<image> or <image>?"
    for i, message in ((2, "neither a .json"), (3, "broken JSON"), (4, "turn 1 is from 'hman'; did you mean 'human'")):
        with pytest.raises(DataError, match=rf"t\.tar, (mute|broken|who): .*{message}"):
            source[i]


def test_an_epoch_reads_few_shards_at_once_and_every_sample_once(tmp_path: Path) -> None:
    sizes, mix = [40, 25, 60, 10, 35], 30
    order = Order(sum(sizes), 5, seed=3, near=(sizes, mix))
    shard = [k for k, n in enumerate(sizes) for _ in range(n)]
    epochs = []
    for epoch in range(2):
        seen = [i for g in range(34 * epoch, 34 * (epoch + 1)) for i in order[g]]
        assert sorted(seen) == list(range(170))
        for start in range(0, 170, mix):
            row = [shard[i] for i in seen[start : start + mix]]
            assert len(set(row)) <= 4
        first = [shard[i] for i in seen]
        assert sum(a != b for a, b in pairwise(first)) > 20, "mixed, not file by file"
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    again = Order(sum(sizes), 5, seed=3, near=(sizes, mix))
    assert again[50] == order[50], "a run continues at any batch"
    source = WebDataset(shards(tmp_path), mix=6)
    assert source.near == ([5, 3, 4], 6)


# ---------------------------------------------------------------- Hugging Face


def rows() -> list[dict[str, Any]]:
    return [
        {"name": f"r{i}", "conversations": turns(f"q{i}", f"a{i}"), "image": {"bytes": png(i), "path": None}}
        for i in range(7)
    ]


def test_parquet_and_saved_folders_are_the_same(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list(rows()).cast_column("image", datasets.Image())
    table.select(range(4)).to_parquet(str(tmp_path / "part-0.parquet"))
    table.select(range(4, 7)).to_parquet(str(tmp_path / "part-1.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    cache = str(tmp_path / "cache")
    for path in (str(tmp_path / "part-{0..1}.parquet"), str(tmp_path / "part-*.parquet"), str(tmp_path / "saved")):
        source = HFDataset(path, id="name", cache=cache)
        assert len(source) == 7 and source.modalities == {"vision"}
        for i in (0, 3, 6):
            sample = source[i]
            assert sample.id == f"r{i}" and sample.media == {"vision": (png(i),)}
            assert sample.messages == (Message("user", f"<image>\nq{i}"), Message("assistant", f"a{i}"))
        with pytest.raises(IndexError):
            source[7]
        assert len(HFDataset(path, id="name", cache=cache, limit=2)) == 2
    with pytest.raises(ValueError, match="image: there is no column 'imag'; did you mean 'image'"):
        HFDataset(str(tmp_path / "saved"), image="imag")
    whole = (tmp_path / "part-1.parquet").read_bytes()
    (tmp_path / "part-1.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"part-1\.parquet: no whole parquet file \(.*\); fetch it again"):
        HFDataset(str(tmp_path / "part-{0..1}.parquet"), cache=cache)
    with pytest.raises(DataError, match=r"part-2\.parquet: no such file"):
        HFDataset(str(tmp_path / "part-{0..2}.parquet"), cache=cache)
    with pytest.raises(DataError, match="no folder that save_to_disk wrote"):
        HFDataset(str(tmp_path))


def test_columns_of_questions_lists_and_paths(tmp_path: Path) -> None:
    import datasets

    table = [
        {"q": "same?", "a": ["yes", "yep"], "pictures": ["a.png", "b.png"], "n": 1},
        {"q": "none?", "a": ["no"], "pictures": [], "n": 2},
    ]
    datasets.Dataset.from_list(table).to_parquet(str(tmp_path / "d.parquet"))
    options: dict[str, Any] = {"turns": None, "question": "q", "answer": "a", "cache": str(tmp_path / "cache")}
    source = HFDataset(str(tmp_path / "d.parquet"), image="pictures", root="media", **options)
    assert source[0].messages == (Message("user", "<image><image>\nsame?"), Message("assistant", "yes"))
    assert source[0].media == {"vision": ("media/a.png", "media/b.png")}
    assert source[1].media == {} and source[1].messages[0].text == "none?"
    assert HFDataset(str(tmp_path / "d.parquet"), image=None, **options).modalities == frozenset()
    with pytest.raises(DataError, match=r"d\.parquet, row 0: column 'n' holds text, got int"):
        HFDataset(str(tmp_path / "d.parquet"), image=None, **{**options, "answer": "n"})[0]
    with pytest.raises(DataError, match=r"row 1: column 'n' holds paths, bytes or \{'bytes', 'path'\}, got int"):
        HFDataset(str(tmp_path / "d.parquet"), image="n", **options)[1]
    with pytest.raises(ValueError, match="turns: name a column of turns, or set it to null and name question"):
        HFDataset(str(tmp_path / "d.parquet"), turns=None)


# ---------------------------------------------------------------- mixtures


class Named(Source):
    """So many samples called by their number."""

    def __init__(self, n: int, modality: str | None = None) -> None:
        self.n, self.modalities = n, frozenset() if modality is None else frozenset({modality})

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        from mllm_factory import Sample

        if not 0 <= index < self.n:
            raise IndexError(index)
        return Sample(str(index), (Message("user", "q"), Message("assistant", "a")))


def drawn(source: Source) -> dict[str, Counter[str]]:
    """How often each sample of each source comes in an epoch."""
    found: dict[str, Counter[str]] = {}
    for i in range(len(source)):
        name, _, sample = source[i].id.partition("/")
        found.setdefault(name, Counter())[sample.partition("#")[0]] += 1
    return found


@pytest.mark.parametrize(
    ("sizes", "weights", "wanted"),
    [
        ({"a": 10, "b": 30}, {"a": 1.0, "b": 1.0}, {"a": 30, "b": 30}),
        ({"a": 10, "b": 30}, {"a": 3.0, "b": 1.0}, {"a": 90, "b": 30}),
        ({"a": 10, "b": 30}, None, {"a": 10, "b": 30}),
        ({"a": 7, "b": 20, "c": 9}, {"a": 0.2, "b": 0.5, "c": 0.3}, {"a": 8, "b": 20, "c": 12}),
    ],
)
def test_shares_are_exact_and_every_source_is_seen_whole(
    sizes: dict[str, int], weights: dict[str, float] | None, wanted: dict[str, int]
) -> None:
    source = Mixture({name: Named(n) for name, n in sizes.items()}, weights)
    found = drawn(source)
    assert {name: counts.total() for name, counts in found.items()} == wanted
    for name, counts in found.items():
        assert len(counts) == sizes[name]
        assert max(counts.values()) - min(counts.values()) <= 1, "no sample is favoured"
    ids = [source[i].id for i in range(len(source))]
    assert len(set(ids)) == len(ids)
    with pytest.raises(IndexError):
        source[len(source)]


def test_a_shorter_epoch_draws_and_names_must_agree() -> None:
    parts: dict[str, Source] = {"a": Named(100), "b": Named(10, "vision")}
    few, other = (Mixture(parts, {"a": 1.0, "b": 1.0}, samples=40, seed=seed) for seed in (0, 1))
    assert few.modalities == {"vision"}
    assert {k: v.total() for k, v in drawn(few).items()} == {"a": 20, "b": 20}
    assert len(drawn(few)["a"]) == 20 and drawn(few)["a"] != drawn(other)["a"]
    with pytest.raises(ValueError, match="weights: c is named in one of sources and weights only"):
        Mixture(parts, {"a": 1.0, "b": 1.0, "c": 1.0})
    with pytest.raises(ValueError, match="weights: b has 0.0; use a number above 0"):
        Mixture(parts, {"a": 1.0, "b": 0.0})
    node = {"name": "mixture", "sources": {"x": {"name": "easy_vqa", "split": "test", "limit": 4}}}
    assert build(Source, node)[0].id == "x/easy_vqa/test/0"
    with pytest.raises(ConfigError, match=r"sources\.x.*did you mean 'test'"):
        build(Source, {"name": "mixture", "sources": {"x": {"name": "easy_vqa", "split": "tst"}}})
