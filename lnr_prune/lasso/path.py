"""The regularisation path: solutions at many lam, or the lam that keeps a given number of groups."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lnr_prune.lasso.problem import GroupLasso
from lnr_prune.lasso.prox import Matrices
from lnr_prune.lasso.solution import Solution
from lnr_prune.lasso.solve import Solver, solve

NARROW = 1e-5  # relative width at which a bracket is not searched further
ROUGH = 1e-4  # gap that is good enough far from the wanted count
FAR = 0.25  # width of a bracket, as a share of the groups, from which loose gaps are enough
WIDE = 1.05  # ratio of a bracket's ends, likewise
NEAR = 0.02  # a count that near the wanted one is looked at again
DESCENT = 2.5  # largest factor between two lam until a lam is known that keeps more


@dataclass(frozen=True, eq=False)
class RegularizationPath:
    """Solutions at decreasing lam; each records its cost (``iterations``, ``factorisations``, ``seconds``).

    Attributes:
        solutions: One per lam, the largest lam first.
    """

    solutions: tuple[Solution, ...]

    @property
    def lams(self) -> Tensor:
        """Every lam, (n_lams,) float64."""
        return torch.tensor([solution.lam for solution in self.solutions], dtype=torch.float64)

    @property
    def counts(self) -> Tensor:
        """Number of groups kept at every lam, (n_lams,) int64."""
        return torch.tensor([solution.n_kept for solution in self.solutions])

    @property
    def factorisations(self) -> int:
        """Cholesky factorisations of the whole path."""
        return sum(solution.factorisations for solution in self.solutions)

    @property
    def seconds(self) -> float:
        """Wall-clock time of the whole path."""
        return sum(solution.seconds for solution in self.solutions)


def regularization_path(
    problem: GroupLasso,
    lams: Sequence[float] | None = None,
    *,
    n_lams: int = 30,
    smallest: float = 1e-3,
    solver: str | Solver = "newton",
    tol: float = 1e-6,
    progress: bool | None = None,
) -> RegularizationPath:
    """``M(lam) = argmin_M P(M)`` at many lam, each started from the previous solution.

    Args:
        problem: The problem.
        lams: Penalties, >= 0, in any order. Default: ``n_lams`` of them, evenly spaced in log lam from
            `GroupLasso.lambda_max` to ``smallest`` times it.
        n_lams: Number of lam, if ``lams`` is not given.
        smallest: The smallest of them, as a fraction of lambda_max, in (0, 1).
        solver: As for `solve`.
        tol: As for `solve`.
        progress: Whether to show a progress bar on stderr. Default: only if stderr is a terminal.

    Returns:
        The `RegularizationPath`, sorted by decreasing lam.

    Raises:
        ValueError: If n_lams or smallest is out of range, or if `solve` raises it.

    Example:
        >>> from lnr_prune import Block
        >>> R, B = torch.eye(3, dtype=torch.float64), torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
        >>> regularization_path(GroupLasso((Block(R, B, t=14.0),)), [0.5, 1.5, 2.5]).counts
        tensor([1, 2, 3])
    """
    if lams is None:
        if not (n_lams >= 1 and 0 < smallest < 1):
            raise ValueError(f"n_lams must be >= 1 and smallest in (0, 1), got {n_lams} and {smallest}")
        fractions = torch.logspace(0, math.log10(smallest), n_lams, dtype=torch.float64)
        lams = (problem.lambda_max() * fractions).tolist()
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    solutions: list[Solution] = []
    for lam in track(sorted(lams, reverse=True), "path", console=Console(stderr=True), disable=hidden, transient=True):
        start = solutions[-1].coefficients if solutions else None
        solutions.append(solve(problem, lam, solver=solver, tol=tol, start=start))
    return RegularizationPath(tuple(solutions))


@dataclass(frozen=True)
class Visit:
    """One solve of a search: its lam, how many groups it kept, its gap and its cost."""

    lam: float
    n_kept: int
    gap: float
    factorisations: int
    seconds: float


@dataclass(frozen=True, eq=False)
class CountSearch:
    """What `lam_for_count` found.

    Attributes:
        solution: The solution with the wanted number of groups, or the nearest that keeps more.
        note: Why no solution keeps exactly that number; "" if one does.
        visits: Every solve on the way.
    """

    solution: Solution
    note: str
    visits: tuple[Visit, ...]


def lam_for_count(
    problem: GroupLasso, count: int, *, solver: str | Solver = "newton", tol: float = 1e-6
) -> CountSearch:
    """Finds the lam at which ``count`` groups are kept, by a warm-started search on log lam.

    The count usually falls from all groups at small lam to none at `GroupLasso.lambda_max`. So lam is interpolated
    inside a bracket (log-odds of the count against log lam); while it is wide, a loose gap in float32 is enough.
    Groups that tie enter together, and then no lam keeps exactly ``count``. In that case the nearest solution found
    that keeps more is returned, or least squares if even lam = 0 keeps fewer.

    Args:
        problem: The problem.
        count: Wanted number of non-zero groups, from 1 to ``problem.n_groups``.
        solver: As for `solve`.
        tol: As for `solve`; lowered where groups enter so close together that only a small gap tells them apart.

    Returns:
        The `CountSearch`.

    Raises:
        ValueError: If count is out of range.
    """
    if not 1 <= count <= problem.n_groups:
        raise ValueError(f"count must be between 1 and the {problem.n_groups} groups, got {count}")
    visits: list[Visit] = []
    start: Matrices | None = None
    reduced = problem.eliminated.problem
    coarse = reduced.single or reduced

    def visit(lam: float, gap: float, of: GroupLasso = reduced) -> Solution:
        nonlocal start
        begin = None if start is None else tuple(M.to(block.R) for M, block in zip(start, of.blocks, strict=True))
        solution = solve(of, lam, solver=solver, tol=gap, start=begin)
        start = solution.coefficients
        visits.append(Visit(lam, solution.n_kept, solution.gap, solution.factorisations, solution.seconds))
        return solution

    def found(solution: Solution, note: str = "") -> CountSearch:
        history = tuple(value - problem.eliminated.constant for value in solution.history)
        whole = problem.eliminated.complete(solution.coefficients)
        return CountSearch(replace(solution, coefficients=whole, history=history), note, tuple(visits))

    def everything() -> CountSearch:
        solution = visit(0.0, tol)
        kept = solution.n_kept
        return found(solution, "" if kept == count else f"even least squares keeps {kept} of {problem.n_groups} groups")

    top = problem.lambda_max()
    if top == 0.0:
        return everything()
    high = higher = (top, 0)  # (lam, groups kept) on either side of the count; higher: the previous high
    low: tuple[float, int] | None = None
    more: Solution | None = None  # the solution at low
    sharp, side, pull = False, -1, [1.0, 1.0]  # pull: how much the counts at high and low are trusted
    while low is None or more is None or high[0] / low[0] > 1 + NARROW:
        close = 1.01 if low and low[1] - high[1] <= 2 else 1.001
        if low and not sharp and high[0] / low[0] < close:  # groups nearly tie here
            sharp, tol, high = True, tol * 1e-4, (min(top, 1.01 * high[0]), high[1])
        if low and more:
            share = min(max(_share(high, low, problem.n_groups, count, pull), 0.05), 0.95)
            lam = high[0] * (low[0] / high[0]) ** share
        elif high[1]:
            factor = (higher[0] / high[0]) ** (_share(higher, high, problem.n_groups, count, pull) - 1)
            lam = high[0] / min(max(factor, 1.3), DESCENT)
        else:
            lam = high[0] / 3
        if lam < 1e-9 * top:
            return everything()
        rough = low is None or (low[1] - high[1] > FAR * problem.n_groups and high[0] / low[0] > WIDE)
        solution = visit(lam, max(tol, ROUGH) if rough else tol, coarse if rough else reduced)
        if rough and abs(solution.n_kept - count) <= max(1, NEAR * problem.n_groups):  # the count depends on the gap
            solution = visit(lam, tol)
        if solution.n_kept == count:
            return found(solution)
        last, side = side, int(solution.n_kept > count)
        # an end that stays where it is twice is stale: its count is trusted less (the Illinois rule)
        pull = [1.0, 1.0] if side != last else [pull[0] / 2, 1.0] if side else [1.0, pull[1] / 2]
        if solution.n_kept > count:
            low, more = (lam, solution.n_kept), solution
        else:
            higher, high, pull = high, (lam, solution.n_kept), pull if low else [1.0, 1.0]
    if more.gap > tol:
        more = visit(low[0], tol)
    together = more.n_kept - high[1]
    return found(more, f"no lam keeps exactly {count}: {together} groups enter together at lam={low[0]:.4g}")


def _share(
    first: tuple[float, int], second: tuple[float, int], n_groups: int, count: int, pull: Sequence[float]
) -> float:
    """How far from first to second the count lies, if its log-odds are linear in log lam; 1/2 if they are equal."""

    def log_odds(kept: int) -> float:
        return math.log((kept + 0.5) / (n_groups - kept + 0.5))

    start, end = (
        weight * (log_odds(kept) - log_odds(count)) for weight, (_, kept) in zip(pull, (first, second), strict=True)
    )
    return start / (start - end) if end > start else 0.5
