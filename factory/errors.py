"""Errors that a user can act on. The command line prints them as one line each and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class UserError(Exception):
    """Something the user gave does not work; the message names the value, the rule and the way out.

    ``shown`` is set once it was printed.
    """

    shown = False


class DataError(UserError):
    """A sample, a picture, a recording or a data file that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or continued."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration.

    ``key`` is the dotted path in the tree (``projector.depth``); ``origin`` the file and line or the override it came from.
    """

    message: str
    key: str = ""
    origin: str = ""

    def __str__(self) -> str:
        where = f" (from {self.origin})" if self.origin else ""
        return f"{self.key}: {self.message}{where}" if self.key else f"{self.message}{where}"


class ConfigError(UserError):
    """A configuration names something that does not exist or does not fit; carries every problem found."""

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = [Problem(problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))


def listed(words: Iterable[str]) -> str:
    """``a, b, c`` or ``none``."""
    return ", ".join(sorted(words)) or "none"


def hint(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'mlp'? known: linear, mlp``, to append to a message about an unknown word.

    Of many known words only those most like it are listed.
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    shown, more = listed(known), ""
    if len(known) > MANY:
        shown, more = (
            listed(difflib.get_close_matches(word, known, n=MANY // 2, cutoff=0.0)),
            f", ... ({len(known)} in all)",
        )
    return (f"; did you mean '{close[0]}'?" if close else ";") + f" known: {shown}{more}"


MANY = 16
"""Known words that a message lists; of more it lists half as many."""


def one_line(error: BaseException, most: int | None = None, kind: bool = False) -> str:
    """An error's text on one line, cut to ``most`` characters; its type with ``kind`` in front, and alone where there is no text."""
    text, name = " ".join(str(error).split())[:most], type(error).__name__
    return (f"{name}: {text}" if kind else text) if text else name


class WorkerError(DataError):
    """A loader worker was killed."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(
            f"a loader worker was killed, most likely because memory was short ({one_line(error, 120)}); lower "
            "trainer.workers or trainer.batch_size, and go on with resume=auto"
        )


def lost_worker(error: BaseException) -> bool:
    """Whether torch tells that a loader worker died; it does so from a signal's handler, wherever the process happens to be."""
    return str(error).startswith("DataLoader worker")


def no_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's own error, or torch's words on the CPU and on CUDA."""
    said = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)
