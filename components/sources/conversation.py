"""Turns of a conversation as data sets write them down, checked: shared by the sources that read files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mllm_factory import DataError, Message, hint

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MARKS = {"vision": "<image>", "audio": "<audio>"}


def messages_of(turns: Any, name: str = "conversations") -> tuple[Message, ...]:
    """Messages of a list of ``{"from", "value"}`` or ``{"role", "content"}`` turns.

    Raises:
        DataError: no such list; names what it lacks.
    """
    if not isinstance(turns, list) or not turns:
        raise DataError(f"a sample needs '{name}', a list of {{'from', 'value'}} turns")
    return tuple(_message(turn, number) for number, turn in enumerate(turns, 1))


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"turn {number} is an object with 'from' and 'value', got {type(turn).__name__}")
    speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise DataError(f"turn {number} is from '{speaker}'{hint(str(speaker), ROLES)}")
    if not isinstance(text, str):
        raise DataError(f"turn {number} needs its text in 'value', got {type(text).__name__}")
    return Message(ROLES[speaker], text)


def marked(messages: Sequence[Message], media: Mapping[str, Sequence[Any]]) -> tuple[Message, ...]:
    """The messages; of a modality that no text of theirs marks, one mark an item is put before the first user text."""
    said = "".join(m.text for m in messages if m.role != "assistant")
    missing = "".join(MARKS[name] * len(items) for name, items in media.items() if MARKS[name] not in said)
    first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if not missing or first is None:
        return tuple(messages)
    user = Message("user", f"{missing}\n{messages[first].text}")
    return (*messages[:first], user, *messages[first + 1 :])
