"""The two figures of the reference session, drawn without a window or global state."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lnr_prune.runtime.optional import require

FLOOR = 1e-12  # as in the reference: keeps the logarithm of an exact optimum finite


def pareto(curves: Mapping[str, Sequence[Mapping[str, Any]]], dense_accuracy: float, path: Path) -> None:
    """Accuracy against compression rate.

    Args:
        curves: Title of a panel -> points with ``compression_rate``, ``accuracy``, ``accuracy_retrained`` (or None)
            and ``all_zero``, all but the last as fractions; all-zero ends are drawn hollow.
        dense_accuracy: Accuracy of the original model.
        path: PNG file to write.
    """
    ticker = require("matplotlib.ticker")
    figure = require("matplotlib.figure").Figure(figsize=(6 * len(curves), 4.5), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.axhline(100 * dense_accuracy, color="grey", linestyle=":", label="dense")
        for key, label, marker, colour in (
            ("accuracy", "no retraining", "o", "C0"),
            ("accuracy_retrained", "one epoch of retraining", "^", "C1"),
        ):
            known = [point for point in points if point[key] is not None]
            if known:
                x = [100 * point["compression_rate"] for point in known]
                y = [100 * point[key] for point in known]
                axes.plot(x, y, color=colour, marker=marker, markevery=[not p["all_zero"] for p in known], label=label)
                axes.plot(x, y, color=colour, marker=marker, linestyle="none", markerfacecolor="none")
        axes.set(title=title, xlabel="parameters kept (%)", ylabel="test accuracy (%)", xscale="log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(alpha=0.3)
        axes.legend(loc="center right")
    figure.savefig(path, dpi=120)


def convergence(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """``log10(objective - optimum)`` against iterations.

    Args:
        panels: Title of a panel -> solver -> objective after every iteration. The optimum is the lowest of all
            values, so every panel must show the same problem.
        path: PNG file to write.
    """
    optimum = min(min(history) for curves in panels.values() for history in curves.values())
    figure = require("matplotlib.figure").Figure(figsize=(6 * len(panels), 5), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, history in curves.items():
            axes.plot([math.log10(value - optimum + FLOOR) for value in history], label=name)
        lengths = [len(history) for history in curves.values()]
        scale = "symlog" if 10 * min(lengths) < max(lengths) else "linear"  # a few Newton steps next to 1,000 of FISTA
        axes.set(title=title, xlabel="iterations", ylabel="log10(objective - optimum)", xscale=scale, xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.savefig(path, dpi=120)
