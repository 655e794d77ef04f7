"""A page as a real headless browser shows it, in a frame of a given width."""

from __future__ import annotations

import html as escaping
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


class Shown(NamedTuple):
    """Widths of the page's content and of the frame in pixels, images in all and loaded, what the widest table's box hides,
    and what the browser wrote to its console."""

    scroll: int
    client: int
    images: int
    loaded: int
    hidden: int
    console: str


def show(page: str, width: int, folder: Path) -> Shown:
    """Load a page; ``folder`` takes the browser's own files."""
    measure = (
        "const d = frame.contentDocument, r = d.documentElement, i = [...d.images];"
        "document.title = JSON.stringify([r.scrollWidth, r.clientWidth, i.length, i.filter(x => x.naturalWidth > 0).length,"
        "Math.max(...[...d.querySelectorAll('.box')].map(b => b.scrollWidth - b.clientWidth))])"
    )
    frame = (
        f'<iframe id="frame" width="{width}" height="900" style="border:0" srcdoc="{escaping.escape(page)}"></iframe>'
    )
    (folder / "outer.html").write_text(f"<!doctype html>{frame}<script>onload = () => {{ {measure} }}</script>")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    where = [f"--user-data-dir={folder / 'profile'}", "--dump-dom", f"file://{folder / 'outer.html'}"]
    call = [str(BROWSER), *flags, "--window-size=1400,1000", *where]
    done = subprocess.run(call, capture_output=True, text=True, timeout=180)
    found = re.search(r"<title>\[(-?\d+),(\d+),(\d+),(\d+),(-?\d+)\]</title>", done.stdout)
    if not found:
        raise RuntimeError(done.stderr[-2000:])
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return Shown(*map(int, found.groups()), console)
