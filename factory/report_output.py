"""The folder that a report is written to. It is marked, so that a report is refreshed but nothing else is overwritten."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_factory import files
from mllm_factory.errors import UserError
from mllm_factory.report_runs import MARKER


class Output:
    """Where a report goes.

    Args:
        folder: new, empty, or holding a report of the same runs.
        sources: the folders that were given, as the user wrote them.

    Raises:
        UserError: it holds something else, or cannot be written.
    """

    def __init__(self, folder: Path, sources: Sequence[str]) -> None:
        self.folder = folder.expanduser().absolute()
        self.sources = sorted(os.path.relpath(Path(source).expanduser().absolute(), self.folder) for source in sources)
        self.earlier = self._earlier()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._mark(self.earlier)  # first, so that what a crash leaves can be refreshed
        except OSError as error:
            raise self._unwritable(error) from error

    def _earlier(self) -> list[str]:
        """The files of the report that is there."""
        if not self.folder.exists():
            return []
        if not self.folder.is_dir():
            raise UserError(f"--output: {self.folder} is a file; choose a folder")
        marker = self.folder / MARKER
        if not marker.exists():
            if any(self.folder.iterdir()):
                raise UserError(f"--output: {self.folder} holds other files; choose a new or empty folder")
            return []
        try:
            found: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
            sources, written = [str(s) for s in found["sources"]], [str(name) for name in found["files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--output: {marker} cannot be read; remove {self.folder} or choose another") from error
        if sources != self.sources:
            raise UserError(
                f"--output: {self.folder} holds the report of {', '.join(sources)} (seen from there); choose another folder"
            )
        return written

    def write(self, contents: Mapping[str, str | bytes]) -> None:
        """Write the files, then remove those of the earlier report that are no more.

        Raises:
            UserError: one cannot be written.
        """
        try:
            self._mark([*{*self.earlier, *contents}])
            for name, content in contents.items():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                tmp = path.with_name(f"{path.name}.tmp")
                tmp.write_bytes(content.encode() if isinstance(content, str) else content)
                tmp.replace(path)
            for name in {*self.earlier} - {*contents}:
                self._remove(name)
            self._mark([*contents])
        except OSError as error:
            raise self._unwritable(error) from error

    def _remove(self, name: str) -> None:
        path = (self.folder / name).resolve()
        if path.is_relative_to(self.folder.resolve()):
            path.unlink(missing_ok=True)

    def _mark(self, written: Sequence[str]) -> None:
        text = json.dumps({"sources": self.sources, "files": sorted(written)}, indent=1) + "\n"
        (self.folder / MARKER).write_text(text, encoding="utf-8")

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"--output: {self.folder} cannot be written: {files.reason(error)}; choose another folder")
