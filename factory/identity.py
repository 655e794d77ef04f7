"""Which pretrained sources a tree names: revision, licence and checksum of each, and which of them are not here yet.

The licence is the one that the source itself states: a package in its metadata, a folder in the front matter of its README.md
(as on the hub) or in its config.json.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mllm_factory.errors import ConfigError
from mllm_factory.pretrained import cached, is_hub_id, locate

PARTS = ("vision", "audio", "projector", "audio_projector", "backbone")
MOST_HASHED = 2**31
"""Bytes of a single file up to which its checksum is over all of it; a larger one's is over its size and its two ends."""

_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
_LICENSE = re.compile(r"^license(?:_name)?:\s*['\"]?([^'\"\n]+?)['\"]?\s*$", re.MULTILINE)
_ENDS = 2**20


def pretrained_of(tree: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> source, for each ``pretrained`` of a part, at any depth."""
    return {key: source for part in PARTS for key, source in _walk(tree.get(part), part)}


def _walk(node: Any, key: str) -> Iterator[tuple[str, str]]:
    if not isinstance(node, Mapping | list):
        return
    items = node.items() if isinstance(node, Mapping) else enumerate(node)
    for name, value in items:
        if name == "pretrained" and isinstance(value, str):
            yield f"{key}.{name}", value
        else:
            yield from _walk(value, f"{key}.{name}")


def absent(tree: Mapping[str, Any]) -> dict[str, str]:
    """The sources that lie on the hub and were not downloaded yet, by key. The network is not asked."""
    return {key: source for key, source in pretrained_of(tree).items() if is_hub_id(source) and cached(source) is None}


def sources(tree: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """By key, what is known of each source.

    ``source`` as written; ``license`` where one is stated; and ``revision`` (of a hub repository), ``package`` and
    ``version`` (of a package), or ``sha256`` (of a local file; of a folder over its config.json and all names and sizes).
    """
    return {key: {"source": source, **_known(source)} for key, source in pretrained_of(tree).items()}


def _known(source: str) -> dict[str, str]:
    if source.startswith("pkg://"):
        return _of_package(source.removeprefix("pkg://").partition("/")[0].partition(".")[0])
    if is_hub_id(source):
        folder = cached(source)
        return {} if folder is None else {"revision": folder.name, **_license_in(folder)}
    try:
        path = Path(locate(source))
    except ConfigError:  # it was there when the model was built
        return {}
    if path.is_dir():
        return {"sha256": _folder_sum(path), **_license_in(path)}
    return {"sha256": _file_sum(path), **_license_in(path.parent)}


def _of_package(package: str) -> dict[str, str]:
    names = metadata.packages_distributions().get(package)
    if not names:
        return {}
    about: Any = metadata.metadata(names[0])
    classifiers = [c.rpartition("::")[2].strip() for c in about.get_all("Classifier") or () if c.startswith("License")]
    fields = [about.get("License-Expression"), about.get("License"), *classifiers, _license_file(names[0])]
    stated = next((field for field in fields if field and field != "UNKNOWN"), None)
    found = {"package": names[0], "version": about["Version"]}
    return found | ({"license": " ".join(stated.split())[:80]} if stated else {})


def _license_file(distribution: str) -> str | None:
    """The first line of a package's licence file: its name."""
    listed = [
        file for file in metadata.files(distribution) or () if file.name.upper().startswith(("LICENSE", "LICENCE"))
    ]
    text = Path(str(listed[0].locate())).read_text(encoding="utf-8", errors="replace") if listed else ""
    return next((line.strip() for line in text.splitlines() if line.strip()), None)


def _license_in(folder: Path) -> dict[str, str]:
    """``license`` from a folder's README.md or config.json; nothing where neither states one."""
    readme, config = folder / "README.md", folder / "config.json"
    try:
        if readme.is_file() and (front := _FRONT.match(readme.read_text(encoding="utf-8", errors="replace"))):
            stated = dict(reversed([(m[0].partition(":")[0], m[1]) for m in _LICENSE.finditer(front[1])]))
            named = stated.get("license_name") if stated.get("license") == "other" else None
            if stated:
                return {"license": named or stated.get("license") or stated["license_name"]}
        if config.is_file():
            stated_there = json.loads(config.read_text(encoding="utf-8")).get("license")
            return {"license": stated_there} if isinstance(stated_there, str) else {}
    except (OSError, ValueError, AttributeError):
        return {}
    return {}


def _folder_sum(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        if path.name == "config.json":
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _file_sum(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= MOST_HASHED:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{size}".encode() + file.read(_ENDS))
        file.seek(-_ENDS, 2)
        digest.update(file.read())
    return digest.hexdigest()


def shown(key: str, facts: Mapping[str, str]) -> str:
    """One source as a line of a README: ``vision.pretrained: `org/name`, revision abc, licence mit``."""
    words = [f"{what} {facts[what]}" for what in ("revision", "package", "version", "sha256") if what in facts]
    return ", ".join([f"{key}: `{facts['source']}`", *words, f"licence {facts.get('license', 'not stated')}"])
