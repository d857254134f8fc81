"""The solvers: against one another, against a generic one, and what they promise about themselves."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lnr_prune import (
    AlternateMinimization,
    Block,
    Fista,
    GroupLasso,
    Newton,
    ProximalGradient,
    Solution,
    Status,
    prox_group_lasso,
    solve,
)
from lnr_prune.lasso.prox import Matrices
from lnr_prune.lasso.solution import Iterate, certified
from lnr_prune.lasso.solve import SOLVERS, Solver
from tests.helpers import references
from tests.helpers.references import Case
from tests.helpers.strategies import cases, make_case, ratios

NAMES = list(SOLVERS)
SETTINGS = [
    ProximalGradient(2),
    Fista(max_iterations=2),
    AlternateMinimization(max_iterations=2),
    Newton(max_iterations=2),
]


@cache
def toy() -> GroupLasso:
    """The test problem of the practical session: d, h, r, n = 100, 200, 80, 10000; to be solved at lam = 0.1."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    d, h, r, n = 100, 200, 80, 10_000
    x = randn(d, r) @ randn(r, n)
    y = randn(h, d) @ x
    return GroupLasso((Block((x / d) @ (x.T / n), (y / d) @ (x.T / n), float(y.square().sum() / (d * n))),))


@cache
def toy_solution(name: str) -> Solution:
    return solve(toy(), 0.1, solver=name)


def moderate(case: Case) -> float:
    """A lam at which some groups leave, not all."""
    return 0.1 * case.problem.lambda_max()


@pytest.mark.parametrize("name", NAMES)
def test_the_practical_session_is_solved(name: str) -> None:
    solution, problem = toy_solution(name), toy()
    assert solution.status is Status.CONVERGED
    assert solution.solver == name
    assert solution.lam == 0.1
    assert 0 <= solution.gap <= 1e-6
    assert math.isclose(problem.duality_gap(solution.coefficients, 0.1), solution.gap, abs_tol=1e-12)
    value = problem.value(solution.coefficients, 0.1)
    assert math.isclose(solution.history[-1], value, rel_tol=1e-12)
    assert math.isclose(value, toy_solution("newton").history[-1], rel_tol=1e-5)
    assert len(solution.history) == solution.iterations + 1


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(case=cases(samples=60, groups=5, uneven=False, deficient=False), ratio=st.sampled_from([0.1, 0.4, 0.8]))
def test_agrees_with_a_generic_solver(name: str, case: Case, ratio: float) -> None:
    problem = case.problem
    assume(problem.lambda_max() > 0)
    lam = ratio * problem.lambda_max()
    reference = references.group_lasso(case, lam)
    solution = solve(problem, lam, solver=name, tol=3e-8)
    assert solution.status is Status.CONVERGED
    expected = references.objective(case, reference, lam)
    actual = references.objective(case, solution.coefficients, lam)
    assert math.isclose(actual, expected, rel_tol=0, abs_tol=1e-7 * problem.scale + 1e-10)
    norms, reference_norms = problem.norms(solution.coefficients), problem.norms(reference)
    assert torch.equal(solution.support, norms > 0)
    if not case.duplicates:  # else the answer is not unique
        small, large = 1e-3 * reference_norms.max(), 2e-2 * reference_norms.max()
        assert solution.support[reference_norms > large].all()
        assert (norms[reference_norms < small] < large).all()


@settings(max_examples=300)
@given(cases(), st.floats(-5, -0.01))
def test_newton_never_stalls(case: Case, exponent: float) -> None:
    assume(case.problem.lambda_max() > 0)
    lam = 10**exponent * case.problem.lambda_max()
    solution = solve(case.problem, lam, tol=1e-8)
    assert solution.status is Status.CONVERGED
    assert solution.iterations <= 60
    reduced = case.problem.eliminated.problem
    rounding = 1e-8 * case.problem.scale / reduced.scale
    assert case.problem.duality_gap(solution.coefficients, lam) <= 1e-8 + rounding
    value = references.objective(case, solution.coefficients, lam)
    assert math.isclose(solution.history[-1], value, rel_tol=1e-9, abs_tol=1e-9 * case.problem.scale)


@given(cases(samples=60), ratios)
def test_proximal_gradient_descends(case: Case, ratio: float) -> None:
    assume(case.problem.lambda_max() > 0)
    lam = ratio * case.problem.lambda_max()
    history = solve(case.problem, lam, solver=ProximalGradient(max_iterations=50), tol=0.0).history
    rises = [after - before for before, after in pairwise(history)]
    assert max(rises, default=0.0) <= 1e-12 * case.problem.scale


@pytest.mark.parametrize("q", [1.0, 10.0, 50.0])
def test_fista_is_the_published_recursion(q: float) -> None:
    case = make_case()
    (block,), lam = case.problem.blocks, moderate(case)
    solution = solve(case.problem, lam, solver=Fista(momentum=q, max_iterations=20), tol=0.0)
    step = 1 / torch.linalg.eigvalsh(block.R).max()
    M = last = torch.zeros_like(block.B)
    expected = []
    for k in range(21):
        expected.append(references.objective(case, [M], lam))
        A = M + k / (k + q + 1) * (M - last)
        last, M = M, prox_group_lasso(A - step * (A @ block.R - block.B), lam * step, block.groups)
    assert solution.history == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("q", [0.0, -1.0, math.nan])
def test_fista_needs_a_positive_momentum(q: float) -> None:
    with pytest.raises(ValueError, match="momentum"):
        Fista(momentum=q)


def test_alternate_minimization_is_two_exact_minimisations_and_a_proximal_step() -> None:
    case = make_case()
    (block,), lam = case.problem.blocks, moderate(case)
    solution = solve(case.problem, lam, solver=AlternateMinimization(max_iterations=5), tol=0.0)
    step = 1 / torch.linalg.eigvalsh(block.R).max()
    M, expected = step * block.B, []
    for _ in range(6):
        eta = torch.stack([M[:, block.groups == g].norm() for g in range(6)])
        M = block.B @ torch.linalg.inv(block.R + lam * torch.diag(1 / eta[block.groups]))
        proximal = prox_group_lasso(M - step * (M @ block.R - block.B), lam * step, block.groups)
        expected.append(references.objective(case, [proximal], lam))
    assert solution.history == pytest.approx(expected, rel=1e-6)


def test_alternate_minimization_hands_over_to_fista() -> None:
    case = make_case()
    lam = moderate(case)
    rounds = solve(case.problem, lam, solver=AlternateMinimization(rounds=3, max_iterations=2), tol=0.0)
    whole = solve(case.problem, lam, solver=AlternateMinimization(rounds=3, max_iterations=10), tol=0.0)
    after = solve(case.problem, lam, solver=Fista(max_iterations=7), tol=0.0, start=rounds.coefficients)
    assert whole.history == pytest.approx((*rounds.history, *after.history), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_warm_start(name: str) -> None:
    case = make_case(consumers=2, unpenalised=1, groups=8, uneven=False)
    lam = moderate(case)
    cold = solve(case.problem, lam, solver=name, tol=1e-8)
    warm = solve(case.problem, lam, solver=name, tol=1e-8, start=cold.coefficients)
    assert warm.iterations <= 1 < cold.iterations
    far = solve(case.problem, 9 * lam).coefficients
    for start in (far, tuple(-M for M in far), tuple(torch.full_like(M, 100.0) for M in far)):
        again = solve(case.problem, lam, solver=name, tol=1e-8, start=start)
        assert again.status is Status.CONVERGED
        assert math.isclose(again.history[-1], cold.history[-1], rel_tol=1e-7)


@pytest.mark.parametrize("solver", SETTINGS, ids=NAMES)
def test_too_few_iterations(solver: Solver) -> None:
    case = make_case(groups=12, unpenalised=1)
    lam = 0.01 * case.problem.lambda_max()
    solution = solve(case.problem, lam, solver=solver, tol=1e-12)
    assert solution.status is Status.MAX_ITERATIONS
    assert solution.iterations == 2
    assert len(solution.history) == 3
    assert "max_iterations" in solution.status.advice
    assert solution.status.advice in repr(solution)
    assert math.isclose(case.problem.duality_gap(solution.coefficients, lam), solution.gap, rel_tol=1e-6)


@given(cases(samples=60), ratios)
def test_float32_gap_is_honest(case: Case, ratio: float) -> None:
    """Whatever the status, the float32 answer is as good as its gap says, to float32's rounding."""
    problem, lam = case.problem, ratio * case.problem.lambda_max()
    solution = solve(single(problem), lam)
    coefficients = tuple(M.double() for M in solution.coefficients)
    best = solve(problem, lam, tol=1e-10)
    excess = problem.value(coefficients, lam) - problem.value(best.coefficients, lam)
    assert excess / problem.scale <= solution.gap + 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_float32_least_squares_gap_is_honest(seed: int) -> None:
    """Small eigenvalues are lost in float32: the answer is then not the optimum, and must not say so."""
    problem = make_case(seed=seed, consumers=2, groups=11, deficient=True).problem
    solution = solve(single(problem), 0.0)
    coefficients = tuple(M.double() for M in solution.coefficients)
    excess = problem.value(coefficients) - solve(problem, 0.0).history[-1]
    assert excess / problem.scale <= 1.5 * solution.gap + 1e-5
    assert solution.status is (Status.CONVERGED if solution.gap <= 1e-6 else Status.STALLED)


def single(problem: GroupLasso) -> GroupLasso:
    blocks = (Block(b.R.float(), b.B.float(), b.t, b.groups) for b in problem.blocks)
    return GroupLasso(tuple(blocks), problem.weights.float())


@dataclass(frozen=True)
class Subgradient:
    """Somebody else's solver: no base class, a few lines, slow."""

    max_iterations: int = 3000
    rounds: int = 10_000

    def iterates(self, problem: GroupLasso, lam: float, start: Matrices, tol: float) -> Iterator[Iterate]:
        M = start
        step = 1 / max(float(block.R.trace()) for block in problem.blocks)
        for _ in range(self.rounds):
            yield certified(problem, M, problem.products(M), lam)
            descended = [a - step * g for a, g in zip(M, problem.gradient(M), strict=True)]
            M = prox_group_lasso(descended, lam * step * problem.weights, problem.groups)


def test_a_third_partys_solver() -> None:
    case = make_case(consumers=2, weighted=True, unpenalised=1)
    lam = moderate(case)
    solution = solve(case.problem, lam, solver=Subgradient(), tol=1e-4)
    assert solution.solver == "Subgradient"
    assert solution.status is Status.CONVERGED
    expected = solve(case.problem, lam).history[-1]
    assert math.isclose(solution.history[-1], expected, abs_tol=1e-4 * case.problem.scale)
    few = solve(case.problem, lam, solver=Subgradient(max_iterations=3), tol=1e-4)
    assert few.status is Status.MAX_ITERATIONS


def test_a_solver_that_gives_up_has_stalled() -> None:
    case = make_case()
    solution = solve(case.problem, moderate(case), solver=Subgradient(rounds=3), tol=1e-9)
    assert solution.status is Status.STALLED
    assert solution.iterations == 2
    assert solution.gap > 1e-9
    assert "float64" in solution.status.advice


def test_a_solver_without_a_single_iterate_returns_its_start() -> None:
    case = make_case()
    lam = moderate(case)
    solution = solve(case.problem, lam, solver=Subgradient(rounds=0))
    assert solution.status is Status.STALLED
    assert solution.iterations == 0
    assert math.isclose(solution.gap, case.problem.duality_gap(case.problem.zeros(), lam))


def test_the_best_iterate_is_returned() -> None:
    """FISTA is not monotone: the last iterate may be worse than an earlier one."""
    case = make_case(groups=12, deficient=True)
    lam = 1e-3 * case.problem.lambda_max()
    gaps = [
        solve(case.problem, lam, solver=Fista(momentum=0.1, max_iterations=k), tol=0.0).gap for k in range(30, 130, 5)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert len(set(gaps)) < len(gaps)  # there were iterates worse than their predecessors


@pytest.mark.parametrize("name", NAMES)
def test_one_consumer_reads_no_penalised_column(name: str) -> None:
    case = make_case(unpenalised=1)
    (block,) = case.problem.blocks
    free = Block(block.R, block.B, block.t, torch.full_like(block.groups, -1))
    lam = moderate(case)
    solution = solve(GroupLasso((block, free)), lam, solver=name)
    alone = solve(case.problem, lam, solver=name)
    torch.testing.assert_close(solution.coefficients[0], alone.coefficients[0], rtol=1e-2, atol=1e-3)
    assert solution.status is Status.CONVERGED


@pytest.mark.parametrize("name", NAMES)
def test_no_signal(name: str) -> None:
    blocks = make_case(consumers=2).problem.blocks
    silent = GroupLasso(tuple(replace(block, B=0 * block.B, t=0.0) for block in blocks))
    for lam in (0.0, 1.0):
        solution = solve(silent, lam, solver=name)
        assert solution.status is Status.CONVERGED
        assert solution.n_kept == 0


def test_unknown_solver_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'simplex'.*" + ", ".join(NAMES)):
        solve(make_case().problem, 0.1, solver="simplex")


@pytest.mark.parametrize("name", ["lam", "tol"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_bad_numbers(name: str, value: float) -> None:
    arguments = {"lam": 0.1, "tol": 1e-6} | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be finite and >= 0"):
        solve(make_case().problem, arguments["lam"], tol=arguments["tol"])


def test_solvers_accept_settings_or_a_name() -> None:
    problem = make_case().problem
    assert solve(problem, 0.1, solver=Newton()).history == solve(problem, 0.1).history


@settings(max_examples=60)
@given(case=cases(), exponent=st.floats(-4, -0.05))
def test_mixed_precision_ends_where_float64_does(case: Case, exponent: float) -> None:
    """Small problems are solved in float64 alone: here they are not."""
    assume(case.problem.lambda_max() > 0)
    lam = 10**exponent * case.problem.lambda_max()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lnr_prune.lasso.newton.SINGLE_COLUMNS", 1)
        mixed = solve(case.problem, lam, tol=1e-8)
    double = solve(case.problem, lam, tol=1e-8, solver=Newton(mixed=False))
    assert mixed.status is Status.CONVERGED
    assert math.isclose(mixed.history[-1], double.history[-1], abs_tol=2e-8 * case.problem.scale)
    apart = [a - b for a, b in zip(mixed.coefficients, double.coefficients, strict=True)]
    fits = sum(float((D @ block.R * D).sum()) for D, block in zip(apart, case.problem.blocks, strict=True))
    assert fits <= 8e-8 * case.problem.scale + 1e-12  # the objective is strongly convex in M x
    if not case.duplicates:  # else M is not unique
        torch.testing.assert_close(mixed.coefficients, double.coefficients, rtol=0.1, atol=1e-1)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_second_moments_that_float32_cannot_hold(scale: float) -> None:
    """x of size 1e-12 or 1e12: their second moments are out of range, and the answer scales."""
    block = make_case(groups=12, uneven=False).problem.blocks[0]
    far = GroupLasso((Block(block.R * scale**2, block.B * scale, block.t, block.groups),))
    assert far.single is None
    near = GroupLasso((block,))
    a, b = solve(far, 0.1 * far.lambda_max(), tol=1e-9), solve(near, 0.1 * near.lambda_max(), tol=1e-9)
    assert torch.equal(a.support, b.support)
    torch.testing.assert_close(a.coefficients[0] * scale, b.coefficients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_solutions_say_what_they_cost(name: str) -> None:
    solution = toy_solution(name)
    assert solution.seconds > 0
    assert (solution.factorisations > 0) == (name in ("newton", "alternate_minimization"))


def test_max_iterations_in_float32_is_certified_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lnr_prune.lasso.newton.SINGLE_COLUMNS", 1)
    case = make_case(groups=12, unpenalised=1)
    lam = 0.01 * case.problem.lambda_max()
    solution = solve(case.problem, lam, solver=Newton(max_iterations=2), tol=1e-12)
    assert solution.status is Status.MAX_ITERATIONS
    assert solution.coefficients[0].dtype == torch.float64
    assert math.isclose(case.problem.duality_gap(solution.coefficients, lam), solution.gap, rel_tol=1e-6)
