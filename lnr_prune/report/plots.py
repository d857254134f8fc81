"""Figures with matplotlib, imported only when a figure is wanted; nothing is shown, no global state is used."""

from __future__ import annotations

import importlib
import io
from functools import partial
from typing import TYPE_CHECKING, Any

from lnr_prune.lasso.solution import Solution

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_convergence(solution: Solution, axes: Axes | None = None) -> Figure:
    """``P(M)`` minus the best value that the solver reached, against iterations, as a matplotlib figure.

    Args:
        solution: What `lnr_prune.solve` returned.
        axes: Draw into these; default: a new figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    axes = axes or new_figure(6.0, 4.0).subplots()
    best = min(solution.history)
    axes.plot([value - best for value in solution.history], marker=".", label=solution.solver)
    axes.set(xlabel="iterations", ylabel="P(M) − best P", yscale="log")
    axes.set_title(f"gap {solution.gap:.1e} after {solution.iterations} iterations", fontsize="medium")
    return figure_of(axes)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that notebooks can show."""
    try:
        module: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise ImportError("plots need matplotlib: run pip install 'lnr-prune[recipes]'") from error
    figure = module.Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = partial(_png, figure)
    return figure  # type: ignore[no-any-return]


def figure_of(axes: Axes) -> Figure:
    """The figure that the axes belong to."""
    figure: Any = axes.figure
    return figure  # type: ignore[no-any-return]


def _png(figure: Figure) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=110)
    return written.getvalue()
