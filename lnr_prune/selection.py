"""Selectors: which channels of a group are kept, and the coefficients before the refit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lnr_prune.backward import backward as eliminate
from lnr_prune.path import lam_for_count
from lnr_prune.problem import GroupLasso, debias
from lnr_prune.prox import Matrices
from lnr_prune.solvers import Solver, solve
from lnr_prune.swaps import exchange


@dataclass(frozen=True, eq=False)
class Selection:
    """What a selector decides.

    Attributes:
        support: True for every channel that is kept, (n_groups,) bool.
        coefficients: M on the support, zero elsewhere, as the selector left it.
        lam: The lam it was found at; None if there is none.
        gap: Relative duality gap of the solve; None if nothing was solved.
        note: What a user should know, "" if nothing.
    """

    support: Tensor
    coefficients: Matrices
    lam: float | None = None
    gap: float | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a selector may look at.

    Attributes:
        problem: The group-lasso problem of the channels over all their consumers.
        original: The consumers' own matrices, for selectors that only mask.
        magnitude: L1 norm of every channel's filter over its producers, (n_groups,).
        solver: For selectors that solve.
        draws: Uniform in [0, 1), (n_groups,), for selectors that draw.
    """

    problem: GroupLasso
    original: Matrices
    magnitude: Tensor
    solver: str | Solver
    draws: Tensor


def group_lasso(candidates: Candidates, count: int) -> Selection:
    """The groups that the lasso keeps where it keeps ``count``; ties go by their norm."""
    problem = candidates.problem
    search = lam_for_count(problem, count, solver=candidates.solver)
    solution = search.solution
    chosen = Selection(solution.support, solution.coefficients, solution.lam, solution.gap)
    if solution.n_kept == count:
        return chosen
    support = _largest(problem.norms(solution.coefficients), count)
    note = f"{search.note}: ties resolved by norm"
    return replace(chosen, support=support, coefficients=_masked(problem, solution.coefficients, support), note=note)


def backward(candidates: Candidates, count: int) -> Selection:
    """The groups that backward elimination keeps, refitted."""
    return _refitted(candidates.problem, eliminate(candidates.problem).support(count))


def backward_swap(candidates: Candidates, count: int) -> Selection:
    """Backward elimination, then swaps of one kept for one dropped group while they help."""
    problem = candidates.problem
    return _refitted(problem, exchange(problem, eliminate(problem).support(count)))


def norm(candidates: Candidates, count: int) -> Selection:
    """The ``count`` channels whose filters have the largest L1 norm (a baseline)."""
    return _mask_original(candidates, _largest(candidates.magnitude, count))


def random(candidates: Candidates, count: int) -> Selection:
    """``count`` channels drawn at random (a baseline)."""
    return _mask_original(candidates, _largest(candidates.draws.to(candidates.problem.weights.device), count))


SELECTORS: Mapping[str, Callable[[Candidates, int], Selection]] = {
    "group_lasso": group_lasso,
    "backward": backward,
    "backward_swap": backward_swap,
    "norm": norm,
    "random": random,
}


def at_lam(candidates: Candidates, lam: float) -> Selection:
    """The groups that the lasso keeps at lam; where it keeps none, the one that would enter first."""
    problem = candidates.problem
    solution = solve(problem, lam, solver=candidates.solver)
    if solution.n_kept:
        return Selection(solution.support, solution.coefficients, lam, solution.gap)
    reduced = problem.eliminated.problem
    support = _largest(reduced.norms([block.B for block in reduced.blocks]) / problem.weights, 1)
    note = f"lam={lam:.4g} >= lambda_max={problem.lambda_max():.4g} keeps nothing: one channel was kept"
    return Selection(support, solution.coefficients, lam, solution.gap, note)


def _largest(scores: Tensor, count: int) -> Tensor:
    support = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    support[torch.argsort(scores, descending=True, stable=True)[:count]] = True
    return support


def _refitted(problem: GroupLasso, support: Tensor) -> Selection:
    return Selection(support, debias(problem, support))


def _mask_original(candidates: Candidates, support: Tensor) -> Selection:
    return Selection(support, _masked(candidates.problem, candidates.original, support))


def _masked(problem: GroupLasso, coefficients: Matrices, support: Tensor) -> Matrices:
    """Zero off the support; unpenalised columns stay."""
    keep = torch.cat([support, support.new_ones(1)])
    return tuple(M * keep[groups] for M, groups in zip(coefficients, problem.groups, strict=True))
