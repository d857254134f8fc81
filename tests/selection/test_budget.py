"""Budgets, their grid and their effort check themselves; what is left alone is not shared out."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import lnr_prune as lnr
from lnr_prune.graph.groups import find_groups
from tests.helpers.models import mlp


@pytest.mark.parametrize(
    ("settings", "values", "error", "message"),
    [
        (lnr.Budget, {}, ValueError, "needs a limit: one or more of params, macs, size, latency, error"),
        (lnr.Budget, {"params": 0.0}, ValueError, r"budget params must be a fraction in \(0, 1\], got 0.0"),
        (lnr.Budget, {"macs": 1.5}, ValueError, "budget macs must be a fraction"),
        (lnr.Budget, {"params": 0.5, "latency": float("nan")}, ValueError, "budget latency must be a fraction"),
        (lnr.Budget, {"size": "half"}, TypeError, "budget size must be a number"),
        (lnr.Budget, {"error": True}, TypeError, "budget error must be a number"),
        (lnr.Budget, {"macs": 0.5, "grid": {"round_to": 8}}, TypeError, r"such as Grid\(round_to=8\), got {'round_to'"),
        (lnr.Budget, {"macs": 0.5, "effort": 3}, TypeError, r"such as Effort\(samples=512\), got 3"),
        (lnr.Grid, {"round_to": 0}, ValueError, "round_to must be at least 1, got 0"),
        (lnr.Grid, {"minimum": 0}, ValueError, "minimum must be at least 1, got 0"),
        (lnr.Grid, {"minimum": 2.5}, TypeError, "minimum must be an int, got 2.5"),
        (lnr.Grid, {"leave": ("a", 3)}, TypeError, "leave must be names of layers, got 3"),
        (lnr.Effort, {"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        (lnr.Effort, {"refits": -1}, ValueError, "refits must be at least 0, got -1"),
        (lnr.Effort, {"search": 1.5}, TypeError, "search must be an int, got 1.5"),
    ],
)
def test_budgets_check_themselves(
    settings: Callable[..., Any], values: Mapping[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        settings(**values)


def test_equal_budgets_are_equal_however_they_are_written() -> None:
    assert lnr.Grid(leave=["a", "b"]) == lnr.Grid(leave=("a", "b"))  # type: ignore[arg-type]
    assert lnr.Grid(leave="a") == lnr.Grid(leave=("a",))  # type: ignore[arg-type]
    assert lnr.Budget(macs=0.5) == lnr.Budget(macs=0.5, grid=lnr.Grid(), effort=lnr.Effort())
    assert len({lnr.Budget(macs=0.5, grid=lnr.Grid(leave="a")), lnr.Budget(macs=0.5)}) == 2  # type: ignore[arg-type]


def test_groups_that_are_left_do_not_shrink() -> None:
    graph = find_groups(mlp(4, 9, 8, 3), (torch.randn(2, 4),), {})
    for leave, shrinking in (((), ["0", "2"]), (("2",), ["0"]), (("0", "2"), [])):
        budget = lnr.Budget(macs=0.5, grid=lnr.Grid(leave=leave))
        assert [group.name for group in budget.groups(graph)] == shrinking
    with pytest.raises(ValueError, match="leave names 'nobody', which is not a prunable producer; known: 0, 2"):
        lnr.Budget(macs=0.5, grid=lnr.Grid(leave=("nobody",))).groups(graph)
