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
  const answer = () => { SCRIPT };
  document.title = JSON.stringify(answer());
};
frame.srcdoc = PAGE;
</script>
"""
LAYOUT = """
  const seen = element => {  // what its scroll box shows of it
    const own = box(element), outer = element.closest('.scroll');
    if (!outer) return own;
    const {left, right, top, bottom} = box(outer);
    const clipped = {left: Math.max(left, own.left), right: Math.min(right, own.right),
      top: Math.max(top, own.top), bottom: Math.min(bottom, own.bottom)};
    const length = (from, to) => Math.max(0, to - from);
    return {...clipped, width: length(clipped.left, clipped.right), height: length(clipped.top, clipped.bottom)};
  };
  const boxes = all('td, th, .tile, h1, h2, p, label').map(seen).filter(b => b.width && b.height);
  const apart = (a, b) =>
    a.right <= b.left + 1 || b.right <= a.left + 1 || a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
  let overlaps = 0;
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => { overlaps += !apart(a, b); }));
  const page_width = page.documentElement.clientWidth, style = e => frame.contentWindow.getComputedStyle(e);
  return {
    width: page.documentElement.scrollWidth, overlaps, boxes: boxes.length,
    outside: all('body *').filter(e => !e.closest('.scroll, svg') && box(e).right > page_width + 1).length,
    smallest: Math.min(...all('td, p, h1, code').map(e => parseFloat(style(e).fontSize))),
    headings: all('h2').map(e => e.innerText),
    bars: all('svg.bar:not(.thin):not(.stacked) rect').map(e => box(e).width),
  };
"""


def in_browser(page: str, width: int, script: str) -> Any:
    """What a script returns in a frame of this width that shows the page; ``all(query)`` finds its elements."""
    assert CHROMIUM is not None
    text = FRAME.replace("WIDTH", str(width)).replace("SCRIPT", script)
    text = text.replace("PAGE", json.dumps(page).replace("</", "<\\/").replace("<!--", "<\\!--"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder, "frame.html")
        file.write_text(text, encoding="utf-8")
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}/profile", "--dump-dom", file.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT).stdout
    found = re.search(r"<title>(.*?)</title>", dom)
    assert found, "the page did not load"
    return json.loads(unescape(found.group(1)))


def measured(page: str, width: int) -> dict[str, Any]:
    """The page's layout in a frame of this width."""
    layout: dict[str, Any] = in_browser(page, width, LAYOUT)
    return layout
