"""FISTA: proximal gradient steps taken from a look-ahead point."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from lnr_prune.lasso.problem import GroupLasso
from lnr_prune.lasso.prox import Matrices
from lnr_prune.lasso.proximal_gradient import lipschitz, proximal_step
from lnr_prune.lasso.solution import Iterate, certified


@dataclass(frozen=True)
class Fista:
    """``A = M_k + k/(k+q+1) (M_k - M_{k-1})``, ``M_{k+1} = prox_{lam/L}(A - (A R - B) / L)``: O(1/k^2), not monotone.

    Args:
        momentum: q > 0. Larger values oscillate less but start more slowly.
        max_iterations: Iterations after which to give up.

    References:
        Beck and Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm", 2009.
        Chambolle and Dossal, "On the convergence of the iterates of FISTA", 2015.
    """

    momentum: float = 10.0
    max_iterations: int = 100_000

    def __post_init__(self) -> None:
        if not self.momentum > 0:
            raise ValueError(f"momentum (q) must be positive, got {self.momentum}")

    def iterates(self, problem: GroupLasso, lam: float, start: Matrices, tol: float) -> Iterator[Iterate]:
        """Yields M_k without end."""
        step = 1 / lipschitz(problem)
        M = M_last = start
        MR = MR_last = problem.products(M)
        for k in count():
            yield certified(problem, M, MR, lam)
            u = k / (k + self.momentum + 1)
            A, AR = _ahead(M, M_last, u), _ahead(MR, MR_last, u)  # M -> M R is linear, so no second product
            M_last, MR_last = M, MR
            M = proximal_step(problem, A, AR, lam, step)
            MR = problem.products(M)


def _ahead(now: Matrices, last: Matrices, u: float) -> Matrices:
    return tuple(a + u * (a - b) for a, b in zip(now, last, strict=True))
