"""HTML that all results share: a page without scripts or network access, and the parts of it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape

STYLE = """
.lnr { --accent: #2a6fdb; --second: #d97706; --faint: color-mix(in srgb, currentColor 15%, transparent);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; max-width: 68rem; }
.lnr h1 { font-size: 1.6rem; margin: 0 0 .3rem; line-height: 1.2; }
.lnr h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
.lnr p { margin: .3rem 0 .8rem; max-width: 46rem; }
.lnr .quiet { opacity: .75; font-size: .9em; }
.lnr .tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1rem 0; }
.lnr .tile { border: 1px solid var(--faint); border-radius: .6rem; padding: .7rem .8rem; }
.lnr .tile b { display: block; font-size: 1.5rem; line-height: 1.3; }
.lnr svg { display: block; }
.lnr .bar { width: 100%; height: .7rem; border-radius: .2rem; background: var(--faint); }
.lnr .bar.thin { height: .45rem; margin: .15rem 0; background: none; }
.lnr .a { fill: var(--accent); } .lnr .b { fill: var(--second); }
.lnr .chart { width: 100%; max-width: 36rem; height: auto; }
.lnr .chart text { fill: currentColor; font-size: 13px; }
.lnr .chart .grid { stroke: var(--faint); }
.lnr .chart .a { stroke: var(--accent); } .lnr .chart .b { stroke: var(--second); }
.lnr .chart polyline { fill: none; stroke-width: 2; }
.lnr table { table-layout: auto; border-collapse: collapse; width: 100%; background: none; color: inherit;
  font-size: .95em; }
.lnr tr { background: none; }
.lnr th, .lnr td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border: 0; }
.lnr thead th { font-weight: 600; vertical-align: bottom; border-bottom: 1px solid currentColor; }
.lnr tbody tr { border-top: 1px solid var(--faint); }
.lnr .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.lnr th.wide { width: 40%; }
.lnr th.drawn { width: 16%; }
.lnr summary { cursor: pointer; }
.lnr code { font: .92em ui-monospace, monospace; background: none; color: inherit; padding: 0; }
.lnr .quiet code { font-size: 1em; }
@media (max-width: 46rem) {
  .lnr thead { display: none; }
  .lnr table, .lnr tbody { display: block; }
  .lnr tr { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); column-gap: 1rem; padding: .55rem 0; }
  .lnr td { display: block; padding: .1rem 0; }
  .lnr td:empty { display: none; }
  .lnr .number { text-align: left; white-space: normal; }
  .lnr .wide, .lnr .drawn { grid-column: 1 / -1; width: auto; }
  .lnr td[data-label]::before { content: attr(data-label) " "; opacity: .75; font-size: .9em; }
}
"""
POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; padding: 1.5rem clamp(1rem, 4vw, 3rem) 3rem; background: #fff; color: #1d2430; }
.lnr { margin: 0 auto; }
@media (prefers-color-scheme: dark) {
  body { background: #14181f; color: #e4e8ee; }
  .lnr { --accent: #6ea8ff; --second: #f0a64a; }
}
"""
FEW = 2  # names that are shown of a long list; the others are folded
Column = tuple[str, str, str]
"""Title, class, and the label that is shown where the titles are hidden."""


def document(title: str, *sections: str) -> str:
    """A whole page, made of sections."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{POLICY}<title>{escape(title)}</title>"
    )
    content = "\n".join(sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}<style>{STYLE}{PAGE_STYLE}</style></head>\n'
        f'<body><main class="lnr">\n{content}\n</main></body>\n</html>\n'
    )


def embedded(*sections: str) -> str:
    """Sections inside somebody else's page, such as a notebook; they take its colours."""
    return f'<style>{STYLE}</style><div class="lnr">{"".join(sections)}</div>'


def left_whole(reasons: Mapping[str, str]) -> str:
    """Layers that were left whole, by reason."""
    layers: dict[str, list[str]] = defaultdict(list)
    for layer, reason in reasons.items():
        layers[reason].append(layer)
    rows = [[folded(names), escape(reason)] for reason, names in layers.items()]
    columns = [("layers", "wide", ""), ("why", "wide", "")]
    body = table(columns, rows) if rows else "<p>Nothing: the outputs of every layer could be pruned.</p>"
    return f"<h2>Left whole</h2>{body}"


def weights_made_plain(weights: Mapping[str, str]) -> str:
    """Layers whose computed weights were folded; nothing if there are none."""
    rows = [[folded([layer]), escape(what)] for layer, what in weights.items()]
    columns = [("layers", "wide", ""), ("what is now plain", "wide", "")]
    return f"<h2>Folded weights</h2>{table(columns, rows)}" if rows else ""


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


def in_bytes(number: float) -> str:
    """A number of bytes: 1.72 MB."""
    return short(number) + "B" if number >= 999.5 else f"{number:.0f} B"


def in_seconds(number: float) -> str:
    """A number of seconds: 12.3 ms."""
    return f"{number:.3g} s" if number >= 1 else f"{1e3 * number:.3g} ms"


def folded(names: Sequence[str]) -> str:
    """The first few names; the others are folded."""
    shown = [f"<code>{escape(name).replace('.', '.<wbr>')}</code>" for name in names]
    if len(shown) <= FEW + 1:
        return ", ".join(shown)
    first, rest = ", ".join(shown[:FEW]), ", ".join(shown[FEW:])
    return f"<details><summary>{first} and {len(shown) - FEW} more</summary>{rest}</details>"


def who(producers: Sequence[str], consumers: Sequence[str]) -> str:
    """The layers that make a group's channels, and those that read them."""
    return f'{folded(producers)}<div class="quiet">read by {folded(consumers)}</div>'


def maybe(error: float | None) -> str:
    """A share in percent; "" if it is unknown."""
    return "" if error is None else percent(error)


def bar(share: float, label: str) -> str:
    """A bar that is filled up to a share."""
    filled = f'<rect class="a" width="{min(1.0, max(0.0, share)):.2%}" height="100%"/>'
    return f'<svg class="bar" role="img" aria-label="{escape(label)}">{filled}</svg>'


def error_bars(before: float | None, after: float | None, largest: float) -> str:
    """One thin bar per error, as a share of the largest error."""
    bars = [(error, style) for error, style in ((before, "b"), (after, "a")) if error is not None]
    return "".join(
        f'<svg class="bar thin" role="img" aria-label="{percent(error)}">'
        f'<rect class="{style}" width="{error / largest if largest > 0 else 0:.2%}" height="100%"/></svg>'
        for error, style in bars
    )


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> str:
    """A table whose rows become cards on a narrow screen."""
    head = "".join(f'<th class="{style}">{escape(title)}</th>' for title, style, _ in columns)
    labels = [f' data-label="{escape(label)}"' if label else "" for *_, label in columns]
    body = "".join(f"<tr>{''.join(map(_cell, columns, labels, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(column: Column, label: str, content: str) -> str:
    return f'<td class="{column[1]}"{label}>{content}</td>'
