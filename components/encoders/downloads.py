"""Files that torchaudio offers for its own models, kept where torchaudio keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from mllm_factory import BUNDLE, ConfigError

HOST = "https://download.pytorch.org/torchaudio"


class Download(NamedTuple):
    """A file's address, and its place inside torch's folder of downloads."""

    url: str
    place: str

    @property
    def file(self) -> Path:
        """Where it lies, or is to lie."""
        return Path(torch.hub.get_dir()) / self.place

    def fetched(self) -> Path:
        """The file, downloaded if it is not there yet.

        Raises:
            ConfigError: it cannot be had; says what to do.
        """
        from urllib.request import Request, urlopen

        file = self.file
        try:
            if not file.exists():
                urlopen(Request(self.url, method="HEAD"), timeout=3).close()  # the download itself has no time limit
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(self.url, str(file), progress=False)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"pretrained: {self.url} cannot be had ({error}); download it elsewhere and put it at {file} or give its "
                "path, or set pretrained: null"
            ) from error
        return file


def awaited(downloads: list[Download]) -> str | None:
    """What the first run will download and what to do where it cannot, for ``Encoder.absent``; None if all is here."""
    missing = [download for download in downloads if not download.file.exists()]
    if not missing:
        return None
    urls, files = (", ".join(map(str, column)) for column in zip(*((d.url, d.file) for d in missing), strict=True))
    it = "it" if len(missing) == 1 else "them"
    return (
        f"{BUNDLE} is not on this machine; the first run downloads {urls}; without network, put {it} at {files}, or set "
        "pretrained to the path of such weights, or to null for random ones"
    )
