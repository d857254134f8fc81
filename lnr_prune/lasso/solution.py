"""What a solve returns, and why it stopped."""

import enum
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lnr_prune.lasso.problem import GroupLasso
from lnr_prune.lasso.prox import Matrices


class Status(enum.Enum):
    """Why a solver stopped; `advice` says what to do about it."""

    CONVERGED = "the duality gap is below the tolerance: nothing to do"
    MAX_ITERATIONS = (
        "the iteration limit was reached before the tolerance: use solver='newton', a larger lam "
        "or a larger max_iterations"
    )
    STALLED = "rounding keeps the duality gap above the tolerance: use float64 second moments, or accept a larger tol"

    @property
    def advice(self) -> str:
        """One sentence for the user."""
        return self.value


@dataclass(frozen=True, eq=False)
class Iterate:
    """One step of a solver on a problem without unpenalised columns.

    Attributes:
        value: The objective P(M).
        gap: Relative duality gap; infinite if it was not computed in the problem's own precision.
        coefficients: Returns M when it is called.
        factorisations: Cholesky factorisations so far.
    """

    value: float
    gap: float
    coefficients: Callable[[], Matrices]
    factorisations: int = 0


def certified(problem: GroupLasso, M: Matrices, MR: Matrices, lam: float, factorisations: int = 0) -> Iterate:
    """The iterate M, given ``M R``."""
    value, gap = problem.certificate(M, MR, lam)
    return Iterate(value, gap, lambda: M, factorisations)


@dataclass(frozen=True, eq=False)
class Solution:
    """A certified minimiser of a `GroupLasso`.

    Attributes:
        coefficients: M, one (h_c, d_c) matrix per consumer, unpenalised columns included.
        support: True for every group that is not zero, (n_groups,) bool.
        lam: The penalty it was solved at.
        gap: Relative duality gap, at least ``(P(M) - min P) / (t / 2)``.
        history: The objective P(M) after every iteration, the start first.
        iterations: Number of iterations.
        solver: Name of the solver.
        status: Why it stopped; ``status.advice`` is a sentence.
        factorisations: Cholesky factorisations that it took, each of the columns that were active at the time.
        seconds: Wall-clock time that it took.
    """

    coefficients: Matrices
    support: Tensor
    lam: float
    gap: float
    history: tuple[float, ...]
    iterations: int
    solver: str
    status: Status
    factorisations: int = 0
    seconds: float = 0.0

    @property
    def n_kept(self) -> int:
        """Number of groups that are not zero."""
        return int(self.support.sum())

    def __repr__(self) -> str:
        return (
            f"Solution({self.n_kept} of {len(self.support)} groups kept at lam={self.lam:.4g}, "
            f"gap={self.gap:.1e}, {self.iterations} iterations of {self.solver}: {self.status.advice})"
        )
