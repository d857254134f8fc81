"""Alternate minimization over M and eta (iteratively reweighted least squares), then FISTA."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from lnr_prune.lasso.fista import Fista
from lnr_prune.lasso.problem import GroupLasso
from lnr_prune.lasso.prox import Matrices
from lnr_prune.lasso.proximal_gradient import lipschitz, proximal_step
from lnr_prune.lasso.solution import Iterate, certified


@dataclass(frozen=True)
class AlternateMinimization:
    """Minimises over M and eta in turn, by ``w||M_g|| = min_{eta_g > 0} (||M_g||^2 / eta_g + w^2 eta_g) / 2``.

    For fixed eta, ``M = B (R + lam D_eta^-1)^-1``; for fixed M, ``eta_g = (||M_g||^2 + eps)^(1/2) / w_g``.
    A few rounds come close to the optimum but never reach exact zeros. So each round is followed by one
    proximal step, which does. After ``rounds`` rounds, FISTA continues from there.

    Args:
        rounds: Rounds before FISTA takes over.
        momentum: q of FISTA.
        smoothing: eps, relative to the largest group's squared norm.
        max_iterations: Iterations after which to give up, rounds included.

    References:
        Bach, Jenatton, Mairal and Obozinski, "Optimization with Sparsity-Inducing Penalties", 2012, section 5.
    """

    rounds: int = 50
    momentum: float = 10.0
    smoothing: float = 1e-12
    max_iterations: int = 100_000

    def iterates(self, problem: GroupLasso, lam: float, start: Matrices, tol: float) -> Iterator[Iterate]:
        """Yields M without end."""
        step = 1 / lipschitz(problem)
        M = start
        if not bool(problem.norms(M).any()):  # eta = 0 would stay 0: start with a gradient step
            M = tuple(step * block.B for block in problem.blocks)
        proximal = M
        for round_ in range(1, self.rounds + 1):
            norms = problem.norms(M)
            eta = (norms.square() + self.smoothing * norms.max().square()).sqrt() / problem.weights
            M = tuple(_ridge(block.R, block.B, lam / eta[block.groups]) for block in problem.blocks)
            proximal = proximal_step(problem, M, problem.products(M), lam, step)
            yield certified(problem, proximal, problem.products(proximal), lam, round_ * len(problem.blocks))
        for iterate in Fista(self.momentum).iterates(problem, lam, proximal, tol):
            yield replace(iterate, factorisations=self.rounds * len(problem.blocks))


def _ridge(R: torch.Tensor, B: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """``B (R + diag(penalty))^-1``, scaled so that huge penalties do no harm."""
    s = penalty.rsqrt()  # S (S R S + I)^-1 S with S = diag(penalty^-1/2)
    W = s[:, None] * R * s
    W.diagonal().add_(1.0)
    return torch.cholesky_solve(s[:, None] * B.T, torch.linalg.cholesky(W)).T * s
