"""Web pages made from the files in ``templates``: all values are escaped, and nothing comes from the network."""

import base64
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lnr_prune.report.names import by_reason, in_parts

FOLDER = Path(__file__).parent / "templates"
GOLDEN = 0.618034  # steps of this size around the circle of hues keep neighbours apart


def render(template: str, **values: Any) -> str:
    """A part of a page, from a template, which escapes the values."""
    return PAGES.get_template(template).render(**values)


def document(title: str, *sections: str, made_by: Mapping[str, str] | None = None) -> str:
    """A whole page, made of sections.

    Args:
        title: Title of the page.
        sections: What `render` returned.
        made_by: What to say at the end: names of programs -> their versions; "command" is a command line.
    """
    digest = hashlib.sha256(render("page.js").encode()).digest()
    return render(
        "page.html",
        title=title,
        sections=sections,
        made_by=dict(made_by or {}),
        digest=base64.b64encode(digest).decode(),  # of the only script that the page may run
    )


def embedded(*sections: str) -> str:
    """Sections inside somebody else's page, such as a notebook: without scripts; they take its colours."""
    return render("embedded.html", sections=sections)


def short(number: float) -> str:
    """A number with three digits and a unit: 25.6 M."""
    for unit in ("", " k", " M", " G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g} T"


def percent(share: float) -> str:
    """A share in percent, with three digits."""
    return "< 0.001\N{NO-BREAK SPACE}%" if 0 < share < 1e-5 else f"{100 * share:.3g}\N{NO-BREAK SPACE}%"


def maybe(share: float | None) -> str:
    """A share in percent; "" if it is unknown."""
    return "" if share is None else percent(share)


def in_bytes(number: float) -> str:
    """A number of bytes: 1.72 MB."""
    return short(number) + "B" if number >= 999.5 else f"{number:.0f} B"


def in_seconds(number: float) -> str:
    """A number of seconds: 12.3 ms."""
    return f"{number:.3g} s" if number >= 1 else f"{1e3 * number:.3g} ms"


def width(part: float | None, whole: float = 1.0) -> str:
    """A share of a bar, between nothing and all of it."""
    share = part / whole if part is not None and whole > 0 else 0.0
    return f"{0.0 if math.isnan(share) else min(1.0, max(0.0, share)):.2%}"


def hue(index: int) -> str:
    """The colour of the group, or the stage, with this number."""
    return f"hsl({360 * ((0.58 + index * GOLDEN) % 1):.0f} 60% 52%)"


def thousands(number: int) -> str:
    """A whole number with commas."""
    return f"{number:,}"


PAGES = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
PAGES.filters.update({f.__name__: f for f in (short, percent, maybe, in_bytes, in_seconds, width, hue, thousands)})
PAGES.filters.update(by_reason=by_reason, in_parts=in_parts)
