"""Solvers of the group-lasso problem, all behind one function, `solve`."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch

from lnr_prune.lasso.alternate_minimization import AlternateMinimization
from lnr_prune.lasso.fista import Fista
from lnr_prune.lasso.newton import Newton
from lnr_prune.lasso.problem import GroupLasso, debias
from lnr_prune.lasso.prox import Matrices
from lnr_prune.lasso.proximal_gradient import ProximalGradient
from lnr_prune.lasso.solution import Iterate, Solution, Status, certified

__all__ = [
    "SOLVERS",
    "AlternateMinimization",
    "Fista",
    "Iterate",
    "Newton",
    "ProximalGradient",
    "Solution",
    "Solver",
    "Status",
    "certified",
    "solve",
]


class Solver(Protocol):
    """Settings of a solver, and its sequence of iterates."""

    @property
    def max_iterations(self) -> int:
        """Iterations after which to give up."""
        ...

    def iterates(self, problem: GroupLasso, lam: float, start: Matrices, tol: float) -> Iterator[Iterate]:
        """Yields iterates, beginning with the start or a first step; ends only when rounding stops all progress.

        The problem has no unpenalised columns. `certified` makes an iterate from M and ``M R``.
        """
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
        lam: Penalty, >= 0. At ``problem.lambda_max()`` and above, the answer is M = 0, which is valid; at 0
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
    began = time.perf_counter()
    solver = find_solver(solver)
    for name, number in (("lam", lam), ("tol", tol)):
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be finite and >= 0, got {number}")
    name = next((name for name, kind in SOLVERS.items() if type(solver) is kind), type(solver).__name__)
    eliminated = problem.eliminated
    reduced = eliminated.problem

    def solution(best: Iterate, history: list[float], status: Status, label: str = name, spent: int = 0) -> Solution:
        M = best.coefficients()
        values = tuple(value - eliminated.constant for value in history)
        support, whole, gap = reduced.norms(M) > 0, eliminated.complete(M), max(best.gap, 0.0)
        seconds = time.perf_counter() - began
        return Solution(whole, support, lam, gap, values, len(values) - 1, label, status, spent, seconds)

    if lam == 0:
        M = tuple(
            M_c[:, block.penalised]
            for M_c, block in zip(debias(problem, problem.weights > 0), problem.blocks, strict=True)
        )
        least = _least_squares_iterate(reduced, M)
        status = Status.CONVERGED if least.gap <= tol else Status.STALLED
        return solution(least, [least.value], status, "least_squares", len(problem.blocks))
    if lam >= problem.lambda_max():
        zero = reduced.zeros()
        return solution(replace(certified(reduced, zero, zero, lam), gap=0.0), [0.0], Status.CONVERGED)

    if start is None:
        begin = reduced.zeros()
    else:
        begin = tuple(M[:, block.penalised] for M, block in zip(start, problem.blocks, strict=True))
    history: list[float] = []
    iterate: Iterate | None = None
    best: Iterate | None = None
    status = Status.STALLED
    with torch.autocast(reduced.weights.device.type, enabled=False):  # the user's is for the forwards
        for iterate in solver.iterates(reduced, lam, begin, tol):
            history.append(iterate.value)
            if best is None or iterate.gap < best.gap:
                best = iterate
            if iterate.gap <= tol:
                status = Status.CONVERGED
                break
            if len(history) > solver.max_iterations:
                status = Status.MAX_ITERATIONS
                break
    if iterate is None or best is None or math.isinf(best.gap):  # nothing was certified
        M = begin if iterate is None else iterate.coefficients()
        best = certified(reduced, M, reduced.products(M), lam)
    return solution(best, history or [best.value], status, spent=iterate.factorisations if iterate else 0)


def _least_squares_iterate(problem: GroupLasso, M: Matrices) -> Iterate:
    """A least-squares solution; its gap is zero if ``M R = B`` up to rounding, else the bound from t."""
    MR = problem.products(M)
    iterate = certified(problem, M, MR, 0.0)
    for M_c, MR_c, block in zip(M, MR, problem.blocks, strict=True):
        eps = 10 * max(1, len(block.R)) * torch.finfo(block.R.dtype).eps
        if float((MR_c - block.B).norm()) > eps * float(M_c.norm() * block.R.norm() + block.B.norm()):
            return iterate
    return replace(iterate, gap=0.0)


def find_solver(solver: str | Solver) -> Solver:
    """The settings that a solver's name stands for; settings are returned as they are.

    Raises:
        ValueError: If no solver has this name.
        TypeError: If it is neither a name nor settings.
    """
    if not isinstance(solver, str):
        if isinstance(solver, type) or not hasattr(solver, "iterates"):
            names = ", ".join(SOLVERS)
            raise TypeError(f"solver must be a name ({names}) or settings such as Newton(), got {solver!r}")
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known solvers: {', '.join(SOLVERS)}")
    return SOLVERS[solver]()
