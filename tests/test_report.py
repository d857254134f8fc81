"""The report: what it says, and that it is plain data."""

import json

import pytest
import torch

import lnr_prune as lnr
from lnr_prune.report import Report


def _report() -> Report:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3))
    return lnr.prune(model, [torch.randn(64, 6)], keep=0.5).report


def test_a_report_survives_json() -> None:
    report = _report()
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize("change", [{"groups": None}, {"groups": [{"name": "0"}]}, {"surprise": 1}])
def test_what_is_not_a_report_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a report"):
        Report.from_dict({**_report().to_dict(), **change})
