"""Figures with matplotlib, which is imported only when one is asked for; nothing is shown, no global state is used."""

from __future__ import annotations

import importlib
import io
from functools import partial
from typing import TYPE_CHECKING, Any

from lnr_prune.chart import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lnr_prune.report import Report
    from lnr_prune.solvers import Solution
    from lnr_prune.sweep import Sweep


def groups(report: Report) -> Figure:
    """Two panels with one bar a group: channels kept, and errors before and after the refit."""
    figure = _figure(9.0, 1.2 + 0.25 * len(report.groups))
    kept, errors = figure.subplots(1, 2, sharey=True)
    names = [group.name for group in report.groups]
    places = range(len(names))
    kept.barh(places, [100 * group.kept / group.size for group in report.groups], color="C0")
    kept.set(xlabel="channels kept (%)", xlim=(0, 100), yticks=places, yticklabels=names)
    kept.invert_yaxis()
    for shift, height, colour, label, values in (
        (-0.2, 0.35, "C1", "before the refit", [group.before_refit for group in report.groups]),
        (0.2, 0.35, "C0", "after it", [group.error for group in report.groups]),
    ):
        errors.barh([at + shift for at in places], [100 * (v or 0) for v in values], height, color=colour, label=label)
    errors.set(xlabel="squared error of the readers (%)")
    errors.legend()
    return figure


def convergence(solution: Solution, axes: Axes | None = None) -> Figure:
    """Objective above the best value reached, by iteration."""
    axes = axes or _figure(6.0, 4.0).subplots()
    best = min(solution.history)
    axes.plot([value - best for value in solution.history], marker=".", label=solution.solver)
    axes.set(xlabel="iterations", ylabel="P(M) − best P", yscale="log")
    axes.set_title(f"gap {solution.gap:.1e} after {solution.iterations} iterations", fontsize="medium")
    return _figure_of(axes)


def frontier(sweep: Sweep, axes: Axes | None = None) -> Figure:
    """Value against cost, with and without retraining; filled points are on the frontier."""
    axes = axes or _figure(6.0, 4.0).subplots()
    points = sorted(sweep.points, key=lambda point: point.share(sweep.cost))
    best = set(map(id, sweep.pareto))
    shares = [100 * point.share(sweep.cost) for point in points]
    curves = {"as pruned": [point.value for point in points]}
    if any(point.retrained is not None for point in points):
        curves["retrained"] = [point.final for point in points]
    for name, values in curves.items():
        axes.plot(shares, values, marker="o", markerfacecolor="none", label=name)
    on = [(share, point.final) for share, point in zip(shares, points, strict=True) if id(point) in best]
    axes.plot(*zip(*on, strict=True), "o", color=f"C{len(curves) - 1}")
    if sweep.dense is not None:
        axes.axhline(sweep.dense, color="grey", linestyle=":", label="original")
    axes.set(xlabel=f"{LABELS[sweep.cost]} (%)", ylabel=sweep.measure)
    axes.grid(alpha=0.3)
    axes.legend()
    return _figure_of(axes)


def _figure(width: float, height: float) -> Figure:
    """An empty figure that notebooks know how to show."""
    try:
        module: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise ImportError("plots need matplotlib: run pip install 'lnr-prune[recipes]'") from error
    figure = module.Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = partial(_png, figure)
    return figure  # type: ignore[no-any-return]


def _figure_of(axes: Axes) -> Figure:
    figure: Any = axes.figure
    return figure  # type: ignore[no-any-return]


def _png(figure: Figure) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=110)
    return written.getvalue()
