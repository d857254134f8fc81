"""Proximal gradient descent (forward-backward splitting)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lnr_prune.lasso.problem import GroupLasso
from lnr_prune.lasso.prox import Matrices, shrink
from lnr_prune.lasso.solution import Iterate, certified


@dataclass(frozen=True)
class ProximalGradient:
    """``M <- prox_{lam/L}(M - (M R - B) / L)``, ``L`` the largest eigenvalue of R: a descent method, O(1/k).

    Args:
        max_iterations: Iterations after which to give up.
    """

    max_iterations: int = 100_000

    def iterates(self, problem: GroupLasso, lam: float, start: Matrices, tol: float) -> Iterator[Iterate]:
        """Yields M without end."""
        step = 1 / lipschitz(problem)
        M = start
        while True:
            MR = problem.products(M)
            yield certified(problem, M, MR, lam)
            M = proximal_step(problem, M, MR, lam, step)


def lipschitz(problem: GroupLasso) -> float:
    """``max_c lambda_max(R_c)``: the Lipschitz constant of the gradient (1 if every R is zero)."""
    largest = max(float(torch.linalg.eigvalsh(block.R).amax()) for block in problem.blocks if len(block.R))
    return largest if largest > 0 else 1.0


def proximal_step(problem: GroupLasso, A: Matrices, AR: Matrices, lam: float, step: float) -> Matrices:
    """``prox_{step * lam}(A - step * (A R - B))``, given A and ``A R``."""
    descended = [A_c - step * (AR_c - block.B) for A_c, AR_c, block in zip(A, AR, problem.blocks, strict=True)]
    return shrink(descended, step * lam * problem.weights, problem.groups, problem.n_groups)
