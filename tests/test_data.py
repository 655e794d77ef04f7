"""The collator, against rows put together by hand and against the library's tokenisation."""

from __future__ import annotations

import pickle
import random
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from toy_tokenizers import CORPUS, toy

from mllm_factory.data import Collator
from mllm_factory.errors import DataError
from mllm_factory.interfaces import Encoder
from mllm_factory.template import ChatTemplate
from mllm_factory.types import ASSISTANT, AUDIO, IGNORE_INDEX, PAD, TEXT, USER, VISION, Batch, Message, Sample

PAD_ID = 0
TOKENS = {"vision": 3, "audio": 2}
WORDS = " ".join(CORPUS).split()


def as_tiles(image: Image.Image) -> Tensor:
    """One item for each 8 columns: a wide picture is several items, [m, 3, 2, 2]."""
    tiles = max(1, image.width // 8)
    return torch.full((tiles, 3, 2, 2), float(np.asarray(image)[0, 0, 0]))


def as_frames(recording: tuple[Tensor, int]) -> Tensor:
    return recording[0].mean().expand(1, 4)


class Toy(Encoder):
    """Has a transform; the collator needs no more."""

    def __init__(self, modality: str) -> None:
        super().__init__()
        self.modality, self.dim, self.num_tokens = modality, 4, TOKENS[modality]
        self.transform = as_tiles if modality == "vision" else as_frames

    def forward(self, items: Tensor) -> Tensor:
        return items


@cache
def chatml() -> ChatTemplate:
    return ChatTemplate(toy("bytes-chatml"))


def collator(modalities: str = "vision audio", **options: object) -> Collator:
    encoders = {modality: Toy(modality) for modality in modalities.split()}
    return Collator(chatml(), PAD_ID, encoders, TOKENS, **options)


def picture(value: int = 7, tiles: int = 1) -> Image.Image:
    return Image.new("RGB", (8 * tiles, 8), (value, 0, 0))


def sample(question: str, answer: str | None = "The shape is blue.", name: str = "s", **media: tuple) -> Sample:
    answers = () if answer is None else (Message("assistant", answer),)
    return Sample(name, (Message("user", question), *answers), media)


SOUND = (torch.full((1, 10), 0.5), 8000)


def random_sample(seed: int) -> Sample:
    """Several turns with pictures of one to three tiles and recordings anywhere in the questions."""
    draw = random.Random(seed)
    messages, pictures, sounds = [], [], []
    for _ in range(draw.randint(1, 3)):
        words = draw.choices(WORDS, k=draw.randint(1, 12))
        for _ in range(draw.randint(0, 2)):
            mark = draw.choice(["<image>", "<audio>"])
            words.insert(draw.randint(0, len(words)), mark)
        for mark in (word for word in words if word.startswith("<")):
            pictures += [picture(draw.randint(0, 255), draw.randint(1, 3))] if mark == "<image>" else []
            sounds += [SOUND] if mark == "<audio>" else []
        messages += [
            Message("user", " ".join(words)),
            Message("assistant", " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))),
        ]
    return Sample(str(seed), tuple(messages), {"vision": tuple(pictures), "audio": tuple(sounds)})


def check_shapes(batch: Batch) -> None:
    """What every batch obeys."""
    shape = batch.input_ids.shape
    for name in ("labels", "attention_mask", "modality", "role"):
        assert getattr(batch, name).shape == shape
    assert batch.attention_mask.dtype == torch.bool
    assert {t.dtype for t in (batch.input_ids, batch.labels, batch.modality, batch.role)} == {torch.int64}
    for name, code in (("vision", VISION), ("audio", AUDIO)):
        rows = torch.bincount(batch.media_row[name], minlength=shape[0]) * TOKENS[name]
        assert ((batch.modality == code).sum(1) == rows).all()
        assert len(batch.media[name]) == len(batch.media_row[name])
    assert len(batch.ids) == len(batch.references) == shape[0]
    assert (batch.labels[batch.modality != TEXT] == IGNORE_INDEX).all()
    assert (batch.input_ids[batch.modality != TEXT] == PAD_ID).all()
    assert (batch.labels[~batch.attention_mask] == IGNORE_INDEX).all()
    labelled = batch.labels != IGNORE_INDEX
    assert (batch.labels[labelled] == batch.input_ids[labelled]).all()


def test_a_row_by_hand() -> None:
    tokenizer = toy("bytes-chatml")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    batch = collator()([sample("<image>\nWhat?", "blue", vision=(picture(9),))])
    before, after, answer, end = (
        ids("<|im_start|>user\n"),
        ids("\nWhat?<|im_end|>\n<|im_start|>assistant\n"),
        ids("blue<|im_end|>"),
        ids("\n"),
    )
    n = len(before)
    assert batch.input_ids.tolist() == [[*before, *[PAD_ID] * 3, *after, *answer, *end]]
    ignored = [IGNORE_INDEX] * (n + 3 + len(after))
    assert batch.labels.tolist() == [[*ignored, *answer, *[IGNORE_INDEX] * len(end)]]
    assert batch.modality.tolist() == [[TEXT] * n + [VISION] * 3 + [TEXT] * len([*after, *answer, *end])]
    assert (batch.role == ASSISTANT).tolist() == (batch.labels != IGNORE_INDEX).tolist()
    assert batch.role[0, n : n + 3].tolist() == [USER] * 3
    assert batch.attention_mask.all()
    assert batch.media["vision"].tolist() == as_tiles(picture(9)).tolist()
    assert batch.media["audio"].shape == (0, 4)
    assert {modality: rows.tolist() for modality, rows in batch.media_row.items()} == {"vision": [0], "audio": []}


def test_padding_and_media_order() -> None:
    samples = [random_sample(seed) for seed in range(12)]
    batch = collator()(samples)
    check_shapes(batch)
    assert batch.refused == 0
    assert batch.ids == tuple(s.id for s in samples)
    assert batch.references == tuple(s.messages[-1].text for s in samples)
    tiles = [(row, tile) for row, s in enumerate(samples) for image in s.media["vision"] for tile in as_tiles(image)]
    assert torch.equal(batch.media["vision"], torch.stack([tile for _, tile in tiles]))
    assert batch.media_row["vision"].tolist() == [row for row, _ in tiles]
    for row, s in enumerate(samples):  # a row does not depend on its neighbours
        alone = collator()([s])
        width = alone.input_ids.shape[1]
        assert torch.equal(batch.input_ids[row, :width], alone.input_ids[0])
        assert not batch.attention_mask[row, width:].any()
        assert (batch.role[row, width:] == PAD).all()


def test_prompts_are_left_padded_and_end_where_answers_start() -> None:
    samples = [random_sample(seed) for seed in range(12)]
    prompts, whole = collator().prompts(samples), collator()(samples)
    check_shapes(prompts)
    assert (prompts.labels == IGNORE_INDEX).all()
    assert prompts.references == whole.references
    assert torch.equal(prompts.media["vision"], whole.media["vision"])
    for row in range(len(samples)):
        kept = prompts.attention_mask[row]
        n = int(kept.sum())
        assert kept[-n:].all()
        assert torch.equal(prompts.input_ids[row, -n:], whole.input_ids[row, :n])
        last = (whole.labels[row] != IGNORE_INDEX).long()
        starts = ((last[1:] - last[:-1]) == 1).nonzero()[:, 0] + 1
        assert n == int(starts[-1])  # the last answer starts right there


def test_prompts_take_a_question_without_an_answer() -> None:
    batch = collator().prompts([sample("What?", None), sample("What?", "blue")])
    assert torch.equal(batch.input_ids[0], batch.input_ids[1])
    assert batch.references == ("", "blue")


def test_length_is_the_rows_length_without_decoding() -> None:
    collate = collator()
    one_tile = [s for s in map(random_sample, range(30)) if all(image.width == 8 for image in s.media["vision"])]
    assert one_tile
    for s in one_tile:
        unreadable = Sample(s.id, s.messages, {m: ("missing",) * len(raw) for m, raw in s.media.items()})
        assert collate.length(unreadable) == collate([s]).input_ids.shape[1]


@pytest.mark.parametrize("max_length", [8, 20, 40, 60, 90])
def test_cut_takes_text_from_the_end_and_never_media(max_length: int) -> None:
    outcomes = set()
    for seed in range(60):
        s = random_sample(seed)
        whole, batch = collator()([s]), collator(max_length=max_length)([s])
        media = whole.modality[0] != TEXT
        if batch.refused:
            outcomes.add("refused")
            room = max(0, max_length - int(media.sum()))
            words = (~media).nonzero()[:, 0][:room]
            labels = whole.labels[0][words[words > 0]]
            assert int(media.sum()) > max_length or (labels == IGNORE_INDEX).all()
            continue
        check_shapes(batch)
        cut = batch.input_ids.shape[1] < whole.input_ids.shape[1]
        outcomes.add("cut" if cut else "kept")
        assert batch.input_ids.shape[1] == min(max_length, whole.input_ids.shape[1])
        for name in batch.media:
            assert torch.equal(batch.media[name], whole.media[name])
        words = batch.input_ids[batch.modality == TEXT]
        assert torch.equal(words, whole.input_ids[whole.modality == TEXT][: len(words)])
        assert batch.num_labels > 0
    assert len(outcomes) >= 2 or max_length == 8


def test_refuse_leaves_out_and_counts_every_longer_sample() -> None:
    samples = [random_sample(seed) for seed in range(40)]
    lengths = [collator()([s]).input_ids.shape[1] for s in samples]
    limit = sorted(lengths)[20]
    batch = collator(max_length=limit, overflow="refuse")(samples)
    kept = [s.id for s, n in zip(samples, lengths, strict=True) if n <= limit]
    assert batch.ids == tuple(kept)
    assert batch.refused == 40 - len(kept) > 0
    check_shapes(batch)


@pytest.mark.parametrize("overflow", ["cut", "refuse"])
def test_long_prompts_are_left_out_and_counted(overflow: str) -> None:
    samples = [sample("What? " * 40, name="long"), sample("What?", name="short")]
    batch = collator(max_length=40, overflow=overflow).prompts(samples)
    assert (batch.ids, batch.refused) == (("short",), 1)
    none = collator(max_length=40, overflow=overflow).prompts(samples[:1])
    assert (none.ids, none.refused, none.input_ids.shape[0]) == ((), 1, 0)


def test_a_batch_that_lost_all_samples_keeps_legal_shapes() -> None:
    batch = collator(max_length=8, overflow="refuse")([sample("What? " * 40)])
    assert batch.refused == 1
    assert batch.input_ids.tolist() == [[PAD_ID]]
    assert batch.attention_mask.all()
    assert batch.num_labels == 0
    assert batch.media["vision"].shape == (0, 3, 2, 2)
    check_shapes(batch)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (sample("<image> and <image>", vision=(picture(),)), r"'s' has 2 <image> placeholder.*1 vision item"),
        (sample("no mark", vision=(picture(),)), r"'s' has 0 <image> placeholder.*1 vision item"),
        (sample("<audio>"), r"'s' has 1 <audio> placeholder.*0 audio item"),
        (sample("What?", None), r"'s' has no answer to learn from: '<\|im_start\|>user\\nWhat\?"),
        (sample("What?", "  "), "'s' has no answer to learn from"),
        (Sample("s", ()), "'s' has no answer to learn from: it has no messages"),
        (sample("<image>", vision=("/none/cat.png",)), r"'s': /none/cat\.png: no such file"),
        (sample("<image>", vision=(b"",)), "'s': the picture has no bytes"),
        (Sample("s", (Message("robot", "a"), Message("assistant", "b"))), "'s': turn 1 has the role 'robot'"),
    ],
)
def test_bad_samples_are_named(bad: Sample, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        collator()([sample("What?", name="good"), bad])
    assert "\n" not in str(caught.value)


def test_a_long_rendering_is_shortened() -> None:
    with pytest.raises(DataError) as caught:
        collator()([sample("What? " * 1000, None)])
    assert len(str(caught.value)) < 300


def test_media_without_an_encoder() -> None:
    with pytest.raises(DataError, match=r"'s' has 1 vision item.*no vision encoder; choose one \(vision="):
        collator("audio")([sample("<image>", vision=(picture(),))])
    batch = collator("")([sample("What?")])
    assert batch.media == {}


def test_no_messages_in_prompts() -> None:
    with pytest.raises(DataError, match="'s' has no messages"):
        collator().prompts([Sample("s", ())])


def test_unknown_modality_is_a_data_error() -> None:
    with pytest.raises(DataError, match="'s' has 1 video item"):
        collator()([sample("What?", video=("a.mp4",))])


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="cut, refuse, got 'drop'"):
        collator(overflow="drop")
    with pytest.raises(ValueError, match="max_length is at least 2"):
        collator(max_length=0)


def test_odd_pictures_reach_the_encoder(tmp_path: Path) -> None:
    kinds = {
        "cmyk.jpg": Image.new("CMYK", (8, 8)),
        "tiny.png": Image.new("P", (1, 1)),
        "wide.png": Image.new("L", (20000, 2)),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
    raw = BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(raw, "PNG")
    media = (*(str(tmp_path / name) for name in kinds), raw.getvalue())
    batch = collator(max_length=20000)([sample("<image>" * 4, vision=media)])
    assert batch.media["vision"].shape == (1 + 1 + 2500 + 1, 3, 2, 2)
    check_shapes(batch)


def test_pickles_for_workers() -> None:
    s = random_sample(3)
    copy = pickle.loads(pickle.dumps(collator()))  # noqa: S301
    assert torch.equal(copy([s]).input_ids, collator()([s]).input_ids)
