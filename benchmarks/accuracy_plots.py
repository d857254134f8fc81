"""Score and divergence against the budget, one figure a network, one line a method."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.methods import is_peer
from lnr_prune.recipes.data import require

if TYPE_CHECKING:
    from benchmarks.accuracy import Row


def plot(rows: Sequence["Row"], path: Path) -> None:
    """Draws one network's rows into an image file: ours as solid lines, peers' dashed, those with our refit dotted."""
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        lines[f"{row.method}, one epoch" if row.finetuned else row.method].append(row)
    figure = require("matplotlib.figure").Figure(figsize=(15, 6), layout="constrained")
    score, divergence = figure.subplots(1, 2)
    colours = require("matplotlib").colormaps["tab20"].colors
    for number, (name, of_method) in enumerate(sorted(lines.items())):
        if not of_method[0].limited:
            score.axhline(100 * of_method[0].score, color="grey", label=name)
            continue
        of_method.sort(key=lambda row: row.budget)
        style = "--" if is_peer(of_method[0].method) else ":" if name.startswith("peer") else "-"
        for axes, values in (
            (score, [100 * row.score for row in of_method]),
            (divergence, [row.divergence for row in of_method]),
        ):
            axes.plot(
                [100 * row.budget for row in of_method], values,
                style, color=colours[number % len(colours)], marker="o", markersize=3, label=name,
            )  # fmt: skip
    what = {"macs": "MACs", "params": "parameters"}[next(row.limited for row in rows if row.limited)]
    score.set(title=rows[0].network, ylabel="score (%)")
    divergence.set(ylabel="divergence of the outputs", yscale="log")
    for axes in (score, divergence):
        axes.set(xlabel=f"{what} left (%)", xscale="log")
        axes.grid(alpha=0.3)
    figure.legend(*score.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
