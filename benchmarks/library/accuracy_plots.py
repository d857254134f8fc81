"""Score and divergence against the budget, one figure a network, one line a method."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.library.rows import Row
from lnr_prune.runtime.optional import require

STYLES = {"raw": ":", "bn": "--", "refit": "-."}  # of peers
MARKERS = {"budget": "s", "uniform": "o", "global": "x"}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws one network's rows into an image file: a colour a criterion, markers by sizes, ours as solid lines."""
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        lines[f"{row.method}, one epoch" if row.finetuned else row.method].append(row)
    pruned = {name: sorted(of_method, key=lambda row: row.budget) for name, of_method in lines.items()}
    pruned = {name: of_method for name, of_method in pruned.items() if of_method[0].limited}
    figure = require("matplotlib.figure").Figure(figsize=(14, 9), layout="constrained")
    panels = figure.subplots(1, 2)
    for row in rows:
        if not row.limited:
            panels[0].axhline(100 * row.score, color="grey", linestyle="--" if row.finetuned else "-", label="dense")
    colours: dict[str, str] = {}
    for name, of_method in pruned.items():
        peer = name.startswith("peer, ")
        sizes, criterion, finish = name.split(", ")[1:4] if peer else (*name.split(", ", 1), "")
        style = {
            "color": colours.setdefault(criterion, f"C{len(colours)}"),
            "linestyle": STYLES[finish] if peer else "-",
            "linewidth": 1 if peer else 2,
            "marker": MARKERS[sizes],
            "label": name,
        }
        x = [100 * row.budget for row in of_method]
        panels[0].plot(x, [100 * row.score for row in of_method], **style)
        panels[1].plot(x, [row.divergence for row in of_method], **style)
    some = next(iter(pruned.values()), [])
    ticks = [100 * row.budget for row in some]
    for axes in panels:
        axes.set(xlabel=f"{some[0].limited if some else ''} left (%)", xscale="log")
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    panels[0].set(title=rows[0].network, ylabel="score (%)")
    panels[1].set(ylabel="divergence of the outputs", yscale="log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=120)
