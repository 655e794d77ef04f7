"""Shards in the layout of webdataset (github.com/webdataset/webdataset): tars in which the files of a sample follow one another.

Their headers are read once, so that every sample has a number and a place. A run therefore continues exactly where it was,
however many processes and loader workers share the shards; a stream with a shuffle buffer could only be repeated.
"""

from __future__ import annotations

import json
from typing import Any

from mllm_factory import DataError, Message, Sample, Source, register
from mllm_factory.components.sources.conversation import marked, messages_of
from mllm_factory.components.sources.tar_index import Group, expand, groups

ENDINGS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp", "ppm", "tif", "tiff"), "vision"),
    **dict.fromkeys(("wav", "flac", "ogg", "mp3", "opus"), "audio"),
}
"""What a file of a sample is, by the last part of its name."""


@register("webdataset")
class WebDataset(Source):
    """Samples of local shards: pictures and recordings beside a ``.json`` of turns, or a ``.txt`` that answers ``prompt``.

    A ``.json`` holds ``conversations`` or ``messages`` as in LLaVA's files. Where its texts mark no media, the marks are put
    before the first one. Other files of a sample are left alone.

    An epoch goes through the shards in random order and mixes ``mix`` samples at a time, as a shuffle buffer would, so that
    few shards are read at once. Every sample comes once, and the order depends on seed and epoch alone.

    Args:
        shards: a path with ``{000..012}`` or ``*``.
        prompt: what a ``.txt`` answers.
        mix: samples that are mixed at a time; None: all.
        limit: use the first so many samples; later shards are not looked at.

    Raises:
        ValueError: a mix or limit below 1.
        DataError: a shard that is missing, cut off or no plain tar, or no samples; names the file.
    """

    def __init__(
        self, shards: str, prompt: str = "Describe it.", mix: int | None = 10_000, limit: int | None = None
    ) -> None:
        for name, value in (("mix", mix), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1 sample, got {value}; null takes all")
        self._paths, self._prompt = expand(shards), prompt
        self._groups = list(groups(self._paths, limit))
        if not self._groups:
            raise DataError(f"{shards}: the shards hold no samples")
        self.modalities = frozenset(
            modality for group in self._groups for ending, *_ in group.parts if (modality := _modality(ending))
        )
        counts = [0] * len(self._paths)
        for group in self._groups:
            counts[group.shard] += 1
        self.near = None if mix is None else (counts, mix)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``; its media are bytes."""
        group = self._groups[index]
        name = f"{self._paths[group.shard].name}/{group.key}"
        try:
            return self._sample(name, group)
        except DataError as error:
            raise DataError(f"{self._paths[group.shard]}, {group.key}: {error}") from error

    def _sample(self, name: str, group: Group) -> Sample:
        media: dict[str, list[bytes]] = {}
        messages: tuple[Message, ...] | None = None
        with self._paths[group.shard].open("rb") as file:
            for ending, start, size in group.parts:
                modality = _modality(ending)
                if modality is None and ending not in ("json", "txt"):
                    continue
                file.seek(start)
                data = file.read(size)
                if modality is not None:
                    media.setdefault(modality, []).append(data)
                else:
                    messages = _said(ending, data, self._prompt)
        if messages is None:
            raise DataError("it has neither a .json of turns nor a .txt; add one")
        return Sample(name, marked(messages, media), {modality: tuple(items) for modality, items in media.items()})


def _modality(ending: str) -> str | None:
    return ENDINGS.get(ending.rpartition(".")[2])


def _said(ending: str, data: bytes, prompt: str) -> tuple[Message, ...]:
    """The turns that a file holds."""
    try:
        if ending == "txt":
            return Message("user", prompt), Message("assistant", data.decode())
        entry: Any = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise DataError(f".{ending}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(f".json: broken JSON, {error.msg} at column {error.colno}") from error
    turns = entry.get("conversations", entry.get("messages")) if isinstance(entry, dict) else entry
    return messages_of(turns)
