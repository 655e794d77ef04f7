"""The documentation is true: its commands run, their output is what the pages show, its links, files and options exist.

How a page says what happens to a fenced block:

- ``bash`` and ``python`` blocks run in order in one temporary folder of their page; exit code 0 is expected.
- A comment before a block changes that: ``<!-- exit 2 -->``, or ``<!-- not run: why -->``.
- A block whose first line is ``# path/to/file.py`` (or ``.yaml``) is written there instead, without that line.
- A ``text`` block right behind a block that ran shows lines of its output; ``...`` stands for anything.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mllm_factory import presets

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- (?:exit (?P<code>\d+)|not run: (?P<reason>.+)) -->")
FILE = re.compile(r"# ([\w./-]+\.(?:py|yaml))\n")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass
class Block:
    """A fenced block and what the page says of it."""

    page: str
    line: int
    language: str
    text: str
    code: int = 0
    reason: str = ""
    shown: str = ""  # lines of the output, from the block behind it

    @property
    def file(self) -> str | None:
        """Where the block is to be written, if it is a file."""
        found = FILE.match(self.text)
        return found[1] if found else None

    @property
    def runs(self) -> bool:
        """True for a program that is not marked otherwise."""
        return self.language in ("bash", "python") and not self.reason and self.file is None


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page in order."""
    found: list[Block] = []
    current: Block | None = None
    mark: re.Match[str] | None = None
    adjacent = False  # only blank lines since the last block
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```") and current is None:
            current = Block(page.name, number, line.removeprefix("```").strip(), "")
            if mark:
                current.code, current.reason = int(mark["code"] or 0), mark["reason"] or ""
        elif line == "```" and current is not None:
            if current.language == "text" and adjacent and found and found[-1].runs:
                found[-1].shown = current.text
            found.append(current)
            current, mark, adjacent = None, None, True
        elif current is not None:
            current.text += line + "\n"
        elif line.strip():
            mark, adjacent = MARK.fullmatch(line.strip()), False
    assert current is None, f"{page.name}: a block is not closed"
    return found


BLOCKS = {page.name: blocks_of(page) for page in PAGES}
EVERY = [block for page in BLOCKS.values() for block in page]


def spans(page: Path) -> list[str]:
    """Inline code of a page, without its blocks."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", prose)


# ---------------------------------------------------------------- running


def environment() -> dict[str, str]:
    """As after ``source .venv/bin/activate``, wide enough that no line is folded, and without network."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "250"}
    dropped = ("PYTHONPATH", "HYDRA_FULL_ERROR")
    return {**{key: value for key, value in os.environ.items() if key not in dropped}, "PATH": path, **quiet}


def run(block: Block, folder: Path) -> None:
    """Run one block and compare its exit code and output with the page."""
    program = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    done = subprocess.run(
        [*program, block.text],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    where = f"{block.page}:{block.line}\n{block.text}\n--- output\n{done.stdout}"
    assert done.returncode == block.code, f"exit code {done.returncode}, expected {block.code}: {where}"
    assert "Traceback" not in done.stdout, where
    for line in block.shown.splitlines():
        words = ".*".join(re.escape(part) for part in line.rstrip().split("..."))
        assert re.search(rf"^{words}\s*$", done.stdout, re.MULTILINE), f"not printed: {line}\n{where}"


@pytest.mark.slow
@pytest.mark.parametrize("page", BLOCKS)
def test_every_block_runs(page: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs" / "examples", tmp_path / "docs" / "examples")
    for block in BLOCKS[page]:
        if block.runs:
            run(block, tmp_path)
        elif block.file is not None:
            (tmp_path / block.file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.file).write_text(block.text.partition("\n")[2], encoding="utf-8")
    if page == "getting_started.md":
        explained = " ".join(line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("| `"))
        report = json.loads((tmp_path / "elsewhere" / "report.json").read_text())
        assert [key for key in report if f"`{key}`" not in explained] == []


# ---------------------------------------------------------------- reading


def test_most_blocks_run_and_the_others_say_why() -> None:
    commands = [block for block in EVERY if block.language == "bash"]
    marked = [block for block in EVERY if block.reason]
    assert len(commands) - len(marked) >= 25
    assert len(marked) * 8 <= len(commands)
    assert all(len(block.reason.split()) >= 3 for block in marked)


def test_marks_stand_before_blocks() -> None:
    marks = sum(len(MARK.findall(page.read_text(encoding="utf-8"))) for page in PAGES)
    assert marks == sum(bool(block.reason or block.code) for block in EVERY)


def test_blocks_are_of_a_known_language() -> None:
    assert {block.language for block in EVERY} <= {"bash", "python", "yaml", "json", "toml", "text", ""}


def test_yaml_json_and_toml_blocks_parse() -> None:
    readers = {"yaml": yaml.safe_load, "json": json.loads, "toml": tomllib.loads}
    for block in EVERY:
        if block.language in readers:
            assert readers[block.language](block.text), f"{block.page}:{block.line}"


def test_python_blocks_compile() -> None:
    for block in EVERY:
        if block.language == "python":
            compile(block.text, f"{block.page}:{block.line}", "exec")


def test_excerpts_of_the_example_pack_are_in_it() -> None:
    lines = (ROOT / "docs" / "examples" / "pack" / "pyproject.toml").read_text().splitlines()
    for block in EVERY:
        if block.language == "toml":
            assert [line for line in block.text.splitlines() if line not in lines] == []


def test_files_shown_in_pages_are_those_of_the_examples() -> None:
    for block in EVERY:
        example = ROOT / "docs" / "examples" / (block.file or "")
        if example.suffix == ".yaml" and example.is_file():
            assert block.text.partition("\n")[2] == example.read_text(encoding="utf-8"), block.file


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_presets_and_options_named_in_prose_exist(page: Path) -> None:
    """``group=preset`` and ``group.key`` of inline code; presets that a page makes itself do not count."""
    conf = ROOT / "conf"
    own = {Path(block.file).stem for block in EVERY if block.file}
    options = {
        "trainer": set(yaml.safe_load((conf / "trainer" / "default.yaml").read_text())),
        "data": set().union(*(yaml.safe_load(file.read_text()) for file in (conf / "data").glob("*.yaml"))),
    }
    for span in spans(page):
        for group, preset in re.findall(r"(?<![\w.+])(\w+)=(\w+)", span):
            if group in presets.GROUPS and preset != "null":
                assert preset in {*presets.names(group, [conf]), *own}, f"{page.name}: `{span}`"
        for node, key in re.findall(r"(?<![\w./])(trainer|data)\.(?!py\b|pt\b)(\w+)", span):
            assert key in options[node], f"{page.name}: `{span}`"


# ---------------------------------------------------------------- the map of the repository


def mapped() -> list[str]:
    """The paths of the README's map; a group of presets ends in a slash."""
    block = next(b for b in reversed(BLOCKS["README.md"]) if b.text.startswith("factory/"))
    paths, top = [], ""
    for line in block.text.splitlines():
        word, _, about = line.strip().partition(" ")
        assert about.strip(), f"nothing is said about {word}"
        if line.startswith(" "):
            paths.append(top + word)
        elif word.endswith("/"):
            top = word
        else:
            paths.append(word)
    return paths


def there() -> set[str]:
    """What the map has to name: sources, scripts, pages, and the groups of presets."""
    files = {
        file.relative_to(ROOT).as_posix()
        for folder, kinds in (("factory", "py"), ("components", "py"), ("scripts", "py sh txt"), ("docs", "md"))
        for kind in kinds.split()
        for file in (ROOT / folder).rglob(f"*.{kind}")
    }
    named = {file for file in files if not file.endswith("__init__.py")}
    groups = {f"conf/{folder.name}/" for folder in (ROOT / "conf").iterdir() if any(folder.glob("*.yaml"))}
    return named | groups | {f"conf/{file.name}" for file in (ROOT / "conf").glob("*.yaml")}


def test_the_map_names_every_file_once() -> None:
    paths = mapped()
    assert len(paths) == len(set(paths))
    assert sorted(there() - set(paths)) == []
    assert [path for path in paths if not (ROOT / path).exists()] == []
