"""The two figures of the reference session, drawn without any window or global state."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lnr_prune.recipes.data import require

FLOOR = 1e-12  # the reference's: keeps the logarithm of an exact optimum finite


def pareto(curves: Mapping[str, Sequence[Mapping[str, Any]]], dense_accuracy: float, path: Path) -> None:
    """Accuracy against compression rate.

    Args:
        curves: Title of a panel -> points with ``compression_rate``, ``accuracy``, ``accuracy_retrained`` (or None)
            and ``all_zero``, all but the last as fractions; all-zero ends are drawn hollow.
        dense_accuracy: Accuracy of the original model.
        path: PNG file to write.
    """
    figure = require("matplotlib.figure").Figure(figsize=(6 * len(curves), 4.5), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.axhline(100 * dense_accuracy, color="grey", linestyle=":", label="dense")
        for key, label, marker in (
            ("accuracy", "no retraining", "o"),
            ("accuracy_retrained", "one epoch of retraining", "^"),
        ):
            known = sorted((p for p in points if p[key] is not None), key=lambda p: float(p["compression_rate"]))
            if not known:
                continue
            x, y = [100 * p["compression_rate"] for p in known], [100 * p[key] for p in known]
            hollow = ["none" if p["all_zero"] else "C0" if marker == "o" else "C1" for p in known]
            colour = "C0" if marker == "o" else "C1"
            axes.plot(x, y, color=colour, linewidth=1, alpha=0.6)
            axes.scatter(x, y, marker=marker, facecolors=hollow, edgecolors=colour, label=label)
        axes.set(title=title, xlabel="parameters kept (%)", ylabel="test accuracy (%)", xscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def convergence(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """``log10(objective - optimum)`` against iterations.

    Args:
        panels: Title of a panel -> solver -> objective after every iteration. The optimum is the lowest value of
            all: every panel must show the same problem.
        path: PNG file to write.
    """
    optimum = min(min(history) for curves in panels.values() for history in curves.values())
    figure = require("matplotlib.figure").Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, history in curves.items():
            axes.plot([math.log10(max(value - optimum, 0.0) + FLOOR) for value in history], label=name)
        axes.set(title=title, xlabel="iterations", ylabel="log10(objective - optimum)", xscale="symlog", xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
