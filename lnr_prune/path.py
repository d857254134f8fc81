"""Along the regularisation path: the lam that keeps a wanted number of groups."""

import math

from lnr_prune.problem import GroupLasso
from lnr_prune.solvers import Solution, Solver, solve

DESCENT = 5.0  # factor between two lam while the bracket is open below
NARROW = 1e-5  # relative width of a bracket that no count can be told apart in


def lam_for_count(problem: GroupLasso, count: int, *, solver: str | Solver = "newton", tol: float = 1e-6) -> Solution:
    """The solution at a lam that keeps ``count`` groups, by warm-started bisection on log lam.

    The count falls, as a rule, from all groups at small lam to none at `GroupLasso.lambda_max`. Groups
    that tie enter together: then no lam keeps exactly ``count``, and the nearest solution found that keeps
    more is returned, or least squares if even lam = 0 keeps fewer.

    Args:
        problem: The problem.
        count: Wanted number of non-zero groups, from 1 to ``problem.n_groups``.
        solver: As for `solve`.
        tol: As for `solve`; lowered where groups enter so close together that only a small gap tells them apart.

    Returns:
        The `Solution`; compare its ``n_kept`` with ``count``.

    Raises:
        ValueError: If count is out of range.
    """
    if not 1 <= count <= problem.n_groups:
        raise ValueError(f"count must be between 1 and the {problem.n_groups} groups, got {count}")
    top = problem.lambda_max()
    if top == 0.0:
        return solve(problem, 0.0, solver=solver, tol=tol)
    high, low = top, 0.0
    more: Solution | None = None  # the sparsest solution that keeps at least count
    start, sharp = None, False
    while more is None or high / low > 1 + NARROW:
        if more is not None and not sharp and high / low < 1.01:  # groups enter close together here
            sharp, tol, high = True, tol * 1e-4, min(top, 1.01 * high)
        lam = high / DESCENT if more is None else math.sqrt(high * low)
        if lam < 1e-9 * top:
            return solve(problem, 0.0, solver=solver, tol=tol)
        solution = solve(problem, lam, solver=solver, tol=tol, start=start)
        start = solution.coefficients
        if solution.n_kept == count:
            return solution
        if solution.n_kept > count:
            low, more = lam, solution
        else:
            high = lam
    return more
