"""Files of any size by the places of their entries, against Python's own JSON reader."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mllm_factory import DataError
from mllm_factory.components.sources import json_index
from mllm_factory.components.sources.json_index import JsonIndex
from mllm_factory.components.sources.llava_json import LlavaJson

PIECES = [
    '"',
    "\\",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    "\n",
    "\t",
    "é",
    "漢",
    "😀",
    "\\\\",
    '\\"',
    " ",
    "a",
    "null",
    "\u2028",
]


def value(draw: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can say, with every character that could fool a reader."""
    kind = draw.randint(0, 4 if depth > 2 else 6)
    if kind <= 2:
        return "".join(draw.choices(PIECES, k=draw.randint(0, 12)))
    if kind == 3:
        return draw.choice([1, -2.5e-3, True, None])
    if kind == 4:
        return draw.choice([[], {}, ""])
    if kind == 5:
        return [value(draw, depth + 1) for _ in range(draw.randint(0, 4))]
    return {f"{i}{draw.choice(PIECES)}": value(draw, depth + 1) for i in range(draw.randint(0, 4))}


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 22])
@pytest.mark.parametrize("seed", range(12))
def test_entries_are_those_that_json_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, chunk: int
) -> None:
    monkeypatch.setattr(json_index, "CHUNK", chunk)
    draw = random.Random(seed)
    entries = [value(draw) for _ in range(draw.randint(1, 30))]
    ascii_only, indent = draw.random() < 0.5, draw.choice([None, 0, 3])
    head = "\ufeff" if chunk >= 64 and seed % 3 == 0 else ""
    for name, text in (
        ("d.json", json.dumps(entries, ensure_ascii=ascii_only, indent=indent) + draw.choice(["", "\n \n"])),
        ("d.jsonl", "\n\n  \n".join(json.dumps(e, ensure_ascii=ascii_only) for e in entries) + draw.choice(["", "\n"])),
    ):
        if chunk == 1 and not text.startswith("["):
            continue
        (tmp_path / name).write_text(head + text, encoding="utf-8")
        index = JsonIndex(tmp_path / name)
        assert [index[i] for i in range(len(index))] == entries
        some = JsonIndex(tmp_path / name, limit=3)
        assert [some[i] for i in range(len(some))] == entries[:3]


def entry(i: int, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f'What is "{i}"? {"word " * 40}'}, {"from": "gpt", "value": "A, [number]."}]
    return {"id": f"s{i}", "conversations": turns, **more}


def write(file: Path, entries: list[Any]) -> str:
    lines = [e if isinstance(e, str) else json.dumps(e) for e in entries]
    text = "\n".join(lines) if file.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_what_was_not_checked_is_checked_when_it_is_read(tmp_path: Path, name: str) -> None:
    entries: list[Any] = [entry(i) for i in range(40)]
    entries[17] = '{"id": "s17", "conversations" []}'
    entries[23] = entry(23, conversations=[{"from": "hman", "value": "a"}])
    entries[31] = entry(31, images=[], audio="a.wav")
    path = write(tmp_path / name, entries)
    line = 18 if name == "d.jsonl" else 19
    broken = rf"{name}, line {line}: broken JSON, Expecting ':' delimiter at column 31"
    with pytest.raises(DataError, match=broken):
        LlavaJson(path, check=None)
    with pytest.raises(DataError, match=broken):
        LlavaJson(path)
    source = LlavaJson(path, check=2)
    assert len(source) == 40
    assert source.modalities == {"audio"}, "found without reading every entry"
    assert source[39].id == "s39"
    with pytest.raises(DataError, match=broken):
        source[17]
    with pytest.raises(DataError, match=rf"{name}, (line 24|entry 23): turn 1 is from 'hman'"):
        source[23]
    with pytest.raises(ValueError, match="check is at least 1"):
        LlavaJson(path, check=0)


def test_modalities_beyond_what_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_index, "CHUNK", 301)
    traps = [entry(i, image=None, audios=[], note={"audio": "x.wav"}) for i in range(50)]
    traps[20]["conversations"][0]["value"] = 'He wrote "audio": "a.wav" and \\"image\\": "b.png".'
    path = write(tmp_path / "d.jsonl", traps)
    assert LlavaJson(path, check=1).modalities == LlavaJson(path).modalities == frozenset()
    path = write(tmp_path / "e.jsonl", [*traps, entry(50, image="a.png"), entry(51)])
    assert LlavaJson(path, check=2).modalities == {"vision"}
    assert LlavaJson(path, check=2, limit=50).modalities == frozenset()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}', "line 1: broken JSON"),
        ('[{"a": 1}\n,\n{"a": "x]', "line 3: broken JSON, Unterminated string"),
        ('[{"a": 1}]\n[]', "line 2: broken JSON, Extra data"),
        ('{"a": [1]}\n{"a": [2]}', "line 2: broken JSON, Extra data"),
        ("[1, 2]]", "line 1: broken JSON, Extra data"),
        ('"text"', "holds an array of samples, got str"),
        (" \n ", "line 2: broken JSON"),
    ],
)
def test_arrays_that_are_none_are_told_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(DataError, match=rf"d\.json[,:] (a \.json file )?{message}"):
        JsonIndex(tmp_path / "d.json")


def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    source = LlavaJson(write(path, [entry(i) for i in range(3)]))
    write(path, [entry(i) for i in (7, 8, 9)])
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match=r"d\.jsonl: the file was changed since the run opened it"):
        source[1]


def test_places_in_large_files_are_kept_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_FACTORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(json_index, "LARGE", 1000)
    path = tmp_path / "d.json"
    write(path, [entry(i) for i in range(20)])
    first = LlavaJson(str(path))
    (kept,) = (tmp_path / "cache" / "index").iterdir()
    monkeypatch.setattr(json_index, "_elements", None)  # it is not looked for again
    again = LlavaJson(str(path))
    assert [again[i] for i in range(20)] == [first[i] for i in range(20)]
    monkeypatch.undo()
    monkeypatch.setenv("MLLM_FACTORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(json_index, "LARGE", 1000)
    write(path, [entry(i) for i in range(25)])
    assert len(LlavaJson(str(path))) == 25, "a changed file is read anew"
    kept.write_bytes(kept.read_bytes()[:100])
    write(path, [entry(i) for i in range(20)])
    os.utime(path, ns=first._index._state[1:] * 2)
    assert len(LlavaJson(str(path))) == 20, "what was cut off is made again"
    monkeypatch.setenv("MLLM_FACTORY_CACHE", str(path))  # no folder: nothing can be kept
    assert len(LlavaJson(str(path))) == 20


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(json_index, "CHUNK", 1 << 16)
    path = write(tmp_path / name, [entry(i) for i in range(20_000)])
    size = os.path.getsize(path)
    assert size > 6e6
    tracemalloc.start()
    source = LlavaJson(path, check=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == 20_000 and source[19_999].id == "s19999"
    assert peak < 0.4 * size, f"{peak / 1e6:.1f} MB for a file of {size / 1e6:.1f} MB"
