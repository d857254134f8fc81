"""The lam that keeps a wanted number of groups."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lnr_prune import Block, GroupLasso, solve
from lnr_prune.lasso.path import lam_for_count, regularization_path
from tests.helpers.references import Case
from tests.helpers.strategies import cases, make_case, twins


@settings(max_examples=30)
@given(cases(samples=60, deficient=False, dead=False, constant=False, duplicated=False), st.data())
def test_exact_count_on_continuous_data(case: Case, data: st.DataObject) -> None:
    problem = case.problem
    count = data.draw(st.integers(1, problem.n_groups))
    solution = lam_for_count(problem, count).solution
    assert solution.n_kept == count
    assert solution.gap <= 1e-6
    assert 0 <= solution.lam < problem.lambda_max()
    again = solve(problem, solution.lam, tol=1e-9)
    assert math.isclose(solution.history[-1], again.history[-1], abs_tol=1e-6 * problem.scale)


@pytest.mark.parametrize("solver", ["newton", "fista"])
def test_every_count_with_falling_lam(solver: str) -> None:
    problem = make_case(groups=6, consumers=2, unpenalised=1, weighted=True).problem
    lams = []
    for count in range(1, 7):
        solution = lam_for_count(problem, count, solver=solver).solution
        assert solution.n_kept == count
        assert solution.solver in (solver, "least_squares")
        lams.append(solution.lam)
    assert lams == sorted(lams, reverse=True)


def test_groups_that_nearly_tie() -> None:
    """Two groups enter within 0.05 % of lambda_max: a gap of 1e-6 cannot tell one from two."""
    problem = make_case(seed=9, consumers=2, groups=9, unpenalised=1, uneven=False).problem
    assert [lam_for_count(problem, count).solution.n_kept for count in (1, 2, 3)] == [1, 2, 3]


def test_tol_is_passed_on() -> None:
    problem = make_case(groups=8).problem
    assert lam_for_count(problem, 4, tol=1e-11).solution.gap <= 1e-11


@pytest.mark.parametrize("count", range(1, 7))
def test_ties_keep_more_rather_than_fewer(count: int) -> None:
    assert (
        count <= lam_for_count(twins(), count).solution.n_kept <= count + count % 2
    )  # one of two twins may do as well


def test_more_than_can_be_kept() -> None:
    """A dead channel enters at no lam: least squares keeps all the others."""
    problem = make_case(groups=5, deficient=True, dead=True).problem
    solution = lam_for_count(problem, 5).solution
    assert solution.lam == 0
    assert solution.support.tolist() == [True, False, True, True, True]


def test_no_signal_keeps_nothing() -> None:
    (block,) = make_case().problem.blocks
    solution = lam_for_count(GroupLasso((replace(block, B=0 * block.B, t=0.0),)), 2).solution
    assert solution.n_kept == 0
    assert math.isclose(solution.gap, 0.0)


def test_an_output_that_the_bias_explains_keeps_nothing() -> None:
    x = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 1
    y = torch.full((40, 2), 3.0, dtype=torch.float64)
    block = Block(x.T @ x / 40, y.T @ x / 40, float(y.square().sum() / 40), torch.tensor([0, 1, 2, -1]))
    solution = lam_for_count(GroupLasso((block,)), 2).solution
    torch.testing.assert_close(
        solution.coefficients[0], torch.tensor([[0.0, 0, 0, 3], [0, 0, 0, 3]], dtype=torch.float64)
    )


@pytest.mark.parametrize("count", [-1, 0, 7])
def test_count_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the 6 groups"):
        lam_for_count(make_case().problem, count)


def test_a_search_says_what_it_cost_and_why_it_failed() -> None:
    problem = make_case(groups=12, consumers=2).problem
    search = lam_for_count(problem, 5)
    assert search.note == ""
    assert search.visits[-1].n_kept == 5
    assert search.visits[-1].lam == search.solution.lam
    assert all(visit.factorisations > 0 and visit.seconds > 0 for visit in search.visits)
    tied = [lam_for_count(twins(), count) for count in range(1, 7)]
    assert all((search.note == "") == (search.solution.n_kept == count) for count, search in enumerate(tied, 1))
    assert "keeps 4 of 5" in lam_for_count(make_case(groups=5, deficient=True, dead=True).problem, 5).note


@settings(max_examples=20)
@given(cases(samples=60, groups=8), st.sampled_from(["newton", "alternate_minimization"]))
def test_a_path_is_its_solutions(case: Case, solver: str) -> None:
    problem = case.problem
    path = regularization_path(problem, n_lams=6, smallest=0.05, solver=solver)
    top = problem.lambda_max()
    expected = [top * 0.05 ** (k / 5) for k in range(6)]
    torch.testing.assert_close(path.lams, torch.tensor(expected, dtype=torch.float64))
    for solution in path.solutions:
        assert solution.gap <= 1e-6
        alone = solve(problem, solution.lam, tol=1e-9)
        assert math.isclose(solution.history[-1], alone.history[-1], abs_tol=2e-6 * problem.scale)
    assert path.counts.tolist() == [solution.n_kept for solution in path.solutions]


def test_a_path_starts_warm_and_adds_up() -> None:
    problem = make_case(groups=12, consumers=2, unpenalised=1).problem
    lams = [0.1, 0.3, 0.02, 0.2]
    path = regularization_path(problem, lams)
    assert path.lams.tolist() == sorted(lams, reverse=True)
    assert path.factorisations == sum(s.factorisations for s in path.solutions)
    assert path.seconds == sum(s.seconds for s in path.solutions)
    near = regularization_path(problem, [0.1, 0.0999])
    assert near.solutions[1].iterations < solve(problem, 0.0999).iterations


def test_progress_goes_to_stderr_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    problem = make_case().problem
    regularization_path(problem, n_lams=2)
    assert capsys.readouterr().err == ""
    regularization_path(problem, n_lams=2, progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("arguments", [{"n_lams": 0}, {"smallest": 0.0}, {"smallest": 1.0}])
def test_bad_paths(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="n_lams must be >= 1 and smallest in"):
        regularization_path(make_case().problem, **arguments)  # type: ignore[arg-type]
