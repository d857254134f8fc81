"""The sweep: every amount once, the frontier as its definition says, retraining that depends on the seed alone."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lnr_prune as lnr
from lnr_prune.graph.module import named_tensors
from lnr_prune.report.frontier import Sweep, SweepPoint
from lnr_prune.report.report import Report
from lnr_prune.settings import Amount

REPORT = Report((), (), 0.0, {}, 1000, 1000, 1000, 1000)
AMOUNTS: list[Amount] = [
    lnr.Budget(params=0.7),
    lnr.Keep(0.5),
    lnr.Budget(macs=0.6, grid=lnr.Grid(minimum=2, leave=("0",))),
]


def _problem() -> tuple[torch.nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    layers = (torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3))
    return torch.nn.Sequential(*layers), list(torch.randn(4, 32, 6))


VALUES = st.integers(1, 6) | st.just(math.nan)


@given(st.lists(st.tuples(st.integers(1, 3), VALUES), min_size=1, max_size=8), st.booleans())
def test_the_frontier_is_what_nothing_else_beats(points: list[tuple[int, float]], maximize: bool) -> None:
    model = torch.nn.Identity()
    all_points = tuple(
        SweepPoint(str(i), model, replace(REPORT, params_after=cost), value) for i, (cost, value) in enumerate(points)
    )
    found = Sweep(all_points, "value", maximize, "params", 0.0).pareto

    def beaten(i: int) -> bool:
        (cost, value), sign = points[i], -1 if maximize else 1
        return math.isnan(value) or any(
            sign * v <= sign * value and c <= cost and ((c, v) != (cost, value) or j < i)
            for j, (c, v) in enumerate(points)
            if j != i
        )

    expected = [point for i, point in enumerate(all_points) if not beaten(i)]
    assert sorted(map(id, found)) == sorted(map(id, expected))
    assert [p.share("params") for p in found] == sorted(p.share("params") for p in found)


def test_every_amount_is_pruned_once_and_the_model_is_left_alone() -> None:
    model, data = _problem()
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    swept = lnr.sweep(model, data, AMOUNTS, selector="backward")
    assert [point.amount for point in swept.points] == ["params=0.7", "Keep(0.5)", "macs=0.6, minimum=2, leave=('0',)"]
    for point, amount in zip(swept.points, AMOUNTS, strict=True):
        alone = lnr.prune(model, data, amount, selector="backward")
        assert point.report == alone.report
        assert point.value == pytest.approx(alone.report.error)
        assert point.retrained is None
    assert (swept.measure, swept.maximize, swept.dense) == ("error of the outputs", False, 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(model).items())


def test_logits_are_compared_as_in_the_reports() -> None:
    model, data = _problem()
    swept = lnr.sweep(model, data, [lnr.Keep(0.5)], logits=True)
    assert swept.points[0].value == pytest.approx(swept.points[0].report.error)
    assert swept.points[0].value != pytest.approx(lnr.sweep(model, data, [lnr.Keep(0.5)]).points[0].value)
    with pytest.raises(ValueError, match=r"one tensor \(samples, ..., classes\), got \(6,\)"):
        lnr.sweep(torch.nn.Sequential(model, torch.nn.Flatten(0)), torch.randn(2, 6), [lnr.Keep(0.5)], logits=True)


def test_retraining_follows_the_seed_and_is_what_counts() -> None:
    model, data = _problem()

    def retrain(pruned: torch.nn.Module) -> None:
        with torch.no_grad():
            for parameter in pruned.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)

    def swept(amounts: list[Amount]) -> Sweep:
        return lnr.sweep(model, data, amounts, retrain=retrain, seed=3)

    state = torch.random.get_rng_state()
    first = swept([lnr.Keep(6), lnr.Keep(4)])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.randn(7)
    second = swept([lnr.Keep(4)])
    assert second.points[0].retrained == first.points[1].retrained
    for point in first.points:
        assert point.retrained != point.value
        assert point.final == point.retrained


def test_a_retrained_model_that_is_returned_takes_the_place() -> None:
    model, data = _problem()
    zero = torch.nn.Sequential(torch.nn.Linear(6, 3))
    swept = lnr.sweep(model, data, [lnr.Keep(4)], retrain=lambda pruned: zero)
    assert swept.points[0].model is zero


def test_the_users_measure() -> None:
    model, data = _problem()

    def accuracy(of: torch.nn.Module) -> float:
        return float(sum(p.numel() for p in of.parameters()))

    swept = lnr.sweep(model, iter(data), [lnr.Keep(4), lnr.Keep(6), lnr.Keep(5)], evaluate=accuracy, cost="macs")
    assert swept.measure == "accuracy"
    assert swept.dense == accuracy(model)
    assert [point.amount for point in swept.pareto] == ["Keep(4)", "Keep(5)", "Keep(6)"]
    less = lnr.sweep(model, data, [lnr.Keep(4), lnr.Keep(6)], evaluate=accuracy, maximize=False)
    assert [point.amount for point in less.pareto] == ["Keep(4)"]


def test_it_prints_and_is_plain_data() -> None:
    model, data = _problem()
    swept = lnr.sweep(model, data, [lnr.Keep(4)], retrain=lambda pruned: pruned)
    text = str(swept)
    assert "Keep(4)" in text
    assert "retrained" in text
    (point,) = json.loads(json.dumps(swept.to_dict()))["points"]
    assert Report.from_dict(point["report"]) == swept.points[0].report
    assert point["pareto"] is True


@pytest.mark.parametrize(
    ("amounts", "options", "message"),
    [
        ([], {}, "at least one amount"),
        ([lnr.Keep(4)], {"cost": "money"}, "unknown cost 'money'; known: params, macs"),
        ([lnr.Keep(4)], {"into": "model"}, "into='model'"),
        ([lnr.Penalty(0.1)], {"selector": "norm"}, "give Keep or Budget"),
    ],
)
def test_mistakes(amounts: list[Amount], options: dict[str, Any], message: str) -> None:
    model, data = _problem()
    with pytest.raises(ValueError, match=message):
        lnr.sweep(model, data, amounts, **options)
