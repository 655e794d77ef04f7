"""Conversations to tokens with exact spans, through the tokenizer's own chat template.

The template is rendered once per sequence of roles with marks in place of the texts; what stands between the marks are
the template's own words. Real text is never searched or split for them, so nothing that a text contains can shift a label.

A row is cut where a media item stands, where an answer starts and after an answer's end token, and each piece is tokenised
by itself: the tokens before an answer are the same in training and in generation. An answer starts at its text, or, if the
template's generation prompt ends some blanks earlier (``[/INST]`` before `` yes``), right there, as the library would have it.

Control tokens written inside a text stay text (see ``tokens.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mllm_factory.errors import ConfigError, DataError, hint, one_line
from mllm_factory.tokens import PieceTokenizer, Run
from mllm_factory.types import ASSISTANT, PLACEHOLDERS, SYSTEM, USER, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
_MEDIA = re.compile("(" + "|".join(map(re.escape, PLACEHOLDERS)) + ")")
_REMEDY = "set backbone.template to chatml, vicuna, plain or a .jinja file"

TEMPLATES: dict[str, str] = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "vicuna": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
        "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "plain": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ m['content'] + (eos_token if m['role'] == 'assistant' else '\n') }}{% endfor %}"
    ),
}
"""Chat templates for tokenizers without one. ``vicuna`` and ``plain`` need an ``eos_token``, ``chatml`` an ``<|im_end|>``."""


class Text(NamedTuple):
    """A piece of text: token ids, the role of each, and whether it is an answer that the model learns to write."""

    ids: list[int]
    roles: list[int]
    labelled: bool


class Slot(NamedTuple):
    """The place of one media item, and the role of the message it stands in."""

    modality: str
    role: int


Segment = Text | Slot


class _Frame(NamedTuple):
    """A template's words for one sequence of roles.

    ``literals[i]`` stands before text i, the last one after all. Of an answer i, ``heads[i]`` is where it starts in
    ``literals[i]`` and ``tails[i]`` where its end token ends in ``literals[i + 1]``.
    """

    literals: tuple[str, ...]
    heads: dict[int, int]
    tails: dict[int, int]


def resolve_template(value: str) -> str:
    """The Jinja text of a shipped template's name or of a ``.jinja`` file.

    Raises:
        ConfigError: neither a shipped name nor a readable file.
    """
    if value in TEMPLATES:
        return TEMPLATES[value]
    if not value.endswith(".jinja"):
        raise ConfigError(f"no chat template is named '{value}'{hint(value, TEMPLATES)}, or the path of a .jinja file")
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the chat template '{value}' cannot be read: {error}") from error


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template.

    Attributes:
        end_token: what ends an assistant turn, such as ``<|im_end|>``; it is learnt with the answer.
        stop_ids: ids that end a generated answer: the end token's and the tokenizer's ``eos_token_id``.

    Raises:
        ConfigError: the tokenizer has no chat template, or one that does not compile or ends no assistant turn with a
            token of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(f"the tokenizer has no chat template; {_REMEDY}")
        self.tokenizer = tokenizer
        self._frames: dict[tuple[str, ...], _Frame] = {}
        self._added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if not t.content.isspace()}
        try:
            literals = self._literals(("user", "assistant"))
        except DataError as error:
            raise ConfigError(
                f"the chat template cannot render a question and an answer: {error}; {_REMEDY}"
            ) from error
        self.end_token = self._find_end(literals[-1])
        ids = (self._added[self.end_token], tokenizer.eos_token_id)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ids if i is not None))
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        control = {t: i for t, i in self._added.items() if t in special or any(t in literal for literal in literals)}
        self._tokenise = PieceTokenizer(tokenizer, control)

    # ---------------------------------------------------------------- for callers

    def encode(self, messages: Sequence[Message], generation_prompt: bool = False) -> list[Segment]:
        """A conversation's segments in reading order; texts are stripped of outer blanks.

        Args:
            messages: the turns; placeholders stand for media in system and user texts, and are plain text in answers.
            generation_prompt: end right where an assistant's answer to these turns would start.

        Raises:
            DataError: an unknown role, or a sequence of roles that the template refuses or does not render in full.
        """
        segments: list[Segment] = []
        before = ""  # the character of text right before the piece
        for piece in self._pieces(messages, generation_prompt):
            if isinstance(piece, Slot):
                segments.append(piece)
                before = ""
                continue
            runs = [run for run in piece if run.text]
            if runs:
                first = not any(isinstance(s, Text) for s in segments)
                ids, roles = self._behind(before, runs) or self._tokenise(runs, first)
                segments.append(Text(ids, roles, runs[0].role == ASSISTANT))
                before = "" if ids and ids[-1] in self._added.values() else runs[-1].text[-1]
        return segments

    def _behind(self, before: str, runs: list[Run]) -> tuple[list[int], list[int]] | None:
        """Ids and roles of a piece that continues text: read with the character ``before`` it, whose tokens are dropped.

        Else a tokenizer that starts every text with a blank would put one into the middle of a line. None where nothing
        stands before the piece, or where its start melts into that character.
        """
        if not before:
            return None
        context = Run(before, SYSTEM)
        head, _ = self._tokenise([context], first=False)
        ids, roles = self._tokenise([context, *runs], first=False)
        return (ids[len(head) :], roles[len(head) :]) if ids[: len(head)] == head else None

    def text_length(self, messages: Sequence[Message], generation_prompt: bool = False) -> int:
        """Tokens of a conversation without its media."""
        return sum(len(s.ids) for s in self.encode(messages, generation_prompt) if isinstance(s, Text))

    def render(self, messages: Sequence[Message]) -> str:
        """The text that ``encode`` stands for, to show to people."""
        pieces = self._pieces(messages, False)
        marks = {modality: mark for mark, modality in PLACEHOLDERS.items()}
        return "".join(marks[p.modality] if isinstance(p, Slot) else "".join(run.text for run in p) for p in pieces)

    # ---------------------------------------------------------------- characters

    def _pieces(self, messages: Sequence[Message], prompt: bool) -> Iterator[list[Run] | Slot]:
        turns = [*messages, Message("assistant", "")] if prompt else list(messages)
        frame = self._frame(tuple(turn.role for turn in turns))
        runs: list[Run] = []
        start = 0  # characters of the literal that the answer before it has taken
        for i, turn in enumerate(turns):
            literal, text = frame.literals[i], turn.text.strip()
            if turn.role != "assistant":
                runs.append(Run(literal[start:], SYSTEM))
                start = 0
                for part in _MEDIA.split(text):
                    if part in PLACEHOLDERS:
                        yield runs
                        yield Slot(PLACEHOLDERS[part], ROLES[turn.role])
                        runs = []
                    else:
                        runs.append(Run(part, ROLES[turn.role], content=True))
                continue
            yield [*runs, Run(literal[start : frame.heads[i]], SYSTEM)]
            if prompt and i == len(turns) - 1:
                return
            start, runs = frame.tails[i], []
            head, tail = literal[frame.heads[i] :], frame.literals[i + 1][:start]
            yield [Run(head, ASSISTANT), Run(text, ASSISTANT, content=True), Run(tail, ASSISTANT)]
        yield [*runs, Run(frame.literals[-1][start:], SYSTEM)]

    def _frame(self, roles: tuple[str, ...]) -> _Frame:
        if roles not in self._frames:
            literals = self._literals(roles)
            answers = [i for i, role in enumerate(roles) if role == "assistant"]
            tails = {i: self._tail(literals[i + 1], i) for i in answers}
            heads = {i: max(self._head(roles[:i], literals[i]), tails.get(i - 1, 0)) for i in answers}
            self._frames[roles] = _Frame(literals, heads, tails)
        return self._frames[roles]

    def _literals(self, roles: tuple[str, ...], prompt: bool = False) -> tuple[str, ...]:
        """What the template writes before, between and after the texts of these turns."""
        for i, role in enumerate(roles):
            if role not in ROLES:
                raise DataError(f"turn {i + 1} has the role '{role}'{hint(role, ROLES)}")
        if not roles:
            raise DataError("the conversation has no turns")
        marks = [f"\ue000{i}\ue001" for i in range(len(roles))]  # private use: no template writes or changes them
        chat = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            rest = str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))
        except Exception as error:  # a template is a program: it can raise anything
            reason = one_line(error)
            raise DataError(f"the chat template refuses turns of {', '.join(roles)}: {reason}") from error
        literals = []
        for i, mark in enumerate(marks):
            before, found, rest = rest.partition(mark)
            if not found or mark in rest:
                how = "repeats" if found else "leaves out or reorders"
                where = f"turn {i + 1} of {', '.join(roles)}"
                raise DataError(f"the chat template {how} the text of {where}; {_REMEDY}")
            literals.append(before)
        return (*literals, rest)

    def _head(self, before: tuple[str, ...], literal: str) -> int:
        """Where in ``literal``, the words before an answer, the answer's tokens start."""
        try:
            prompt = self._literals(before, prompt=True)[-1] if before else ""
        except DataError:  # a template that cannot prompt here: the answer starts at its text
            return len(literal)
        return (
            len(prompt)
            if prompt and literal.startswith(prompt) and not literal[len(prompt) :].strip()
            else len(literal)
        )

    def _find_end(self, literal: str) -> str:
        found = [(literal.index(token), -len(token), token) for token in self._added if token in literal]
        if not found:
            raise ConfigError(
                f"the chat template ends an answer with {literal!r}, which holds no special token of the tokenizer; {_REMEDY}"
            )
        return min(found)[2]

    def _tail(self, literal: str, turn: int) -> int:
        if self.end_token not in literal:
            raise ConfigError(
                f"the chat template does not end turn {turn + 1} with '{self.end_token}' as it ends the last one; {_REMEDY}"
            )
        end = literal.index(self.end_token) + len(self.end_token)
        swallows = self.tokenizer.added_tokens_decoder[self._added[self.end_token]].rstrip
        return len(literal) - len(literal[end:].lstrip()) if swallows else end
