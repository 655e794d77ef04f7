"""Local data sets of Hugging Face: parquet files, or a folder that ``Dataset.save_to_disk`` wrote.

Rows lie in memory-mapped Arrow files (parquet is copied into them once), so each has a number and a run continues exactly
where it was, however many processes and loader workers there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_factory import DataError, Message, Sample, Source, hint, one_line, register
from mllm_factory.components.sources.conversation import marked, messages_of
from mllm_factory.components.sources.tar_index import expand


@register("hf_dataset")
class HFDataset(Source):
    """Rows as samples: either a column of turns, or one of questions and one of answers.

    A cell of media is a path, bytes, the library's ``{"bytes", "path"}``, or a list of these; nothing is decoded here. Where the
    texts mark no media, the marks are put before the first one.

    Args:
        path: ``.parquet`` files (``{000..012}`` and ``*`` name several), or a folder written by ``save_to_disk``.
        turns: column of ``{"from", "value"}`` or ``{"role", "content"}`` turns; None: there are ``question`` and ``answer``.
        question, answer: columns of text; an answer may be a list, whose first entry counts.
        image, audio: columns of media; None: none.
        id: column that names samples; None: their numbers do.
        root: folder that paths start from; None: the folder of the data.
        cache: folder of the Arrow copy of parquet files; None: the library's own.
        limit: use the first so many rows.

    Raises:
        ValueError: the library is missing, no such column, or a limit below 1.
        DataError: a file that is missing or cannot be read; names it.
    """

    def __init__(
        self,
        path: str,
        turns: str | None = "conversations",
        question: str | None = None,
        answer: str | None = None,
        image: str | None = "image",
        audio: str | None = None,
        id: str | None = None,
        root: str | None = None,
        cache: str | None = None,
        limit: int | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit is at least 1 row, got {limit}; null takes all")
        if (turns is None) == (question is None or answer is None):
            raise ValueError("turns: name a column of turns, or set it to null and name question and answer")
        rows, first = _loaded(path, cache)
        for option, column in {"turns": turns, "question": question, "answer": answer}.items():
            _require_column(option, column, rows.column_names)
        for option, column in {"image": image, "audio": audio, "id": id}.items():
            _require_column(option, column, rows.column_names)
        if not len(rows):
            raise DataError(f"{path}: holds no rows")
        self._rows = rows.select(range(min(limit, len(rows)))) if limit else rows
        self._path, self._root = path, first.parent if root is None else Path(root)
        self._turns, self._question, self._answer, self._id = turns, question, answer, id
        self._media = {name: column for name, column in (("vision", image), ("audio", audio)) if column is not None}
        self.modalities = frozenset(name for name, column in self._media.items() if self._filled(column))

    def _filled(self, column: str) -> bool:
        """Whether any cell of a column holds something."""
        import pyarrow.compute as pc

        table = self._rows.data.table
        return any(len(chunk) > chunk.null_count and _any_item(chunk, pc) for chunk in table.column(column).chunks)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Row ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        (row,) = self._rows[index : index + 1].to_pylist()
        try:
            media = {name: items for name, column in self._media.items() if (items := self._items(column, row[column]))}
            name = str(row[self._id]) if self._id is not None else str(index)
            return Sample(name, marked(self._messages(row), media), media)
        except DataError as error:
            raise DataError(f"{self._path}, row {index}: {error}") from error

    def _messages(self, row: Mapping[str, Any]) -> tuple[Message, ...]:
        if self._turns is not None:
            return messages_of(row[self._turns], self._turns)
        question, answer = row[str(self._question)], row[str(self._answer)]
        answer = answer[0] if isinstance(answer, list) and answer else answer
        for column, text in ((self._question, question), (self._answer, answer)):
            if not isinstance(text, str):
                raise DataError(f"column '{column}' holds text, got {type(text).__name__}")
        return Message("user", question), Message("assistant", answer)

    def _items(self, column: str, cell: Any) -> tuple[str | bytes, ...]:
        """The media of a cell."""
        cells = cell if isinstance(cell, list) else [] if cell is None else [cell]
        return tuple(self._item(column, item) for item in cells)

    def _item(self, column: str, item: Any) -> str | bytes:
        if isinstance(item, dict) and {"bytes", "path"} & item.keys():
            item = item.get("bytes") or item.get("path")
        if isinstance(item, bytes) and item:
            return item
        if isinstance(item, str) and item:
            return str(self._root / item)
        raise DataError(f"column '{column}' holds paths, bytes or {{'bytes', 'path'}}, got {type(item).__name__}")


def _any_item(chunk: Any, pc: Any) -> bool:
    """Whether an Arrow array holds an item; lists may be empty."""
    import pyarrow as pa

    if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
        return bool(pc.any(pc.greater(pc.list_value_length(chunk), 0)).as_py())
    return True


def _require_column(option: str, column: str | None, known: list[str]) -> None:
    if column is not None and column not in known:
        raise ValueError(f"{option}: there is no column '{column}'{hint(column, known)}")


def _loaded(path: str, cache: str | None) -> tuple[Any, Path]:
    """The rows, handed out as Arrow tables, and the first file."""
    try:
        import datasets
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError("the package datasets is missing; pip install 'mllm-factory[data]'") from error
    if Path(path).is_dir():
        try:
            rows = datasets.load_from_disk(path)
        except Exception as error:
            raise DataError(
                f"{path}: no folder that save_to_disk wrote ({one_line(error, 200)}); name parquet files"
            ) from error
        if isinstance(rows, datasets.DatasetDict):
            raise DataError(f"{path}: holds the splits {', '.join(rows)}; name the folder of one of them")
        return rows.with_format("arrow"), Path(path) / "dataset_info.json"
    files = expand(path)
    for file in files:
        try:
            parquet.read_metadata(file)
        except Exception as error:
            raise DataError(f"{file}: no whole parquet file ({one_line(error, 200)}); fetch it again") from error
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=cache)
    return rows.with_format("arrow"), files[0]
