"""Reports as HTML: one page without scripts that asks nothing of the network, and what notebooks show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from lnr_prune import chart

if TYPE_CHECKING:
    from lnr_prune.inspection import Inspection
    from lnr_prune.report import Report
    from lnr_prune.solvers import Solution
    from lnr_prune.sweep import Sweep

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

FEW = 2  # names that are shown of a long list, the others are folded

Column = tuple[str, str, str]
"""Title, class, and label where the titles are hidden."""


def document(title: str, *sections: str) -> str:
    """A whole page of sections."""
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


def report(of: Report, title: str) -> str:
    """Everything that a `Report` says."""
    pruned = sum(group.kept < group.size for group in of.groups)
    lead = f"{pruned} of {len(of.groups)} channel groups lost channels, {len(of.layers)} layers were refitted."
    return "\n".join(
        (f"<h1>{escape(title)}</h1><p>{lead}</p>", _tiles(of), _groups(of), _layers(of), frozen(of.frozen))
    )


def _tiles(of: Report) -> str:
    counts = [
        ("Parameters", of.params_before, of.params_after, short),
        ("MACs a sample", of.macs_before, of.macs_after, short),
        ("Size", of.size_before, of.size_after, in_bytes),
        ("Latency (rough)", of.latency_before, of.latency_after, in_seconds),
    ]
    tiles = [
        f'<div class="tile">{name}<b>{percent(after / before)}</b>{_bar(after / before, percent(after / before))}'
        f'<span class="quiet">{form(before)} → {form(after)}</span></div>'
        for name, before, after, form in counts
        if before and after is not None
    ]
    predicted = [group.predicted for group in of.groups if group.predicted is not None]
    note = f"squared, relative; predicted {percent(sum(predicted))}" if predicted else "squared, relative to the spread"
    tiles.append(
        f'<div class="tile">Error of the outputs<b>{percent(of.error)}</b>{_bar(of.error, percent(of.error))}'
        f'<span class="quiet">{note}</span></div>'
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _groups(of: Report) -> str:
    known = (error for group in of.groups for error in (group.error, group.before_refit) if error is not None)
    largest, budget = max(known, default=0.0), any(group.predicted is not None for group in of.groups)
    columns = [
        ("layers whose channels they are", "wide", ""),
        ("channels kept", "drawn", ""),
        ("", "number", "kept"),
        ("errors", "drawn", ""),
        ("before the refit", "number", "before the refit"),
        ("after", "number", "after it"),
        *([("at the outputs", "number", "at the outputs")] if budget else []),
    ]
    rows = []
    for group in of.groups:
        note = f'<div class="quiet">{escape(group.note)}</div>' if group.note else ""
        row = [
            _who(group.producers, group.consumers) + note,
            _bar(group.kept / max(1, group.size), f"{group.kept} of {group.size} channels kept"),
            f"{group.kept:,} of {group.size:,}",
            _errors(group.before_refit, group.error, largest),
            _maybe(group.before_refit),
            _maybe(group.error),
            *([_maybe(group.predicted)] if budget else []),
        ]
        rows.append(row)
    about = (
        "Errors are <code>E‖y − M x‖² / E‖y‖²</code> of the layers that read the channels: with the selector's "
        "coefficients in the original network (orange), and after the refit in the pruned one (blue)."
    )
    if budget:
        about += " At the outputs: what the budget predicted of the whole network's error."
    return f'<h2>Channels</h2><p class="quiet">{about}</p>{_table(columns, rows)}'


def _layers(of: Report) -> str:
    if not of.layers:
        return "<h2>Refitted layers</h2><p>None: the coefficients are as the selector left them.</p>"
    largest = max(layer.error for layer in of.layers)
    columns = [("layer", "wide", ""), ("error", "drawn", ""), ("", "number", "error")]
    columns += [(name, "number", name) for name in ("ridge", "samples", "columns")]
    rows = [
        [
            _names([layer.name]),
            _errors(None, layer.error, largest),
            percent(layer.error),
            f"{layer.ridge:.2g}",
            f"{layer.samples:,}",
            f"{layer.columns:,}",
        ]
        for layer in of.layers
    ]
    about = "What is left after each layer was fitted from the pruned network's inputs to the original one's outputs."
    return f'<h2>Refitted layers</h2><p class="quiet">{about}</p>{_table(columns, rows)}'


def frozen(reasons: Mapping[str, str]) -> str:
    """Layers that were left whole, by reason."""
    layers: dict[str, list[str]] = defaultdict(list)
    for layer, reason in reasons.items():
        layers[reason].append(layer)
    rows = [[_names(names), escape(reason)] for reason, names in layers.items()]
    columns = [("layers", "wide", ""), ("why", "wide", "")]
    body = _table(columns, rows) if rows else "<p>Nothing: the outputs of every layer could be pruned.</p>"
    return f"<h2>Left whole</h2>{body}"


def sweep(of: Sweep) -> str:
    """The Pareto frontier."""
    curves = {"as pruned": [(point.share(of.cost), point.value) for point in of.points]}
    if any(point.retrained is not None for point in of.points):
        curves["retrained"] = [(point.share(of.cost), point.final) for point in of.points]
    best = set(map(id, of.pareto))
    columns = [("asked for", "wide", "")]
    columns += [(name, "number", name) for name in ("parameters", "MACs", of.measure, *list(curves)[1:])]
    columns += [("", "", "")]
    rows = [
        [
            f"<code>{escape(point.amount)}</code>",
            percent(point.share("params")),
            percent(point.share("macs")),
            f"{point.value:.4g}",
            *([f"{point.final:.4g}"] if "retrained" in curves else []),
            "on the frontier" if id(point) in best else "",
        ]
        for point in of.points
    ]
    drawing = chart.svg(curves, chart.LABELS[of.cost], of.measure, of.dense)
    return f"<h2>Sweep</h2>{drawing}{_table(columns, rows)}"


def inspection(of: Inspection) -> str:
    """The channel groups of a model."""
    columns = [("layers whose channels they are", "wide", "")]
    columns += [(name, "number", name) for name in ("channels", "parameters each", "MACs each")]
    rows = [
        [_who(group.producers, group.consumers), f"{group.size:,}", f"{group.parameters:,}", f"{group.macs:,}"]
        for group in of.groups
    ]
    lead = f"<p>{len(of.groups)} groups hold {of.reachable:.1%} of the parameters.</p>"
    return f"<h2>Channel groups</h2>{lead}{_table(columns, rows)}{frozen(of.frozen)}"


def solution(of: Solution) -> str:
    """What a solver found."""
    rows = [
        ["groups kept", f"{of.n_kept:,} of {len(of.support):,}"],
        ["lam", f"{of.lam:.4g}"],
        ["relative duality gap", f"{of.gap:.1e}"],
        ["solver", f"{escape(of.solver)}, {of.iterations:,} iterations, {in_seconds(of.seconds)}"],
        ["status", escape(of.status.advice)],
    ]
    bar = _bar(of.n_kept / max(1, len(of.support)), f"{of.n_kept} of {len(of.support)} groups kept")
    return f"{bar}{_table([('group lasso', '', ''), ('', '', '')], rows)}"


def short(number: float) -> str:
    """Three digits and a unit: 25.6 M."""
    for unit in ("", " k", " M", " G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g} T"


def percent(share: float) -> str:
    """Three digits."""
    return "< 0.001\N{NO-BREAK SPACE}%" if 0 < share < 1e-5 else f"{100 * share:.3g}\N{NO-BREAK SPACE}%"


def in_bytes(number: float) -> str:
    """1.72 MB."""
    return short(number) + "B" if number >= 999.5 else f"{number:.0f} B"


def in_seconds(number: float) -> str:
    """12.3 ms."""
    return f"{number:.3g} s" if number >= 1 else f"{1e3 * number:.3g} ms"


def _names(names: Sequence[str]) -> str:
    """The first few, the others folded."""
    shown = [f"<code>{escape(name).replace('.', '.<wbr>')}</code>" for name in names]
    if len(shown) <= FEW + 1:
        return ", ".join(shown)
    first, rest = ", ".join(shown[:FEW]), ", ".join(shown[FEW:])
    return f"<details><summary>{first} and {len(shown) - FEW} more</summary>{rest}</details>"


def _who(producers: Sequence[str], consumers: Sequence[str]) -> str:
    return f'{_names(producers)}<div class="quiet">read by {_names(consumers)}</div>'


def _maybe(error: float | None) -> str:
    return "" if error is None else percent(error)


def _bar(share: float, label: str) -> str:
    """A bar of which a share is filled."""
    filled = f'<rect class="a" width="{min(1.0, max(0.0, share)):.2%}" height="100%"/>'
    return f'<svg class="bar" role="img" aria-label="{escape(label)}">{filled}</svg>'


def _errors(before: float | None, after: float | None, largest: float) -> str:
    bars = [(error, style) for error, style in ((before, "b"), (after, "a")) if error is not None]
    return "".join(
        f'<svg class="bar thin" role="img" aria-label="{percent(error)}">'
        f'<rect class="{style}" width="{error / largest if largest > 0 else 0:.2%}" height="100%"/></svg>'
        for error, style in bars
    )


def _table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> str:
    """A table whose rows become cards on a narrow screen."""
    head = "".join(f'<th class="{style}">{escape(title)}</th>' for title, style, _ in columns)
    labels = [f' data-label="{escape(label)}"' if label else "" for *_, label in columns]
    body = "".join(f"<tr>{''.join(map(_cell, columns, labels, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(column: Column, label: str, content: str) -> str:
    return f'<td class="{column[1]}"{label}>{content}</td>'
