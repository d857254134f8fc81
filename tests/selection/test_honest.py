"""Honest with little data: nothing is judged by what it was fitted to."""

import os
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.calibration.data import calibrate, first_of_each_half
from lnr_prune.calibration.divergence import divergence
from lnr_prune.calibration.examples import short_example
from lnr_prune.calibration.reading import Reading, fit, read
from lnr_prune.graph.groups import find_groups
from lnr_prune.graph.module import named_tensors
from lnr_prune.lasso.backward import backward
from lnr_prune.lasso.problem import debias
from lnr_prune.selection.honest import held_out_error, ridges_of
from tests.helpers.models import mlp, randomised

DRAWS = int(os.environ.get("LNR_PRUNE_DRAWS", "20"))


def reading_of(model: nn.Module, x: Tensor) -> tuple[Reading, Mapping[str, Tensor]]:
    data = calibrate(model, [x])
    graph = find_groups(model, *short_example(model, data))
    return read(model, graph.groups[:1], data, bias=True)[0], named_tensors(model)


def test_the_held_out_error_is_that_of_samples_that_were_not_fitted_to() -> None:
    model = randomised(mlp(6, 10, 3)).double().requires_grad_(False)
    x = torch.randn(40, 6, dtype=torch.float64)
    reading, tensors = reading_of(model, x)
    problem = reading.problem(tensors, part=fit, ridges=ridges_of(reading, tensors))
    support = backward(problem).support(4)
    (M,) = debias(problem, support)
    _, judging = first_of_each_half(calibrate(model, [x]), None)
    judges = torch.cat([batch for (batch,), _ in judging])
    hidden = torch.cat([model[:2](judges), judges.new_ones(len(judges), 1)], 1)
    error = (model(judges) - hidden @ M.T).square().sum() / model(judges).square().sum()
    assert held_out_error(reading, tensors, (M,)) == pytest.approx(float(error))


def test_with_few_samples_the_ridge_is_large_and_with_many_it_is_small() -> None:
    model = randomised(mlp(30, 60, 20)).double()
    few, many = (reading_of(model, torch.randn(n, 30, dtype=torch.float64)) for n in (30, 3000))
    assert ridges_of(*few)[0] >= 100 * ridges_of(*many)[0]


@pytest.mark.parametrize("selector", ["group_lasso", "backward", "norm", "random"])
@pytest.mark.parametrize("refit", [None, lnr.Refit()])
def test_a_group_that_loses_nothing_is_left_as_it_is(selector: str, refit: lnr.Refit | None) -> None:
    model, x = randomised(mlp(6, 10, 8, 3)), torch.randn(8, 6)
    pruned = lnr.prune(model, x, lnr.Keep(1.0), selector=selector, refit=refit)
    assert torch.equal(pruned.model(x), model(x))
    assert [group.before_refit for group in pruned.report.groups] == [0.0, 0.0]


def test_few_samples_are_told_before_channels_are_chosen(caplog: pytest.LogCaptureFixture) -> None:
    lnr.prune(randomised(mlp(6, 40, 3)), torch.randn(30, 6), lnr.Keep(0.5))
    assert "'2' has 41 columns; there are 30 calibration samples" in caplog.text


def promised_and_shown(seed: int, samples: int, share: float) -> tuple[float, float]:
    """The error that a budget predicts, and the one on fresh samples."""
    torch.manual_seed(seed)
    model = randomised(mlp(12, 48, 32, 6)).double()
    x, fresh = (torch.randn(n, 12, dtype=torch.float64) for n in (samples, 2000))
    pruned = lnr.prune(model, x.split(16), lnr.Budget(params=share, effort=lnr.Effort(refits=0)), selector="backward")
    predicted = sum(group.predicted or 0.0 for group in pruned.report.groups)
    with torch.no_grad():
        return predicted, divergence([model(fresh)], [pruned.model(fresh)])


def test_a_prediction_is_kept_by_new_data() -> None:
    """In 95 of 100 draws the error on fresh samples is at most 1.5 times as large as predicted."""
    draws = [promised_and_shown(seed, 24 + 4 * (seed % 20), 0.4 + 0.1 * (seed % 5)) for seed in range(DRAWS)]
    broken = [(predicted, shown) for predicted, shown in draws if shown > 1.5 * predicted]
    assert len(broken) <= DRAWS // 20, broken


@settings(max_examples=3)
@given(st.integers(0, 1000))
def test_a_prediction_is_not_fear_either(seed: int) -> None:
    predicted, shown = promised_and_shown(seed, 400, 0.6)
    assert predicted <= 2.5 * shown
