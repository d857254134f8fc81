"""Amounts: they check themselves, say for which groups they hold, and are never guessed from a bare number."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

import lnr_prune as lnr
from lnr_prune.graph.groups import Graph, find_groups
from lnr_prune.selection.amount import keep_count
from lnr_prune.selection.selectors import Lasso, Norm
from tests.helpers.models import mlp


@pytest.fixture
def graph() -> Graph:
    return find_groups(mlp(4, 9, 8, 3), (torch.randn(2, 4),), {})


@pytest.mark.parametrize(
    ("settings", "values", "error", "message"),
    [
        (lnr.Keep, {"channels": 0}, ValueError, "at least one channel, got keep=0"),
        (lnr.Keep, {"channels": 0.0}, ValueError, r"a fraction in \(0, 1\], got 0.0"),
        (lnr.Keep, {"channels": {"a": 4, "b": 1.5}}, ValueError, r"a fraction in \(0, 1\], got 1.5"),
        (lnr.Keep, {"channels": True}, TypeError, "a number or a mapping of numbers, got True"),
        (lnr.Keep, {"channels": {"a": "half"}}, TypeError, "a number or a mapping of numbers, got 'half'"),
        (lnr.Penalty, {}, ValueError, "by one of lam and ratio, got neither"),
        (lnr.Penalty, {"lam": 0.1, "ratio": 0.1}, ValueError, "by one of lam and ratio, got lam and ratio"),
        (lnr.Penalty, {"lam": -1}, ValueError, "lam must be finite and >= 0, got -1"),
        (lnr.Penalty, {"ratio": {"a": float("inf")}}, ValueError, "ratio must be finite and >= 0, got inf"),
        (lnr.Penalty, {"ratio": "large"}, TypeError, "a number or a mapping of numbers, got 'large'"),
    ],
)
def test_amounts_check_themselves(
    settings: Callable[..., Any], values: Mapping[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        settings(**values)


@pytest.mark.parametrize(
    ("amount", "first", "second"),
    [
        (0.5, r"lnr\.Keep\(0\.5\) keeps so many channels of every group", r"lnr\.Budget\(macs=0\.5\) keeps that share"),
        (8, r"lnr\.Keep\(8\) keeps so many channels of every group", r"lnr\.Budget\(macs=0\.5\) keeps that share"),
        ({"0": 4}, r"lnr\.Keep\({'0': 4}\) if it names layers", r"lnr\.Budget\(macs=0\.5\) if it limits"),
    ],
)
def test_what_could_mean_two_things_is_refused_with_both(amount: Any, first: str, second: str) -> None:
    with pytest.raises(TypeError, match=f"{first}.*{second}"):
        lnr.prune(mlp(4, 9, 3), torch.randn(20, 4), amount)


@pytest.mark.parametrize(
    ("keep", "size", "count"),
    [(1, 9, 1), (1.0, 9, 9), (0.5, 8, 4), (0.01, 9, 1), (100, 9, 9), (np.int64(3), 9, 3), (np.float32(0.25), 8, 2)],
)
def test_an_int_is_a_count_and_a_float_a_fraction(keep: float, size: int, count: int) -> None:
    assert keep_count(keep, size) == count


@pytest.mark.parametrize("amount", [lnr.Keep, lnr.Penalty, lambda value: lnr.Penalty(ratio=value)])
def test_layers_that_are_not_named_are_left_out(amount: Callable[[Any], Any], graph: Graph) -> None:
    def chosen(value: Any) -> list[str]:
        return [group.name for group in amount(value).choices(graph, Lasso())]

    assert chosen(1) == ["0", "2"]
    assert chosen({"2": 1}) == ["2"]
    assert chosen({"2": 1, "0": 1}) == ["0", "2"]  # in order of execution
    assert chosen({}) == []
    with pytest.raises(ValueError, match=r"names '4', which is not a prunable producer \(output of the model\)"):
        chosen({"4": 1})


def test_a_penalty_is_that_of_the_lasso(graph: Graph) -> None:
    with pytest.raises(ValueError, match=r"needs the group lasso as selector; with Norm\(\), give Keep or Budget"):
        lnr.Penalty(0.1).choices(graph, Norm())
