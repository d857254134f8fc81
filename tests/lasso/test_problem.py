"""The problem in second moments, against the samples behind it."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lnr_prune import Block, GroupLasso, debias, solve
from lnr_prune.lasso.prox import Matrices
from tests.helpers import references
from tests.helpers.references import Case
from tests.helpers.strategies import cases, make_case, ratios, seeds


def draw(problem: GroupLasso, seed: int) -> Matrices:
    """Random coefficients."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B.shape, dtype=B.dtype, generator=generator) for B in problem.zeros())


def close(actual: float, expected: float, scale: float = 0.0) -> bool:
    return math.isclose(actual, expected, rel_tol=1e-9, abs_tol=1e-9 * scale)


def change(problem: GroupLasso, f: Callable[[Block], Block], weights: Tensor | None = None) -> GroupLasso:
    return GroupLasso(tuple(map(f, problem.blocks)), problem.weights if weights is None else weights)


@given(cases(), seeds, st.floats(0, 10))
def test_value_and_error_are_those_of_the_samples(case: Case, seed: int, lam: float) -> None:
    problem, M = case.problem, draw(case.problem, seed)
    expected = references.objective(case, M, lam)
    assert close(problem.value(M, lam), expected, abs(expected) + problem.t)
    energy = sum(float(c.y.square().sum(1).mean()) for c in case.consumers)
    assert close(problem.t, energy)
    assert close(problem.error(M), 1 + 2 * float(references.loss(case, M)) / energy, 1.0)
    assert problem.value(problem.zeros(), lam) == 0
    assert problem.error(problem.zeros()) == 1


@given(cases(), seeds)
def test_gradient_is_that_of_the_samples(case: Case, seed: int) -> None:
    M, direction = draw(case.problem, seed), draw(case.problem, seed + 1)
    gradient = case.problem.gradient(M)
    leaves = tuple(M_c.clone().requires_grad_() for M_c in M)
    expected = torch.autograd.grad(references.loss(case, leaves), leaves)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)

    # central differences are exact for a quadratic
    ahead, behind = (
        float(references.loss(case, [a + s * b for a, b in zip(M, direction, strict=True)])) for s in (0.5, -0.5)
    )
    slope = sum(float((a * b).sum()) for a, b in zip(gradient, direction, strict=True))
    assert close(ahead - behind, slope, abs(ahead) + abs(behind) + case.problem.t)


@given(cases())
def test_lambda_max_and_t_are_those_of_the_residuals(case: Case) -> None:
    """The largest correlation, by group and weight, with what the unpenalised columns leave of y."""
    fitted = references.least_squares(case, torch.zeros(case.problem.n_groups, dtype=torch.bool))
    correlations = [(c.y - c.x @ M.T).T @ c.x / len(c.x) for c, M in zip(case.consumers, fitted, strict=True)]
    expected = max(float(references.group_vector(case, correlations, g).norm() / w) for g, w in enumerate(case.weights))
    assert close(case.problem.lambda_max(), expected, expected + case.problem.t)
    remaining = 2 * float(references.loss(case, fitted)) + case.problem.t
    assert close(case.problem.eliminated.problem.t, remaining, case.problem.t)


@given(cases(samples=60))
def test_nothing_is_kept_at_lambda_max_something_just_below(case: Case) -> None:
    top = case.problem.lambda_max()
    assume(top > 0)
    for factor in (1.0, 1.5):
        solution = solve(case.problem, factor * top)
        assert solution.n_kept == 0
        assert solution.gap == 0
        assert not case.problem.norms(solution.coefficients).any()
        assert close(solution.history[-1], case.problem.value(solution.coefficients), case.problem.t)
    assert solve(case.problem, 0.999 * top, tol=1e-8).n_kept > 0


@given(cases(unpenalised=2), seeds)
def test_eliminated_columns_come_back_at_their_optimum(case: Case, seed: int) -> None:
    problem, eliminated = case.problem, case.problem.eliminated
    assert all(len(block.unpenalised) == 0 for block in eliminated.problem.blocks)
    M_p = draw(eliminated.problem, seed)
    M = eliminated.complete(M_p)
    for M_c, part, gradient, block in zip(M, M_p, problem.gradient(M), problem.blocks, strict=True):
        assert torch.equal(M_c[:, block.penalised], part)
        scale = float(block.B.abs().max() + (M_c.abs() @ block.R.abs()).max())
        assert gradient[:, block.unpenalised].abs().max() <= 1e-9 * scale
    value, reduced = problem.value(M, 1.0), eliminated.problem.value(M_p, 1.0)
    assert close(reduced - value, eliminated.constant, abs(value) + problem.t)


@settings(max_examples=30)
@given(cases(unpenalised=1, samples=60), ratios)
def test_eliminating_a_bias_is_solving_with_it_unpenalised(case: Case, ratio: float) -> None:
    assume(case.problem.lambda_max() > 0)
    lam = ratio * case.problem.lambda_max()
    solution = solve(case.problem, lam, tol=1e-9)
    expected = references.objective(case, references.group_lasso(case, lam), lam)
    actual = references.objective(case, solution.coefficients, lam)
    assert math.isclose(actual, expected, rel_tol=1e-6, abs_tol=1e-8)
    for c, M in zip(case.consumers, solution.coefficients, strict=True):  # the bias makes the mean error 0
        assert (c.y - c.x @ M.T).mean(0).abs().max() <= 1e-9 * (1 + float(c.y.abs().max()))


@given(cases(), seeds, ratios, st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 1e3]))
def test_duality_gap_bounds_the_distance_to_the_optimum(case: Case, seed: int, ratio: float, off: float) -> None:
    """At random coefficients too, with the unpenalised columns off their optimum."""
    problem, top = case.problem, case.problem.lambda_max()
    scale = problem.eliminated.problem.scale
    assume(top > 0 and scale > 1e-6 * problem.scale)
    lam = ratio * top
    best = solve(problem, lam, tol=1e-9).coefficients
    M = tuple(a + off * b for a, b in zip(best, draw(problem, seed), strict=True))
    gap = problem.duality_gap(M, lam)
    energies = (float((P * a).sum()) for P, a in zip(problem.products(M), M, strict=True))
    rounding = 1e-9 * (1 + sum(energies) / scale)
    assert gap >= -rounding
    assert gap >= (problem.value(M, lam) - problem.value(best, lam)) / scale - rounding


def test_duality_gap_of_the_optimum_is_zero_of_others_is_not() -> None:
    R, B = torch.eye(2, dtype=torch.float64), torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    problem = GroupLasso((Block(R, B, t=10.0),))
    # M = prox_2(B) = (1, 0): P = 1/2 - 3 + 2 = -1/2
    assert problem.value((torch.tensor([[1.0, 0.0]], dtype=torch.float64),), 2.0) == -0.5
    assert problem.duality_gap((torch.tensor([[1.0, 0.0]], dtype=torch.float64),), 2.0) == 0
    # M = 0: G = B, s = 2/3, D = -1/2 (1/3)^2 10 = -5/9
    assert math.isclose(problem.duality_gap(problem.zeros(), 2.0), (5 / 9) / 5)
    # M = B: G = 0 needs s = 1 (not lam / 0), P = -5 + 8, D = -5
    assert problem.duality_gap((B,), 2.0) == (-5 + 8 + 5) / 5


@given(cases(samples=60), ratios, st.sampled_from([1e-3, 0.5, 100.0]))
def test_scaling_laws(case: Case, ratio: float, c: float) -> None:
    problem, top = case.problem, case.problem.lambda_max()
    assume(top > 0)
    lam = ratio * top
    M = solve(problem, lam, tol=1e-9).coefficients
    value = problem.value(M, lam)

    everything = change(problem, lambda b: Block(c * b.R, c * b.B, c * b.t, b.groups))
    assert close(everything.lambda_max(), c * top)
    assert close(everything.value(M, c * lam), c * value, c * problem.t)
    assert everything.duality_gap(M, c * lam) <= 2e-9
    again = solve(everything, c * lam, tol=1e-9)
    assert close(again.history[-1], c * value, 10 * c * problem.t)

    outputs = change(problem, lambda b: Block(b.R, c * b.B, c**2 * b.t, b.groups))
    larger = tuple(c * M_c for M_c in M)
    assert close(outputs.lambda_max(), c * top)
    assert outputs.duality_gap(larger, c * lam) <= 2e-9
    again = solve(outputs, c * lam, tol=1e-9)
    assert close(again.history[-1], c**2 * value, 10 * c**2 * problem.t)

    weights = change(problem, lambda b: b, c * problem.weights)
    assert close(weights.lambda_max(), top / c)
    assert close(weights.value(M, lam / c), value, problem.t)


@given(cases(samples=60, duplicated=False, deficient=False), ratios, seeds)
def test_permuting_groups_permutes_the_answer(case: Case, ratio: float, seed: int) -> None:
    problem = case.problem
    assume(problem.lambda_max() > 0)
    lam = ratio * problem.lambda_max()
    order = torch.randperm(problem.n_groups, generator=torch.Generator().manual_seed(seed))
    renamed = change(
        problem,
        lambda b: Block(b.R, b.B, b.t, torch.where(b.groups >= 0, order[b.groups], -1)),
        torch.empty_like(problem.weights).index_copy(0, order, problem.weights),
    )
    first, second = solve(problem, lam, tol=1e-11), solve(renamed, lam, tol=1e-11)
    torch.testing.assert_close(first.coefficients, second.coefficients, rtol=1e-3, atol=1e-4)
    assert torch.equal(first.support, second.support[order])


def supports(case: Case, seed: int) -> Tensor:
    return torch.rand(case.problem.n_groups, generator=torch.Generator().manual_seed(seed)) < 0.6


@settings(max_examples=100)
@given(cases(), seeds, st.sampled_from([0.0, 1e-3, 1.0]))
def test_debias_is_least_squares_on_the_samples(case: Case, seed: int, ridge: float) -> None:
    """Of least norm where the kept columns are dependent."""
    support = supports(case, seed)
    actual = debias(case.problem, support, ridge)
    expected = references.least_squares(case, support, ridge)
    for M in actual:
        assert torch.isfinite(M).all()
    assert not case.problem.norms(actual)[~support].any()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(1 + b.abs().max()))


@given(cases())
def test_lam_zero_is_least_squares(case: Case) -> None:
    problem = case.problem
    solution = solve(problem, 0.0)
    expected = references.least_squares(case, torch.ones(problem.n_groups, dtype=torch.bool))
    assert close(problem.value(solution.coefficients), float(references.loss(case, expected)), problem.t)
    assert solution.gap * problem.eliminated.problem.scale <= 1e-9 * problem.scale


def test_debias_with_a_bias_by_hand() -> None:
    """y = 2 x + 3 exactly; x2 is noise that was dropped."""
    x = torch.tensor([[0.0, 1.0], [1.0, -4.0], [2.0, 2.0], [5.0, 7.0]], dtype=torch.float64)
    x = torch.cat([x, torch.ones(4, 1, dtype=torch.float64)], dim=1)
    y = 2 * x[:, :1] + 3
    problem = GroupLasso((Block(x.T @ x / 4, y.T @ x / 4, float(y.square().mean()), torch.tensor([0, 1, -1])),))
    (M,) = debias(problem, torch.tensor([True, False]))
    torch.testing.assert_close(M, torch.tensor([[2.0, 0.0, 3.0]], dtype=torch.float64))
    assert problem.error((M,)) < 1e-12


def test_least_norm_splits_evenly_between_copies() -> None:
    R = torch.ones(2, 2, dtype=torch.float64)
    problem = GroupLasso((Block(R, torch.tensor([[3.0, 3.0]], dtype=torch.float64), t=9.0),))
    (M,) = debias(problem, torch.tensor([True, True]))
    torch.testing.assert_close(M, torch.full((1, 2), 1.5, dtype=torch.float64))


@pytest.mark.parametrize("unpenalised", [0, 1])
def test_debias_without_support(unpenalised: int) -> None:
    case = make_case(unpenalised=unpenalised)
    actual = debias(case.problem, torch.zeros(6, dtype=torch.bool))
    torch.testing.assert_close(list(actual), references.least_squares(case, torch.zeros(6, dtype=torch.bool)))


@pytest.mark.parametrize("constant", [2.0, 7.3])
def test_a_channel_that_the_bias_explains_gets_nothing(constant: float) -> None:
    """What elimination leaves of it is rounding, which no solver may fit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    x[:, 1], x[:, 3] = constant, 1.0
    y = torch.randn(50, 2, dtype=torch.float64, generator=generator) + 100
    problem = references.Case(
        (references.Consumer(x, y, torch.tensor([0, 1, 2, -1])),), torch.ones(3, dtype=torch.float64)
    ).problem
    for M in (
        debias(problem, torch.tensor([False, True, False])),
        debias(problem, torch.tensor([True, True, True])),
        solve(problem, 1e-9 * problem.lambda_max()).coefficients,
    ):
        assert M[0][:, 1].abs().max() < 1e-9


def test_groups_that_no_column_belongs_to() -> None:
    case = make_case()
    problem = GroupLasso(case.problem.blocks, torch.ones(8, dtype=torch.float64))
    assert problem.n_groups == 8
    for lam in (0.0, 0.1 * problem.lambda_max()):
        assert not solve(problem, lam).support[6:].any()


EYE, ROW = torch.eye(2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
NAN = torch.full((2, 2), math.nan, dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((ROW, ROW, 1.0), "R must be"),
        ((EYE, ROW[0], 1.0), "R must be"),
        ((EYE, EYE[:, :1], 1.0), "R must be"),
        ((EYE, ROW.float(), 1.0), "dtype"),
        ((EYE.long(), ROW.long(), 1.0), "dtype"),
        ((NAN, ROW, 1.0), "finite"),
        ((EYE, NAN, 1.0), "finite"),
        ((EYE, ROW, math.inf), "finite"),
        ((EYE, ROW, 1.0, torch.arange(3)), "2 columns"),
        pytest.param((EYE, ROW, -1.0), "t", id="negative t"),
        pytest.param((EYE, ROW, 1.0, torch.tensor([0, -2])), "group", id="group below -1"),
        pytest.param((EYE, ROW, 1.0, torch.tensor([0.0, 1.0])), "group", id="groups not integers"),
        pytest.param((torch.tensor(1.0), ROW, 1.0), "R must be", id="R a scalar"),
    ],
)
def test_bad_blocks(arguments: tuple[Tensor, Tensor, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Block(*arguments)


GOOD = Block(EYE, ROW, 1.0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (((),), "at least one block"),
        (((Block(EYE, ROW, 1.0, torch.tensor([-1, -1])),),), "name 0 groups"),
        (((GOOD,), torch.ones(1)), "name 2 groups, the weights 1"),
        (((Block(EYE, ROW, 1.0, torch.tensor([0, 5])),), torch.ones(2)), "name 6 groups"),
        (((GOOD,), torch.tensor([1.0, 0.0])), "positive"),
        (((GOOD,), torch.tensor([1.0, -1.0])), "positive"),
        (((GOOD,), torch.tensor([1.0, math.nan])), "positive"),
        pytest.param(((GOOD,), torch.tensor([1.0, math.inf])), "finite", id="infinite weight"),
        pytest.param(((GOOD, Block(EYE.float(), ROW.float(), 1.0)),), "dtype", id="mixed dtypes"),
    ],
)
def test_bad_problems(arguments: tuple[tuple[Block, ...]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GroupLasso(*arguments)


@pytest.mark.parametrize("weights", [torch.ones(2), torch.ones(2, dtype=torch.long)])
def test_weights_of_another_dtype(weights: Tensor) -> None:
    assert solve(GroupLasso((GOOD,), weights), 0.1).n_kept == 2


@pytest.mark.parametrize(
    ("support", "ridge", "match"),
    [
        (torch.ones(3, dtype=torch.bool), 0.0, "2 bools"),
        (torch.ones(2), 0.0, "2 bools"),
        (torch.ones(2, dtype=torch.bool), -1.0, "ridge"),
        (torch.ones(2, dtype=torch.bool), math.nan, "ridge"),
    ],
)
def test_bad_debias_arguments(support: Tensor, ridge: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        debias(GroupLasso((GOOD,)), support, ridge)


def test_numbers_beyond_the_range_of_float32_are_finite() -> None:
    R, B = torch.eye(3, dtype=torch.float64) * 1e40, torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64) * 1e40
    problem = GroupLasso((Block(R, B, t=14e40),))
    assert solve(problem, lam=1.5e40).support.tolist() == [True, True, False]
    with pytest.raises(ValueError, match="finite"):
        Block(R, B, t=float("inf"))
