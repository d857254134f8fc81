"""Chromium without a window: what a page looks like at a given width."""

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
LIMIT = 3600  # seconds: it ends a browser that hangs
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-dev-shm-usage",
        "--virtual-time-budget=3000",
    ),
)
FRAME = """
<meta charset="utf-8"><iframe id="frame" width="WIDTH" height="900" style="border:0"></iframe>
<script>
const frame = document.getElementById('frame');
frame.onload = () => {
  const page = frame.contentDocument, all = query => [...page.querySelectorAll(query)];
  const box = element => element.getBoundingClientRect();
  const boxes = all('td, th, .tile, h1, h2, p').map(box).filter(b => b.width && b.height);
  const apart = (a, b) =>
    a.right <= b.left + 1 || b.right <= a.left + 1 || a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
  let overlaps = 0;
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => { overlaps += !apart(a, b); }));
  document.title = JSON.stringify({
    width: page.documentElement.scrollWidth, overlaps, boxes: boxes.length,
    smallest: Math.min(...all('td, p, h1, code').map(e => parseFloat(getComputedStyle(e).fontSize))),
    titles: all('th').filter(e => box(e).width).length,
    headings: all('h2').map(e => e.innerText),
    bars: all('svg.bar:not(.thin) rect').map(e => box(e).width),
  });
};
frame.srcdoc = PAGE;
</script>
"""


def measured(page: str, width: int) -> dict[str, Any]:
    """The page's layout in a frame of this width."""
    assert CHROMIUM is not None
    text = FRAME.replace("WIDTH", str(width)).replace("PAGE", json.dumps(page).replace("</", "<\\/"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder, "frame.html")
        file.write_text(text, encoding="utf-8")
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}/profile", "--dump-dom", file.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT).stdout
    found = re.search(r"<title>(.*?)</title>", dom)
    assert found, "the page did not load"
    layout: dict[str, Any] = json.loads(unescape(found.group(1)))
    return layout
