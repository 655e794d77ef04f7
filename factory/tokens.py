"""Pieces of a row's text to token ids, such that joining the pieces gives what tokenising the row at once would give.

Two habits of tokenizers stand in the way. Some put a blank in front of whatever they are given; a piece from the middle of a
row is therefore tokenised behind a special token (the anchor), whose id is dropped, and where that does not help, a blank that
the piece itself starts with is left to the tokenizer. And all read control tokens (``<|im_end|>``) out of any text; a message
that contains one is tokenised apart, with ``split_special_tokens``, so that nobody can write a turn into another's message.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = list[tuple[int, int]]


class Run(NamedTuple):
    """Characters of one origin: a template's words, or (``content``) a message's text."""

    text: str
    role: int
    content: bool = False


class PieceTokenizer:
    """Tokenises pieces.

    Args:
        tokenizer: any transformers tokenizer; one without offsets has each run tokenised apart.
        control: the added tokens that only a template may write.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: dict[str, int]) -> None:
        self.tokenizer = tokenizer
        self._control = re.compile("|".join(re.escape(t) for t in sorted(control, key=len, reverse=True)) or r"(?!)")
        self._control_ids = set(control.values())
        self._cache: dict[tuple[str, bool], tuple[list[int], Spans]] = {}
        self._anchor, self._adds_blank = "", False
        self._anchor = self._find_anchor()
        a, b, both = (self._encode(text, False, False)[0] for text in ("a", "b", "b a"))
        self._adds_blank = both[len(b) :] == a

    def __call__(self, runs: list[Run], first: bool) -> tuple[list[int], list[int]]:
        """Token ids and their roles; ``first`` where nothing stands before the piece."""
        groups: list[tuple[list[Run], bool]] = []
        for run in runs:
            unsafe = run.content and self._control.search(run.text) is not None
            if groups and not unsafe and not groups[-1][1] and self.tokenizer.is_fast:
                groups[-1][0].append(run)
            else:
                groups.append(([run], unsafe))
        ids: list[int] = []
        roles: list[int] = []
        for group, unsafe in groups:
            found, spans = self._lookup("".join(run.text for run in group), first and not ids, unsafe, group)
            ids += found
            roles += _roles(group, spans)
        return ids, roles

    def _lookup(self, text: str, first: bool, unsafe: bool, runs: list[Run]) -> tuple[list[int], Spans]:
        if any(run.content for run in runs):
            return self._encode(text, first, unsafe)
        if (text, first) not in self._cache:  # a template has few words of its own
            self._cache[text, first] = self._encode(text, first, unsafe)
        return self._cache[text, first]

    def _encode(self, text: str, first: bool, unsafe: bool) -> tuple[list[int], Spans]:
        """Ids, and for each the characters [start, end) of ``text`` that it stands for."""
        cut = int(not first and self._adds_blank and text[:1] == " ")
        anchor = "" if first or unsafe else self._anchor
        ids, spans = self._raw(anchor + text[cut:], unsafe)
        if anchor:
            ids, spans = ids[1:], spans[1:]
        if unsafe and not self._control_ids.isdisjoint(ids):  # added, but not as special: split_special_tokens keeps it
            return self._broken(text)
        shift = cut - len(anchor)
        return ids, [(max(a + shift, 0), max(b + shift, 0)) for a, b in spans]

    def _broken(self, text: str) -> tuple[list[int], Spans]:
        """``text`` cut behind the first character of each control token in it, so that none is whole."""
        cuts = [0, *(match.start() + 1 for match in self._control.finditer(text)), len(text)]
        ids: list[int] = []
        spans: Spans = []
        for start, end in pairwise(cuts):
            found, places = self._raw(text[start:end], True)
            ids += found
            spans += [(a + start, b + start) for a, b in places]
        return ids, spans

    def _raw(self, text: str, split: bool) -> tuple[list[int], Spans]:
        if not self.tokenizer.is_fast:
            ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
            return list(ids), [(0, len(text))] * len(ids)
        backend = self.tokenizer.backend_tokenizer  # a call of the tokenizer itself takes three times as long
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = split
        encoding = backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _find_anchor(self) -> str:
        """A special token that leaves its right neighbour as it is."""
        for i, token in self.tokenizer.added_tokens_decoder.items():
            plain = token.special and not (token.rstrip or token.lstrip or token.single_word)
            if plain and self.tokenizer.is_fast and self._raw(token.content + "a", False)[0][:1] == [i]:
                return token.content
        return ""


def _roles(runs: list[Run], spans: Spans) -> list[int]:
    """The role of each token: where one covers words and a message, the message wins; an added blank covers nothing."""
    if len({run.role for run in runs}) == 1:
        return [runs[0].role] * len(spans)
    kinds = [run.role for run in runs for _ in run.text]
    return [max(kinds[a:b] or kinds[a : a + 1] or kinds[-1:]) for a, b in spans]
