"""Built-in data sets, against published counts and files written by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import easy_vqa
import pytest
from PIL import Image

from mllm_factory import DataError, Message
from mllm_factory.components.sources.easy_vqa import EasyVQA
from mllm_factory.components.sources.llava_json import LlavaJson

# ---------------------------------------------------------------- easy-VQA


@pytest.mark.parametrize(("split", "published"), [("train", 38575), ("test", 9673)])
def test_easy_vqa_is_what_the_package_gives(split: str, published: int) -> None:
    source = EasyVQA(split)
    questions, answers, pictures = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    assert len(source) == len(questions) == published
    assert source.modalities == {"vision"}
    for i in (0, 1, 123, published // 2, published - 1):
        sample = source[i]
        assert sample.messages == (Message("user", f"<image>\n{questions[i]}"), Message("assistant", answers[i]))
        assert Path(sample.media["vision"][0]).samefile(paths[pictures[i]])
        assert sample.id == f"easy_vqa/{split}/{i}"
    with pytest.raises(IndexError):
        source[published]


def test_easy_vqa_options(monkeypatch: pytest.MonkeyPatch) -> None:
    some = EasyVQA("test", limit=64)
    assert len(some) == 64
    assert len({some[i].media["vision"] for i in range(64)}) == 7
    assert len(EasyVQA("test", limit=10**6)) == 9673
    with pytest.raises(ValueError, match="no split is named 'tests'; did you mean 'test'"):
        EasyVQA("tests")
    with pytest.raises(ValueError, match="limit is at least 1"):
        EasyVQA("test", limit=0)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "easy_vqa")
    with pytest.raises(ValueError, match="pip install easy-vqa"):
        EasyVQA("test")


# ---------------------------------------------------------------- LLaVA files

ENTRIES: list[dict[str, Any]] = [
    {
        "id": "one",
        "image": "a/1.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    },
    {
        "id": 2,
        "images": ["a/1.png", "a/2.png"],
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "<image><image> Same?"},
            {"from": "gpt", "value": "No."},
            {"from": "human", "value": "Sure? Ümläut"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "image": None},
    {
        "id": "s",
        "audio": "b.wav",
        "messages": [{"role": "user", "content": "<audio>"}, {"role": "assistant", "content": "Rain."}],
    },
]


def as_array(entries: list) -> str:
    return json.dumps(entries, indent=1, ensure_ascii=False)


def as_lines(entries: list) -> str:
    return "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n"


def written(folder: Path, text: str, name: str = "data.jsonl") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize(("name", "form"), [("d.json", as_array), ("d.jsonl", as_lines)])
def test_llava_file(tmp_path: Path, name: str, form: Callable[[list], str]) -> None:
    source = LlavaJson(written(tmp_path, form(ENTRIES), name))
    assert len(source) == 4
    assert source.modalities == {"vision", "audio"}
    samples = [source[i] for i in (3, 2, 1, 0)][::-1]
    assert [s.id for s in samples] == ["one", "2", "2", "s"]
    assert samples[0].messages == (Message("user", "<image>\nWhat?"), Message("assistant", "A cat."))
    assert [m.role for m in samples[1].messages] == ["system", "user", "assistant", "user", "assistant"]
    assert samples[1].messages[3].text == "Sure? Ümläut"
    assert samples[1].media == {"vision": (str(tmp_path / "a/1.png"), str(tmp_path / "a/2.png"))}
    assert samples[2].media == {}
    assert samples[3].media == {"audio": (str(tmp_path / "b.wav"),)}
    assert samples[3].messages[1] == Message("assistant", "Rain.")
    with pytest.raises(IndexError):
        source[4]


def test_root_and_limit(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    path = written(tmp_path, as_lines(ENTRIES) + "broken, but behind the limit\n")
    source = LlavaJson(path, root=str(media), limit=2)
    assert len(source) == 2
    assert source.modalities == {"vision"}
    assert source[0].media["vision"] == (str(media / "a/1.png"),)
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    absolute = [{**ENTRIES[0], "image": str(tmp_path / "x.png")}]
    assert LlavaJson(written(tmp_path, as_lines(absolute), "x.jsonl"), root=str(media))[0].media["vision"] == (
        str(tmp_path / "x.png"),
    )
    with pytest.raises(DataError, match="no such folder"):
        LlavaJson(path, root=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="limit is at least 1"):
        LlavaJson(path, limit=0)


def test_blank_lines_and_byte_order_marks(tmp_path: Path) -> None:
    for name, form in (("d.json", as_array), ("d.jsonl", as_lines)):
        text = form(ENTRIES).replace("}\n{", "}\n\n  \n{") + "\n\n"
        source = LlavaJson(written(tmp_path, "\ufeff" + text, name))
        assert [source[i].id for i in range(len(source))] == ["one", "2", "2", "s"]


def test_broken_line_is_named(tmp_path: Path) -> None:
    lines = as_lines(ENTRIES).splitlines()
    lines[2] = lines[2][:-9]
    path = written(tmp_path, "\n".join(lines))
    with pytest.raises(DataError, match=r"data\.jsonl, line 3: broken JSON, .* at column \d+$"):
        LlavaJson(path)
    array = written(tmp_path, '[\n{"conversations": []},\n{"id" 7}\n]', "data.json")
    with pytest.raises(DataError, match=r"data\.json, line 3: broken JSON, .* at column 7$"):
        LlavaJson(array)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"id": "x"}, "needs 'conversations'"),
        ({"conversations": []}, "needs 'conversations'"),
        ([1], "a sample is an object, got list"),
        ({"conversations": [{"from": "hman", "value": "a"}]}, "turn 1 is from 'hman'; did you mean 'human'"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "turn 1 is from"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 1 needs its text in 'value', got int"),
        ({"conversations": ["hello"]}, "turn 1 is an object"),
        ({**ENTRIES[0], "image": 5}, "'image' is a path or a list of paths, got 5"),
        ({**ENTRIES[0], "image": ""}, "'image' is a path"),
    ],
)
def test_bad_entries_are_named(tmp_path: Path, entry: object, message: str) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl, line 2: .*{message}"):
        LlavaJson(written(tmp_path, as_lines([ENTRIES[0], entry])))
    with pytest.raises(DataError, match=rf"data\.json, entry 1: .*{message}"):
        LlavaJson(written(tmp_path, as_array([ENTRIES[0], entry]), "data.json"))


def test_several_bad_lines_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        LlavaJson(written(tmp_path, "{\n" * 50))
    message = str(caught.value)
    assert message.count("broken JSON") == 5
    assert "line 5:" in message
    assert "\n" not in message


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: no such file \(looked for /.*none\.json\)"):
        LlavaJson(str(tmp_path / "none.json"))
    for name in ("a.json", "a.jsonl"):
        with pytest.raises(DataError, match="holds no samples" if name == "a.jsonl" else "line 1: broken JSON"):
            LlavaJson(written(tmp_path, "", name))
    with pytest.raises(DataError, match="holds no samples"):
        LlavaJson(written(tmp_path, "[]", "b.json"))
    with pytest.raises(DataError, match="an array of samples, got dict"):
        LlavaJson(written(tmp_path, "{}", "c.json"))
    with pytest.raises(ValueError, match=r"ends in \.json .* or \.jsonl"):
        LlavaJson(str(tmp_path / "d.csv"))
    (tmp_path / "e.jsonl").write_bytes(b'{"id": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"e\.jsonl, line 1: not UTF-8"):
        LlavaJson(str(tmp_path / "e.jsonl"))
