"""Backward elimination and exchanges, against refits from the samples."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lnr_prune import Block, GroupLasso, debias
from lnr_prune.lasso.backward import backward
from lnr_prune.lasso.exchange import exchange
from tests.helpers import references
from tests.helpers.references import Case
from tests.helpers.strategies import cases, make_case, twins

REGULAR = {"samples": 60, "deficient": False, "dead": False, "constant": False, "duplicated": False}


@settings(max_examples=100)
@given(cases())
def test_errors_are_those_of_the_refit(case: Case) -> None:
    """At every size, whatever the rank, to the ridge and to rounding."""
    problem, result = case.problem, backward(case.problem)
    assert sorted(result.order.tolist()) == list(range(problem.n_groups))
    for count in range(problem.n_groups + 1):
        support = result.support(count)
        assert int(support.sum()) == count
        expected = references.relative_error(case, references.least_squares(case, support))
        assert expected - 1e-6 <= float(result.errors[count]) <= expected + 1e-5
    assert (result.errors.diff() <= 1e-6).all()


@settings(max_examples=30)
@given(cases(**REGULAR, uneven=False))
def test_every_step_is_the_cheapest(case: Case) -> None:
    result = backward(case.problem, ridge=1e-12)  # whose own share of the errors is below what is compared
    for count in range(case.problem.n_groups, 0, -1):
        support = result.support(count)
        errors = [references.without(case, support, g) for g in support.nonzero()[:, 0].tolist()]
        assert math.isclose(float(result.errors[count - 1]), min(errors), rel_tol=1e-6, abs_tol=1e-6)


def test_consumers_whose_groups_are_all_gone_are_left_alone() -> None:
    """The small outputs of the second consumer go first; its five columns are gone when the first is halved."""
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for groups, size in ((torch.arange(260), 1.0), (torch.arange(260, 265), 1e-3)):
        x = torch.randn(400, len(groups), dtype=torch.float64, generator=generator)
        y = size * x @ torch.randn(len(groups), 3, dtype=torch.float64, generator=generator)
        blocks.append(Block(x.T @ x / 400, y.T @ x / 400, float(y.square().sum() / 400), groups))
    problem = GroupLasso(tuple(blocks), torch.ones(267, dtype=torch.float64))  # and two that nobody reads
    result = backward(problem)
    assert sorted(result.order[:7].tolist()) == list(range(260, 267))
    for count in (265, 260, 130, 20, 0):
        error = problem.error(debias(problem, result.support(count)))
        assert math.isclose(float(result.errors[count]), error, rel_tol=1e-3, abs_tol=1e-6)


@pytest.mark.parametrize("wide", [False, True])
def test_many_panels(wide: bool) -> None:
    """More columns than a panel holds, and halves that are computed afresh: the same as one refit after another."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(150).repeat_interleave(2) if wide else torch.randperm(260, generator=generator)
    x = torch.randn(400, len(groups), dtype=torch.float64, generator=generator)
    x = x @ torch.randn(len(groups), len(groups), dtype=torch.float64, generator=generator) / len(groups) ** 0.5
    y = x @ torch.randn(len(groups), 5, dtype=torch.float64, generator=generator)
    problem = GroupLasso((Block(x.T @ x / 400, y.T @ x / 400, float(y.square().sum() / 400), groups),))
    result, kept = backward(problem, ridge=1e-12), torch.ones(problem.n_groups, dtype=torch.bool)
    for g in result.order.tolist():
        (M,) = debias(problem, kept)
        columns = kept[groups]
        H = torch.zeros_like(problem.blocks[0].R)
        H[columns.nonzero(), columns.nonzero()[:, 0]] = torch.linalg.inv(problem.blocks[0].R[columns][:, columns])
        costs = torch.full((problem.n_groups,), math.inf, dtype=torch.float64)
        for other in kept.nonzero()[:, 0].tolist():
            own = (groups == other).nonzero()[:, 0]
            costs[other] = (M[:, own] @ torch.linalg.inv(H[own][:, own]) * M[:, own]).sum()
        assert costs[g] <= costs.min() * (1 + 1e-6)
        kept[g] = False
    for count in (0, 1, 40, 100, 149):
        refitted = problem.error(debias(problem, result.support(count)))
        assert math.isclose(float(result.errors[count]), refitted, rel_tol=1e-6, abs_tol=1e-9)


def test_channels_that_nobody_needs_go_first() -> None:
    """A dead channel and one of two copies cost nothing."""
    problem = make_case(dead=True, duplicated=True, unpenalised=1, consumers=2, linear=True).problem
    result = backward(problem)
    assert 1 in result.order[:2]
    assert {0, 5} & set(result.order[:2].tolist())
    assert result.errors[4] < 1e-7
    assert result.errors[3] > 1e-4


def test_twins_go_in_turn() -> None:
    result = backward(twins())
    assert {g % 3 for g in result.order[:3].tolist()} == {0, 1, 2}
    assert result.errors[3] - result.errors[6] < 1e-6


def test_more_outputs_than_inputs_and_float32() -> None:
    (block,) = make_case(uneven=False).problem.blocks
    B = block.B.repeat(20, 1)
    tall = backward(GroupLasso((Block(block.R, B, 20 * block.t, block.groups),)))
    short = backward(GroupLasso((block,)))
    assert torch.equal(tall.order, short.order)
    torch.testing.assert_close(tall.errors, short.errors)
    single = backward(GroupLasso((Block(block.R.float(), block.B.float(), block.t, block.groups),)), ridge=1e-6)
    torch.testing.assert_close(single.errors, short.errors, rtol=1e-3, atol=1e-5)


def test_no_signal_and_groups_without_columns() -> None:
    (block,) = make_case().problem.blocks
    silent = GroupLasso((Block(block.R, 0 * block.B, 0.0, block.groups),), torch.ones(8, dtype=torch.float64))
    result = backward(silent)
    assert len(result.order) == 8
    assert not result.errors.any()


@settings(max_examples=60)
@given(cases(), st.data())
def test_an_exchange_never_hurts(case: Case, data: st.DataObject) -> None:
    problem = case.problem
    count = data.draw(st.integers(0, problem.n_groups))
    chosen = data.draw(st.permutations(range(problem.n_groups)))[:count]
    support = torch.zeros(problem.n_groups, dtype=torch.bool)
    support[chosen] = True
    before = support.clone()
    better = exchange(problem, support, tries=problem.n_groups)
    assert torch.equal(support, before)
    assert int(better.sum()) == count
    error = references.relative_error(case, references.least_squares(case, better))
    assert error <= references.relative_error(case, references.least_squares(case, support)) + 1e-7


@settings(max_examples=30)
@given(cases(**REGULAR, uneven=False), st.data())
def test_an_exchange_ends_where_no_swap_helps(case: Case, data: st.DataObject) -> None:
    n = case.problem.n_groups
    support = torch.arange(n) < data.draw(st.integers(1, n))
    better = exchange(case.problem, support, tries=n)
    error = references.relative_error(case, references.least_squares(case, better))
    for p in (~better).nonzero()[:, 0].tolist():
        grown = better.clone()
        grown[p] = True
        assert min(references.without(case, grown, g) for g in grown.nonzero()[:, 0].tolist()) >= error - 1e-5


def test_an_exchange_mends_a_bad_choice() -> None:
    case = make_case(groups=10, consumers=2, unpenalised=1, uneven=False)
    result = backward(case.problem)
    worst = ~result.support(6)
    errors = [case.problem.error(debias(case.problem, s)) for s in (worst, exchange(case.problem, worst))]
    assert errors[1] < 0.7 * errors[0]
    assert errors[1] <= 1.5 * float(result.errors[4])


@pytest.mark.parametrize("ridge", [0.0, -1.0, math.nan])
def test_the_ridge_must_be_positive(ridge: float) -> None:
    with pytest.raises(ValueError, match="ridge must be > 0"):
        backward(twins(), ridge=ridge)


@pytest.mark.parametrize("count", [-1, 7])
def test_count_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match="between 0 and the 6 groups"):
        backward(twins()).support(count)


def test_a_matrix_that_rounding_has_made_indefinite() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 30, generator=generator)
    R = (x.T @ x).double() / 8  # of rank 8, in float32
    R -= 1e-6 * torch.eye(30, dtype=torch.float64)
    B = torch.randn(4, 30, generator=generator).double() @ R
    result = backward(GroupLasso((Block(R, B, t=100.0),)))
    assert bool(result.errors.isfinite().all())
    assert bool((result.errors.diff() <= 1e-6).all())
