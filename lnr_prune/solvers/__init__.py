"""Solvers of the group-lasso problem, all behind one verb, `solve`."""

import math
from collections.abc import Iterator
from typing import Protocol

import torch

from lnr_prune.problem import GroupLasso, debias
from lnr_prune.prox import Matrices
from lnr_prune.solvers.alternate_minimization import AlternateMinimization
from lnr_prune.solvers.fista import Fista
from lnr_prune.solvers.newton import Newton
from lnr_prune.solvers.proximal_gradient import ProximalGradient
from lnr_prune.solvers.solution import Solution, Status

__all__ = [
    "SOLVERS",
    "AlternateMinimization",
    "Fista",
    "Newton",
    "ProximalGradient",
    "Solution",
    "Solver",
    "Status",
    "solve",
]


class Solver(Protocol):
    """Settings of a solver, and its sequence of iterates."""

    @property
    def max_iterations(self) -> int:
        """When to give up."""
        ...

    def iterates(self, problem: GroupLasso, lam: float, start: Matrices) -> Iterator[tuple[Matrices, Matrices]]:
        """Yields (M, M R), the start or a first step first; ends only where rounding stops all progress."""
        ...


SOLVERS: dict[str, type[Solver]] = {
    "proximal_gradient": ProximalGradient,
    "fista": Fista,
    "alternate_minimization": AlternateMinimization,
    "newton": Newton,
}


def solve(
    problem: GroupLasso,
    lam: float,
    *,
    solver: str | Solver = "newton",
    tol: float = 1e-6,
    start: Matrices | None = None,
) -> Solution:
    """``argmin_M P(M)`` of a `GroupLasso`, to a relative duality gap of ``tol``.

    Unpenalised columns are eliminated first, exactly. Every solver stops on the duality gap, which
    bounds the distance to the optimum, never on the change from one iteration to the next.

    Args:
        problem: The problem.
        lam: Penalty, >= 0. At ``problem.lambda_max()`` and above the answer is M = 0 (a legal one); at 0
            it is least squares.
        solver: A name of `SOLVERS`, or settings such as ``Fista(momentum=50)``.
        tol: Relative duality gap to reach, >= 0.
        start: Coefficients to start from (a warm start). Default: zero.

    Returns:
        The `Solution`; its ``status`` says whether the tolerance was reached.

    Raises:
        ValueError: If the solver is unknown, or lam or tol is negative or not finite.

    Example:
        >>> import torch
        >>> from lnr_prune import Block, GroupLasso
        >>> R, B = torch.eye(3, dtype=torch.float64), torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
        >>> solve(GroupLasso((Block(R, B, t=14.0),)), lam=1.5).support
        tensor([ True,  True, False])
    """
    solver = find_solver(solver)
    for name, number in (("lam", lam), ("tol", tol)):
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be finite and >= 0, got {number}")
    name = next((name for name, kind in SOLVERS.items() if type(solver) is kind), type(solver).__name__)
    eliminated = problem.eliminated
    reduced = eliminated.problem

    def solution(M: Matrices, gap: float, history: list[float], status: Status, label: str = name) -> Solution:
        values = tuple(value - eliminated.constant for value in history)
        support = reduced.norms(M) > 0
        return Solution(eliminated.complete(M), support, lam, max(gap, 0.0), values, len(values) - 1, label, status)

    if lam == 0:
        M = tuple(
            M_c[:, block.penalised]
            for M_c, block in zip(debias(problem, problem.weights > 0), problem.blocks, strict=True)
        )
        value, gap = _least_squares_gap(reduced, M)
        status = Status.CONVERGED if gap <= tol else Status.STALLED
        return solution(M, gap, [value], status, "least_squares")
    if lam >= problem.lambda_max():
        return solution(reduced.zeros(), 0.0, [0.0], Status.CONVERGED)

    if start is None:
        begin = reduced.zeros()
    else:
        begin = tuple(M[:, block.penalised] for M, block in zip(start, problem.blocks, strict=True))
    history: list[float] = []
    best, best_gap, status = begin, math.inf, Status.STALLED
    for M, MR in solver.iterates(reduced, lam, begin):
        value, gap = reduced.certificate(M, MR, lam)
        history.append(value)
        if gap < best_gap:
            best, best_gap = M, gap
        if gap <= tol:
            status = Status.CONVERGED
            break
        if len(history) > solver.max_iterations:
            status = Status.MAX_ITERATIONS
            break
    if not history:
        value, best_gap = reduced.certificate(best, reduced.products(best), lam)
        history.append(value)
    return solution(best, best_gap, history, status)


def _least_squares_gap(problem: GroupLasso, M: Matrices) -> tuple[float, float]:
    """Objective and gap of a least-squares solution: zero if ``M R = B`` to rounding, else what t can tell."""
    MR = problem.products(M)
    value, gap = problem.certificate(M, MR, 0.0)
    for M_c, MR_c, block in zip(M, MR, problem.blocks, strict=True):
        eps = 10 * max(1, len(block.R)) * torch.finfo(block.R.dtype).eps
        if float((MR_c - block.B).norm()) > eps * float(M_c.norm() * block.R.norm() + block.B.norm()):
            return value, gap
    return value, 0.0


def find_solver(solver: str | Solver) -> Solver:
    """The settings that a solver's name stands for; settings are returned as they are.

    Raises:
        ValueError: If no solver has this name.
    """
    if not isinstance(solver, str):
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known solvers: {', '.join(SOLVERS)}")
    return SOLVERS[solver]()
