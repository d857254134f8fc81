"""Figures: what they hold, that notebooks show them, and what is said where matplotlib is missing."""

import sys
from functools import partial
from typing import Any

import pytest
import torch

import lnr_prune as lnr

pytest.importorskip("matplotlib")


def _drawables() -> tuple[lnr.Solution, lnr.Pruned, lnr.Sweep]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3))
    data = [torch.randn(64, 6)]
    x = torch.randn(50, 6, dtype=torch.float64)
    y = x @ torch.randn(6, 4, dtype=torch.float64)
    problem = lnr.GroupLasso((lnr.Block(x.T @ x / 50, y.T @ x / 50, float((y * y).sum() / 50)),))
    swept = lnr.sweep(model, data, [lnr.Keep(9), lnr.Keep(3)], retrain=lambda pruned: pruned)
    return lnr.solve(problem, 0.5, solver="fista"), lnr.prune(model, data, lnr.Keep(0.5)), swept


def test_figures_hold_the_numbers() -> None:
    solution, pruned, swept = _drawables()
    (axes,) = lnr.plot_convergence(solution).axes
    best = min(solution.history)
    assert list(axes.lines[0].get_ydata()) == [value - best for value in solution.history]  # type: ignore[arg-type]
    assert axes.get_yscale() == "log"

    figure = pruned.report.plot()
    kept, errors = figure.axes
    assert [bar.get_width() for bar in kept.patches] == [50.0]  # type: ignore[attr-defined]
    group = pruned.report.groups[0]
    assert [bar.get_width() for bar in errors.patches] == [  # type: ignore[attr-defined]
        pytest.approx(100 * error) for error in (group.before_refit, group.error) if error is not None
    ]
    assert [label.get_text() for label in kept.get_yticklabels()] == ["0"]

    (axes,) = swept.plot().axes
    labels = [line.get_label() for line in axes.lines]
    assert {"as pruned", "retrained", "original"} <= set(labels)
    values = axes.lines[labels.index("as pruned")].get_ydata()
    assert list(values) == [point.value for point in reversed(swept.points)]  # type: ignore[arg-type]


def test_notebooks_show_them_and_nothing_global_is_touched() -> None:
    loaded = "matplotlib.pyplot" in sys.modules
    for drawable in _drawables():
        figure: Any = (
            lnr.plot_convergence(drawable) if isinstance(drawable, lnr.Solution)
            else drawable.report.plot() if isinstance(drawable, lnr.Pruned) else drawable.plot()
        )  # fmt: skip
        assert figure._repr_png_().startswith(b"\x89PNG")
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_several_go_into_given_axes() -> None:
    from matplotlib.figure import Figure

    solution, _, swept = _drawables()
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert lnr.plot_convergence(solution, left) is figure
    assert lnr.plot_convergence(solution, left) is figure
    assert len(left.lines) == 2
    assert swept.plot(right) is figure


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    solution, pruned, swept = _drawables()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for plot in (partial(lnr.plot_convergence, solution), pruned.report.plot, swept.plot):
        with pytest.raises(ImportError, match=r"pip install 'lnr-prune\[recipes\]'"):
            plot()
