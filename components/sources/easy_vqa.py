"""easy-VQA: questions about pictures of one coloured shape (Zhou 2019, github.com/vzhou842/easy-VQA).

4,000 pictures with 38,575 questions to train on and 1,000 with 9,673 to test with, 64 x 64 pixels, 13 answers; all of it is
shipped in the Python package ``easy-vqa``.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from mllm_factory import Message, Sample, Source, hint, register

SPLITS = ("train", "test")


@register("easy_vqa")
class EasyVQA(Source):
    """One question about one picture a sample, answered in one word.

    Args:
        split: ``train`` or ``test``.
        limit: use the first so many questions. They are sorted by picture, about ten to each: 64 questions are 7 pictures.

    Raises:
        ValueError: the package is not installed, or no such split or limit.
    """

    def __init__(self, split: str, limit: int | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"no split is named '{split}'{hint(split, SPLITS)}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit is at least 1 question, got {limit}; null takes all")
        spec = find_spec("easy_vqa")  # finds the folder without importing the package
        if spec is None or not spec.submodule_search_locations:
            raise ValueError("the package easy-vqa, which holds the pictures, is missing; pip install easy-vqa")
        self.modalities = frozenset({"vision"})
        self._split = split
        self._folder = Path(spec.submodule_search_locations[0]) / "data" / split
        questions = json.loads((self._folder / "questions.json").read_text(encoding="utf-8"))
        self._questions: list[tuple[str, str, int]] = [tuple(q) for q in questions[:limit]]

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, index: int) -> Sample:
        """Question ``index`` as ``<image>`` and the question, then the answer."""
        question, answer, picture = self._questions[index]
        messages = (Message("user", f"<image>\n{question}"), Message("assistant", answer))
        media = {"vision": (str(self._folder / "images" / f"{picture}.png"),)}
        return Sample(f"easy_vqa/{self._split}/{index}", messages, media)
