"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from mllm_factory.errors import CheckpointError

CONTINUE = "free space or choose another output_dir, then continue with resume=auto"


def write(path: Path, text: str) -> None:
    """Replace a text file in one step: after a crash the old one or the new one is there.

    Raises:
        CheckpointError: it cannot be written.
    """
    tmp = path.with_name(f"{path.name}.tmp")
    try:
        tmp.write_text(text, encoding="utf-8")
        flush(tmp)
        tmp.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {reason(error)}; {CONTINUE}") from error


def append(path: Path, line: str) -> None:
    """Add a line to a text file.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {reason(error)}; {CONTINUE}") from error


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """An error's cause on one line; what the operating system said where it is behind the error."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.strerror:
            return behind.strerror
        behind = behind.__cause__ or behind.__context__
    return next(iter(str(error).splitlines()), "") or type(error).__name__
