"""The plan of a prune: its steps are those that are taken, and its time grows with the work."""

import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.calibration.calls import Call
from lnr_prune.calibration.data import calibrate
from lnr_prune.graph.groups import find_groups
from lnr_prune.selection.costs import forecast

PLAIN = lnr.Refit()
EFFORT = lnr.Effort(samples=16, refits=1, search=2)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def data() -> list[Tensor]:
    return list(torch.randn(48, 6, generator=torch.Generator().manual_seed(1)).split(16))


@pytest.mark.parametrize(
    ("amount", "options"),
    [
        (lnr.Keep(0.5), {}),
        (lnr.Keep(0.5), {"refit": None}),
        (lnr.Budget(params=0.5, effort=EFFORT), {"refit": lnr.Refit(window=2, iterations=1)}),
        (lnr.Tolerance(drop=0.5, evaluations=2, effort=lnr.Effort(samples=16, refits=1)), {}),
    ],
)
def test_the_steps_are_those_of_the_plan(amount: Any, options: dict[str, Any]) -> None:
    told = list[str]()
    lnr.prune(net(), data(), amount, run=lnr.Run(progress=told.append), **options)
    last: dict[str, tuple[int, int]] = {}
    for text in told:
        found = re.search(r"^(\w+).*\((\d+) of (\d+), .* left\)$", text)
        assert found, text
        last[found[1]] = int(found[2]), int(found[3])
    search = last.pop("searching", (0, 0))
    assert search[0] <= search[1] + 1  # the first trial is the sizes without a search
    assert all(done == planned for done, planned in last.values()), last
    assert ("refitting" in last) == ("refit" not in options or options["refit"] is not None)


def test_more_work_takes_more_time(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(forecast, "measured_speed", lambda *_: forecast.Speed(1e-3, 1e-9))
    model = net()
    call: Call = (torch.zeros(2, 6),), {}
    graph = find_groups(model, *call)

    def seconds(samples: int, refit: lnr.Refit | None = PLAIN, **options: Any) -> float:
        of = calibrate(model, [torch.zeros(samples, 6)])
        return sum(s.seconds for s in forecast.forecast(model, graph, graph.groups, of, call, refit, **options))

    with caplog.at_level(logging.INFO, "lnr_prune"):
        plain = seconds(100)
    assert "forward passes of 100 samples, about " in caplog.text
    assert 3 < plain / 0.1 < 6  # passes
    assert seconds(100, None) < plain < seconds(100, effort=EFFORT) < seconds(100, effort=EFFORT, evaluations=3)
    assert seconds(200) == pytest.approx(2 * plain, rel=0.2)
    assert seconds(100, lnr.Refit(window=2)) > 3 * plain
    assert seconds(100, passes=3) > plain
