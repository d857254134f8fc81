"""The selectors: how many channels they keep, which, and what they leave in the coefficients."""

import pytest
import torch

from lnr_prune import GroupLasso, debias, solve
from lnr_prune.lasso.path import lam_for_count
from lnr_prune.selection.selectors import SELECTORS, Candidates, Selection, at_lam, group_lasso
from tests.helpers.references import Case
from tests.helpers.strategies import make_case, twins

MAGNITUDE = torch.tensor([3.0, 1.0, 5.0, 2.0, 9.0, 4.0])


def candidates(problem: GroupLasso, seed: int = 0) -> Candidates:
    original = tuple(torch.ones_like(block.B) for block in problem.blocks)
    return Candidates(
        problem,
        original,
        MAGNITUDE,
        "newton",
        torch.rand(problem.n_groups, generator=torch.Generator().manual_seed(seed)),
    )


@pytest.fixture
def case() -> Case:
    return make_case(consumers=2, unpenalised=1, weighted=True)


def check_masked(problem: GroupLasso, selection: Selection) -> None:
    assert torch.equal(problem.norms(selection.coefficients) > 0, selection.support)
    for M, block in zip(selection.coefficients, problem.blocks, strict=True):
        assert M[:, block.unpenalised].all()


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("count", [1, 3, 6])
def test_count_and_masks(case: Case, name: str, count: int) -> None:
    selection = SELECTORS[name](candidates(case.problem), count)
    assert int(selection.support.sum()) == count
    check_masked(case.problem, selection)
    assert selection.note == ""


def test_group_lasso_is_the_solution_at_its_lam(case: Case) -> None:
    selection = group_lasso(candidates(case.problem), 3)
    assert selection.lam is not None
    assert selection.gap is not None
    assert selection.gap <= 1e-6
    assert torch.equal(solve(case.problem, selection.lam, tol=1e-9).support, selection.support)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_group_lasso_resolves_ties_by_norm(count: int) -> None:
    problem = twins()
    selection = group_lasso(candidates(problem), count)
    assert int(selection.support.sum()) == count
    check_masked(problem, selection)
    solution = lam_for_count(problem, count).solution
    norms = problem.norms(solution.coefficients)
    assert ("ties" in selection.note) == (solution.n_kept > count)  # one of two twins may do as well
    assert norms[selection.support].min() >= norms[~selection.support].max()


def test_group_lasso_keeps_the_count_without_signal() -> None:
    problem = make_case(dead=True, groups=6).problem
    assert int(group_lasso(candidates(problem), 6).support.sum()) == 6


def test_norm_keeps_the_largest_filters(case: Case) -> None:
    selection = SELECTORS["norm"](candidates(case.problem), 2)
    assert selection.support.nonzero()[:, 0].tolist() == [2, 4]
    assert selection.lam is None
    assert selection.gap is None
    for M, block in zip(selection.coefficients, case.problem.blocks, strict=True):
        kept = (block.groups == 2) | (block.groups == 4) | (block.groups == -1)
        assert torch.equal(M, kept.to(M.dtype).expand_as(M))


def test_random_depends_on_the_seed_alone(case: Case) -> None:
    def draw(seed: int) -> tuple[bool, ...]:
        return tuple(SELECTORS["random"](candidates(case.problem, seed), 3).support.tolist())

    assert draw(1) == draw(1)
    drawn = {draw(seed) for seed in range(30)}
    assert len(drawn) > 5
    assert all(any(support[g] for support in drawn) for g in range(6))


@pytest.mark.parametrize("factor", [0.03, 0.3])
def test_at_lam_is_the_solution(case: Case, factor: float) -> None:
    lam = factor * case.problem.lambda_max()
    selection, solution = at_lam(candidates(case.problem), lam), solve(case.problem, lam)
    assert torch.equal(selection.support, solution.support)
    torch.testing.assert_close(selection.coefficients, solution.coefficients)
    assert (selection.lam, selection.gap, selection.note) == (lam, solution.gap, "")


@pytest.mark.parametrize("factor", [1.0, 10.0])
@pytest.mark.parametrize("seed", range(5))
def test_at_lam_keeps_one_channel_at_least(seed: int, factor: float) -> None:
    problem = make_case(seed=seed, consumers=2, unpenalised=1, weighted=True).problem
    selection = at_lam(candidates(problem), factor * problem.lambda_max())
    first = solve(problem, 0.99 * problem.lambda_max(), tol=1e-10).support
    assert first.sum() == 1
    assert torch.equal(selection.support, first)
    assert "keeps nothing: one channel was kept" in selection.note
    assert not problem.norms(selection.coefficients).any()
    assert problem.error(debias(problem, selection.support)) < problem.error(selection.coefficients)
