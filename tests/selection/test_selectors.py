"""The selectors: how many channels they keep, which, and what they leave in the coefficients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lnr_prune import GroupLasso, debias, solve
from lnr_prune.lasso.path import lam_for_count
from lnr_prune.selection.selectors import (
    SELECTORS,
    Backward,
    Candidates,
    Lasso,
    Norm,
    Random,
    Selection,
    at_lam,
    find_selector,
)
from tests.helpers.references import Case
from tests.helpers.strategies import make_case, twins

MAGNITUDE = torch.tensor([3.0, 1.0, 5.0, 2.0, 9.0, 4.0])


def candidates(problem: GroupLasso, seed: int = 0) -> Candidates:
    original = tuple(torch.ones_like(block.B) for block in problem.blocks)
    draws = torch.rand(problem.n_groups, generator=torch.Generator().manual_seed(seed))
    return Candidates(problem, original, MAGNITUDE, draws)


@pytest.fixture
def case() -> Case:
    return make_case(consumers=2, unpenalised=1, weighted=True)


def check_masked(problem: GroupLasso, selection: Selection) -> None:
    assert torch.equal(problem.norms(selection.coefficients) > 0, selection.support)
    for M, block in zip(selection.coefficients, problem.blocks, strict=True):
        assert M[:, block.unpenalised].all()


@pytest.mark.parametrize(
    ("settings", "value", "error", "message"),
    [
        (Backward, -1, ValueError, "swaps must be at least 0, got -1"),
        (Backward, 2.0, TypeError, "swaps must be an int, got 2.0"),
        (Backward, True, TypeError, "swaps must be an int, got True"),
        (Random, 0.5, TypeError, "seed must be an int, got 0.5"),
        (Random, 2**64, ValueError, r"seed must be in \[-2\^63, 2\^64\), got 18446744073709551616"),
        (Random, -(2**63) - 1, ValueError, "seed must be in"),
        (Lasso, "sgd", ValueError, "unknown solver 'sgd'; known solvers: proximal_gradient, fista"),
        (find_selector, "best", ValueError, "unknown selector 'best'; known: group_lasso, backward"),
        (find_selector, Norm, TypeError, r"settings such as Backward\(swaps=8\), got <class"),
        (find_selector, None, TypeError, "selector must be one of group_lasso, backward, norm, random"),
    ],
)
def test_settings_of_selectors_check_themselves(
    settings: Callable[[Any], Any], value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        settings(value)


def test_a_name_is_that_of_the_defaults() -> None:
    names = {"group_lasso": Lasso(), "backward": Backward(swaps=0), "norm": Norm(), "random": Random(seed=0)}
    assert {name: find_selector(name) for name in SELECTORS} == names
    assert find_selector(Backward(swaps=8)) == Backward(8) != Backward()
    assert Random(-(2**63)) != Random(2**64 - 1)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("count", [1, 3, 6])
def test_count_and_masks(case: Case, name: str, count: int) -> None:
    selection = SELECTORS[name].choose(candidates(case.problem), count)
    assert int(selection.support.sum()) == count
    check_masked(case.problem, selection)
    assert selection.note == ""


@pytest.mark.parametrize("solver", ["newton", "fista"])
def test_group_lasso_is_the_solution_at_its_lam(case: Case, solver: str) -> None:
    selection = Lasso(solver).choose(candidates(case.problem), 3)
    assert selection.lam is not None
    assert selection.gap is not None
    assert selection.gap <= 1e-6
    assert torch.equal(solve(case.problem, selection.lam, tol=1e-9).support, selection.support)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_exchanges_never_raise_the_error(count: int) -> None:
    errors = []
    for seed in range(20):
        problem = make_case(seed=seed, groups=12, consumers=2).problem
        plain, swapped = (Backward(swaps).choose(candidates(problem), count) for swaps in (0, 8))
        assert int(swapped.support.sum()) == count
        errors.append((problem.error(plain.coefficients), problem.error(swapped.coefficients)))
    assert all(after <= before + 1e-9 for before, after in errors)
    assert any(after < before - 1e-6 for before, after in errors)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_group_lasso_resolves_ties_by_norm(count: int) -> None:
    problem = twins()
    selection = Lasso().choose(candidates(problem), count)
    assert int(selection.support.sum()) == count
    check_masked(problem, selection)
    solution = lam_for_count(problem, count).solution
    norms = problem.norms(solution.coefficients)
    assert ("ties" in selection.note) == (solution.n_kept > count)  # one of two twins may do as well
    assert norms[selection.support].min() >= norms[~selection.support].max()


def test_group_lasso_keeps_the_count_without_signal() -> None:
    problem = make_case(dead=True, groups=6).problem
    assert int(Lasso().choose(candidates(problem), 6).support.sum()) == 6


def test_norm_keeps_the_largest_filters(case: Case) -> None:
    selection = SELECTORS["norm"].choose(candidates(case.problem), 2)
    assert selection.support.nonzero()[:, 0].tolist() == [2, 4]
    assert selection.lam is None
    assert selection.gap is None
    for M, block in zip(selection.coefficients, case.problem.blocks, strict=True):
        kept = (block.groups == 2) | (block.groups == 4) | (block.groups == -1)
        assert torch.equal(M, kept.to(M.dtype).expand_as(M))


def test_random_depends_on_the_seed_alone(case: Case) -> None:
    def draw(seed: int) -> tuple[bool, ...]:
        return tuple(SELECTORS["random"].choose(candidates(case.problem, seed), 3).support.tolist())

    assert draw(1) == draw(1)
    drawn = {draw(seed) for seed in range(30)}
    assert len(drawn) > 5
    assert all(any(support[g] for support in drawn) for g in range(6))


@pytest.mark.parametrize("factor", [0.03, 0.3])
def test_at_lam_is_the_solution(case: Case, factor: float) -> None:
    lam = factor * case.problem.lambda_max()
    selection, solution = at_lam(candidates(case.problem), lam, "newton"), solve(case.problem, lam)
    assert torch.equal(selection.support, solution.support)
    torch.testing.assert_close(selection.coefficients, solution.coefficients)
    assert (selection.lam, selection.gap, selection.note) == (lam, solution.gap, "")


@pytest.mark.parametrize("factor", [1.0, 10.0])
@pytest.mark.parametrize("seed", range(5))
def test_at_lam_keeps_one_channel_at_least(seed: int, factor: float) -> None:
    problem = make_case(seed=seed, consumers=2, unpenalised=1, weighted=True).problem
    selection = at_lam(candidates(problem), factor * problem.lambda_max(), "newton")
    first = solve(problem, 0.99 * problem.lambda_max(), tol=1e-10).support
    assert first.sum() == 1
    assert torch.equal(selection.support, first)
    assert "keeps nothing: one channel was kept" in selection.note
    assert not problem.norms(selection.coefficients).any()
    assert problem.error(debias(problem, selection.support)) < problem.error(selection.coefficients)
