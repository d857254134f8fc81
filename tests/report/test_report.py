"""The report: what it says, and that it is plain data."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import lnr_prune as lnr
from lnr_prune.report.report import Report
from lnr_prune.report.rows import GroupReport
from lnr_prune.selection.costs import cost


def _report() -> Report:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3))
    return lnr.prune(model, [torch.randn(64, 6)], lnr.Keep(0.5)).report


def test_a_report_survives_json() -> None:
    report = _report()
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize("change", [{"groups": None}, {"groups": [{"name": "0"}]}, {"surprise": 1}])
def test_what_is_not_a_report_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a report"):
        Report.from_dict({**_report().to_dict(), **change})


def test_it_knows_sizes_and_latencies_and_compares_without_the_latter() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 3)).eval()
    pruned = lnr.prune(model, [torch.randn(64, 6)], lnr.Keep(0.5))
    report = pruned.report
    assert (report.size_before, report.size_after) == (cost.size(model), cost.size(pruned.model))
    assert report.latency_before is not None
    assert report.latency_after is not None
    assert 0 < report.latency_before < 10
    assert 0 < report.latency_after < 10
    assert "latency (rough)" in " ".join(str(report).split())
    inplace = lnr.prune(copy.deepcopy(model), [torch.randn(64, 6)], lnr.Keep(0.5), into="model").report
    assert (inplace.latency_before, inplace.latency_after) == (None, None)
    assert "latency" not in str(inplace) + inplace.to_html()
    assert replace(report, latency_after=1.0) == report
    old = {name: value for name, value in report.to_dict().items() if not name.startswith(("size_", "latency_"))}
    assert "size" not in str(Report.from_dict(old))


def test_a_group_that_loses_nothing_has_no_error() -> None:
    """The lasso's own coefficients would be shrunk, but the pruned model does not have them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    )
    data = [torch.randn(64, 6)]
    whole, half = lnr.prune(model, data, lnr.Keep({"0": 8, "2": 4})).report.groups
    assert (whole.kept, whole.error, whole.before_refit) == (8, 0.0, 0.0)
    assert half.error is not None
    assert half.error > 0
    left = lnr.prune(model, data, lnr.Penalty(ratio={"0": 0.01}), refit=None).report.groups[0]
    assert (left.kept, left.error, left.before_refit) == (8, 0.0, 0.0)
    some = lnr.prune(model, data, lnr.Penalty(ratio={"0": 0.5}), refit=None).report.groups[0]
    assert some.kept < 8
    assert some.error == some.before_refit
    assert some.error is not None
    assert some.error > 0


def test_what_is_being_done_is_told() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3))
    told: list[str] = []
    lnr.prune(model, [torch.randn(64, 6)], lnr.Budget(params=0.5), run=lnr.Run(progress=told.append))
    steps = ["statistics (1 of 1", "measuring 0 (1 of 1", "trying a refit (1 of 1", "predicting (1 of 1"]
    steps += ["selecting 0 (1 of 1", "refitting 0 (1 of 2", "refitting 2 (2 of 2"]
    assert [each.split(", ")[0] for each in told] == steps
    assert all(each.endswith(" left)") for each in told)


@pytest.mark.parametrize("more", [{}, {"predicted": 0.1}, {"gap": 1e-6}, {"gap": 1e-6, "predicted": 0.1}])
def test_reasons_are_in_the_last_column(more: dict[str, Any]) -> None:
    row = GroupReport("a", ("a",), ("b",), 4, 2, note="why", **more)
    lines = str(Report((row,), (), 0.0, {"c": "said"}, 1, 1, 1, 1)).splitlines()
    of_group, frozen = (next(line for line in lines if word in line) for word in ("why", "frozen: said"))
    assert of_group.index("why") == frozen.index("frozen")


def test_names_are_no_markup() -> None:
    row = GroupReport("[red]a[/]", ("[red]a[/]",), ("[/b]",), 4, 2, note="[link=x]")
    text = str(Report((row,), (), 0.0, {"[i]c": "[/]"}, 1, 1, 1, 1))
    for part in ("[red]a[/]", "[/b]", "[link=x]", "[i]c", "frozen: [/]"):
        assert part in text


def test_models_that_take_turns_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    class Takes(torch.nn.Module):
        """Lets the clock go on by so much, call by call."""

        def __init__(self, *seconds: float) -> None:
            super().__init__()
            self.seconds = iter(seconds)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal clock
            clock += next(self.seconds)
            return x

    monkeypatch.setattr(cost, "now", lambda: clock)
    models = [Takes(1000, 3, 90, 4), Takes(2000, 0.25, 0.5, 0.125)]  # the first calls warm up
    assert cost.side_by_side(models, ((torch.zeros(2, 3),), {}), rounds=3) == [4, 0.25]
