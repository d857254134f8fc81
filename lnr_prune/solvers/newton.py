"""Projected Newton on eta: the default solver."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lnr_prune.problem import Block, GroupLasso
from lnr_prune.prox import Matrices
from lnr_prune.solvers.proximal_gradient import proximal_step

RETRIES = 5  # Levenberg-Marquardt attempts before a plain proximal step
PATIENCE = 8  # accepted steps without progress before rounding is blamed


@dataclass(frozen=True)
class Newton:
    """Newton's method on alternate minimization's own variables, one number eta_g >= 0 a group.

    Minimising over M first leaves a smooth convex function of eta,

        phi(eta) = lam/2 sum_g w_g^2 eta_g - 1/2 sum_c Tr(B_c (R_c + lam D_eta^-1)^-1 B_c^T),

    with ``||M_g|| = w_g eta_g`` at the optimum. In relative steps ``delta = d eta / eta``, on the groups
    with eta > 0 only, and with ``W = S R S + lam I`` (positive definite even if R is singular),
    ``S = D_eta^(1/2)``, ``Y = W^-1 S B^T``, ``V = (B - M R) / lam``:

        Hessian = groupsum((Y Y^T) o (I - lam W^-1)),   Hessian delta = eta ||V||^2 (||V|| / w - 1).

    Groups with ``||V_g|| > w_g`` enter, groups whose eta reaches 0 leave: zeros are exact. A step that
    raises phi is damped (Levenberg-Marquardt), at last replaced by a proximal step: phi never rises.
    A cold start at small lam goes there in stages, one Newton step each.

    Args:
        continuation: Factor between two stages' lam, in (0, 1).
        max_iterations: When to give up.

    References:
        Poon and Peyre, "Smooth Bilevel Programming for Sparse Regularization", 2021.
        Bach, Jenatton, Mairal and Obozinski, "Optimization with Sparsity-Inducing Penalties", 2012.
    """

    continuation: float = 0.25
    max_iterations: int = 500

    def iterates(self, problem: GroupLasso, lam: float, start: Matrices) -> Iterator[tuple[Matrices, Matrices]]:
        """Yields (M, M R); ends where rounding stops all progress."""
        eta, stage = _start(problem, lam, start, self.continuation)
        point = _evaluate(problem, eta, stage)
        damping, stalled, best_gap, best_phi = 0.0, 0, math.inf, math.inf
        while point is not None:
            M, MR = point.coefficients(problem)
            yield M, MR
            _, gap = problem.certificate(M, MR, stage)
            if stage <= lam:
                progress = gap < 0.7 * best_gap or point.phi < best_phi - 1e-12 * problem.scale
                stalled = 0 if progress else stalled + 1
                best_gap, best_phi = min(best_gap, gap), min(best_phi, point.phi)
                if stalled == PATIENCE:
                    return
            shrink = max(lam / stage, self.continuation) if gap < 0.3 else 1.0
            point, damping = _descend(problem, point, M, MR, stage, shrink, damping)
            stage *= shrink


@dataclass(frozen=True, eq=False)
class Factor:
    """One block's linear algebra on the columns of the active groups."""

    columns: Tensor
    group: Tensor  # position of each column's group among the active ones
    rows: Tensor  # R[columns]
    L: Tensor  # Cholesky factor of W
    Y: Tensor
    M: Tensor  # coefficients of the active columns


@dataclass(frozen=True, eq=False)
class Point:
    """phi and what its derivatives need, at one eta."""

    eta: Tensor
    active: Tensor  # groups with eta > 0
    v: Tensor  # ||V_g|| of the active groups
    phi: float
    factors: tuple[Factor, ...]

    def coefficients(self, problem: GroupLasso) -> tuple[Matrices, Matrices]:
        """(M, M R)."""
        M = problem.zeros()
        for M_c, factor in zip(M, self.factors, strict=True):
            M_c[:, factor.columns] = factor.M
        return M, tuple(factor.M @ factor.rows for factor in self.factors)


def _evaluate(problem: GroupLasso, eta: Tensor, lam: float) -> Point | None:
    """The point at eta, or None where W cannot be factorised."""
    active = eta.nonzero()[:, 0]
    position = torch.full_like(eta, -1, dtype=torch.long)
    position[active] = torch.arange(len(active), device=eta.device)
    e, w = eta[active], problem.weights[active]
    phi, v2, factors = lam / 2 * float(w.square() @ e), torch.zeros_like(e), []
    for block in problem.blocks:
        columns = (position[block.groups] >= 0).nonzero()[:, 0]
        group = position[block.groups[columns]]
        rows, B = block.R[columns], block.B[:, columns]
        s = e[group].sqrt()
        W = rows[:, columns] * s[:, None] * s
        W.diagonal().add_(lam)
        L, info = torch.linalg.cholesky_ex(W)
        if int(info) != 0:
            return None
        Y = torch.cholesky_solve((B * s).T, L)
        M = (Y * s[:, None]).T
        phi -= float((M * B).sum()) / 2
        v2.index_add_(0, group, Y.square().sum(1) / e[group])
        factors.append(Factor(columns, group, rows, L, Y, M))
    return Point(eta, active, v2.sqrt(), phi, tuple(factors))


def _hessian(point: Point, lam: float) -> Tensor:
    """``groupsum((Y Y^T) o (I - lam W^-1))`` over the active groups, summed over the blocks."""
    n = len(point.active)
    H = point.eta.new_zeros(n, n)
    for factor in point.factors:
        T = torch.cholesky_inverse(factor.L).mul_(-lam)
        T.diagonal().add_(1.0)
        T.mul_(factor.Y @ factor.Y.T)
        if torch.equal(factor.group, torch.arange(n, device=T.device)):
            H += T
        else:
            rows = T.new_zeros(n, T.shape[1]).index_add_(0, factor.group, T)
            H.index_add_(1, factor.group, rows)
    return H


def _descend(
    problem: GroupLasso, point: Point, M: Matrices, MR: Matrices, lam: float, shrink: float, damping: float
) -> tuple[Point | None, float]:
    """One accepted step from the point at lam towards the optimum at ``shrink * lam``; and the next damping."""
    # eta * shrink at lam * shrink keeps W and M as they are; V grows by 1 / shrink
    H, eta, v, lam = _hessian(point, lam) / shrink, point.eta * shrink, point.v / shrink, lam * shrink
    e, w, active = eta[point.active], problem.weights, point.active
    rhs = e * v.square() * (v / w[active] - 1)
    G = [block.B - MR_c for block, MR_c in zip(problem.blocks, MR, strict=True)]
    excess = problem.norms(G) - lam * w
    entering = (eta == 0) & (excess > 1e-12 * lam * w)
    curvature = _sum_diagonals(problem)
    # a fifth of the group's own optimum: more is often too much, and Newton grows it quickly
    enter = torch.where(entering, 0.2 * excess / (w * curvature), 0.0)
    tiny = 1e-5 if e.dtype == torch.float32 else 1e-10
    limit = point.phi + tiny * 10 * problem.scale if shrink == 1.0 else math.inf
    for attempt in range(RETRIES):
        A = H.clone()
        A.diagonal().mul_(1 + damping + tiny)
        L, info = torch.linalg.cholesky_ex(A)
        if int(info) == 0:
            step = enter / (1 + 10 * damping)
            step[active] = e * torch.cholesky_solve(rhs[:, None], L)[:, 0]
            new = _evaluate(problem, (eta + step).clamp_min(0), lam)
            if new is not None and len(new.active) and new.phi <= limit:
                relaxed = damping / 10 if damping > 1e-7 else 0.0
                return new, relaxed if attempt == 0 else damping
        damping = max(30 * damping, 1e-3)
    return _evaluate(problem, _proximal_eta(problem, M, MR, lam, entering | (eta > 0)), lam), damping


def _proximal_eta(problem: GroupLasso, M: Matrices, MR: Matrices, lam: float, candidates: Tensor) -> Tensor:
    """Eta of a proximal gradient step on the candidate groups: phi cannot rise."""
    norms = problem.norms(proximal_step(problem, M, MR, lam, 1 / _curvature(problem, candidates)))
    return torch.where(candidates, norms / problem.weights, 0.0)


def _sum_diagonals(problem: GroupLasso) -> Tensor:
    """Trace of R over every group, over all blocks: no less than the curvature along the group."""
    trace = problem.weights.new_zeros(problem.n_groups)
    for block in problem.blocks:
        trace.index_add_(0, block.groups, block.R.diagonal())
    return trace.clamp_min(torch.finfo(trace.dtype).tiny)


def _start(problem: GroupLasso, lam: float, start: Matrices, continuation: float) -> tuple[Tensor, float]:
    """Eta to begin with, and the lam of the first stage."""
    w = problem.weights
    warm = problem.norms(start) / w
    if bool((warm > 0).any()):
        return warm, lam
    gains = problem.norms([block.B for block in problem.blocks]) / w
    stage = max(lam, continuation * float(gains.max()))
    if lam < stage and float((gains > stage).double().mean()) > 0.5:  # most will stay: start from a ridge
        ridge = [_ridge_solution(block) for block in problem.blocks]
        return problem.norms(ridge) / w, lam
    chosen = gains > stage
    return torch.where(chosen, (gains - stage) / _curvature(problem, chosen), 0.0), stage


def _curvature(problem: GroupLasso, candidates: Tensor) -> float:
    """An upper bound of the largest eigenvalue of R on the candidate groups: the smaller of two norms."""
    bound = torch.finfo(problem.weights.dtype).tiny
    for block in problem.blocks:
        columns = candidates[block.groups].nonzero()[:, 0]
        R = block.R[columns][:, columns]
        if len(columns):
            bound = max(bound, min(float(R.abs().sum(1).max()), float(R.norm())))
    return bound


def _ridge_solution(block: Block) -> Tensor:
    W = block.R.clone()
    ridge = 1e-2 * block.R.diagonal().mean() + torch.finfo(W.dtype).tiny if len(W) else 1.0
    while True:
        W.diagonal().add_(ridge)
        L, info = torch.linalg.cholesky_ex(W)
        if int(info) == 0:
            return torch.cholesky_solve(block.B.T, L).T
        ridge = 10 * ridge  # rounding has made R indefinite
