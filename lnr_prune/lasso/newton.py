"""Projected Newton on eta: the default solver."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lnr_prune.lasso.problem import Block, GroupLasso
from lnr_prune.lasso.prox import Matrices
from lnr_prune.lasso.solution import Iterate

RETRIES = 5  # Levenberg-Marquardt attempts before a plain proximal step
PATIENCE = 8  # accepted steps without progress before stopping: rounding prevents more
CROWD = 50  # so many groups may always enter together
SINGLE_PATIENCE = 1  # the same in float32, after which float64 continues
SINGLE_GAP = 1e-4  # relative gap from which float64 takes over, after one more step
SINGLE_COLUMNS = 400  # below this many columns float32 saves nothing


@dataclass(frozen=True)
class Newton:
    """Newton's method on the variables of alternate minimization, one number eta_g >= 0 per group.

    Minimising over M first leaves a smooth convex function of eta,

        phi(eta) = lam/2 sum_g w_g^2 eta_g - 1/2 sum_c Tr(B_c (R_c + lam D_eta^-1)^-1 B_c^T),

    with ``||M_g|| = w_g eta_g`` at the optimum. In relative steps ``delta = d eta / eta``, only on the groups
    with eta > 0, and with ``W = S R S + lam I`` (positive definite even if R is singular),
    ``S = D_eta^(1/2)``, ``Y = W^-1 S B^T``, ``V = (B - M R) / lam``:

        Hessian = groupsum((Y Y^T) o (I - lam W^-1)),   Hessian delta = eta ||V||^2 (||V|| / w - 1).

    Groups with ``||V_g|| > w_g`` enter and groups whose eta reaches 0 leave, so zeros are exact. A step that
    raises phi is damped (Levenberg-Marquardt). If that fails, a proximal step replaces it, so phi never rises.
    A cold start reaches a small lam in stages, with one Newton step each.

    Args:
        mixed: Whether float64 problems take their first steps in float32 where that saves time. The last steps
            and every reported gap are in float64 anyway.
        continuation: Factor between the lam of two stages, in (0, 1).
        max_iterations: Iterations after which to give up.

    References:
        Poon and Peyre, "Smooth Bilevel Programming for Sparse Regularization", 2021.
        Bach, Jenatton, Mairal and Obozinski, "Optimization with Sparsity-Inducing Penalties", 2012.
    """

    mixed: bool = True
    continuation: float = 0.4
    max_iterations: int = 500

    def iterates(self, problem: GroupLasso, lam: float, start: Matrices, tol: float) -> Iterator[Iterate]:
        """Yields every accepted point; ends when rounding stops all progress."""
        eta = problem.norms(start) / problem.weights
        done = 0
        if (
            self.mixed
            and max(len(block.R) for block in problem.blocks) >= SINGLE_COLUMNS
            and problem.single is not None
        ):
            for point in _newton(problem.single, lam, eta.float(), self.continuation, SINGLE_PATIENCE):
                yield point.iterate(problem, lam, done, certified=False)
                eta, done = point.eta.to(eta), done + point.factorisations
                if point.lam <= lam and point.certificate(problem, lam)[1] <= max(tol, SINGLE_GAP):
                    next_eta = _newton_step(problem.single, point)(0.0)  # float64 evaluates it
                    eta = eta if next_eta is None else next_eta.to(eta)
                    break
        for point in _newton(problem, lam, eta, self.continuation, PATIENCE):
            yield point.iterate(problem, lam, done, certified=True)
            done += point.factorisations


@dataclass(frozen=True, eq=False)
class Factor:
    """One block's linear algebra on the columns of the active groups."""

    columns: Tensor
    group: Tensor  # position of each column's group among the active ones
    L: Tensor  # Cholesky factor of W
    Y: Tensor
    M: Tensor  # coefficients of the active columns
    G: Tensor  # B - M R, all columns


@dataclass(frozen=True, eq=False)
class Point:
    """phi, and what its derivatives need, for one eta and lam."""

    lam: float
    eta: Tensor
    active: Tensor  # groups with eta > 0
    v: Tensor  # ||V_g|| of the active groups
    correlations: Tensor  # ||G_g|| of all groups, G = B - M R
    factors: tuple[Factor, ...]
    phi: float
    linear: float  # Tr(M B^T)
    quadratic: float  # Tr(M R M^T)
    penalty: float  # sum_g w_g ||M_g||
    violation: float  # max_g ||G_g|| / w_g
    factorisations: int = 1  # that it took, rejected steps included

    def certificate(self, problem: GroupLasso, lam: float) -> tuple[float, float]:
        """P(M) at lam and its relative duality gap."""
        return problem.bounds(self.linear, self.quadratic, self.penalty, self.violation, lam)

    def coefficients(self, problem: GroupLasso) -> Matrices:
        """M, in the problem's dtype."""
        M = problem.zeros()
        for M_c, factor in zip(M, self.factors, strict=True):
            M_c[:, factor.columns] = factor.M.to(M_c)
        return M

    def iterate(self, problem: GroupLasso, lam: float, done: int, *, certified: bool) -> Iterate:
        """The point as the `Iterate` that `solve` gets."""
        value, gap = self.certificate(problem, lam)
        gap, spent = gap if certified else math.inf, done + self.factorisations
        return Iterate(value, gap, lambda: self.coefficients(problem), spent)


def _newton(problem: GroupLasso, lam: float, eta: Tensor, continuation: float, patience: int) -> Iterator[Point]:
    """Accepted points, all in the problem's dtype, starting from eta (0: a cold start)."""
    eta, stage, done = _start(problem, lam, eta, continuation)
    point = _evaluate(problem, eta, stage, done)
    damping, stalled, best_gap, best_phi = 0.0, 0, math.inf, math.inf
    tiny = 1e-12 if eta.dtype == torch.float64 else 1e-6
    while point is not None:
        yield point
        _, gap = point.certificate(problem, stage)
        if stage <= lam:
            progress = gap < 0.7 * best_gap or point.phi < best_phi - tiny * problem.scale
            stalled = 0 if progress else stalled + 1
            best_gap, best_phi = min(best_gap, gap), min(best_phi, point.phi)
            if stalled == patience:
                return
        shrink = max(lam / stage, continuation) if gap < 0.6 else 1.0
        point, damping = _descend(problem, point, shrink, damping)
        stage = max(lam, stage * shrink)


def _evaluate(problem: GroupLasso, eta: Tensor, lam: float, factorisations: int = 1) -> Point | None:
    """The point at eta, or None if W cannot be factorised."""
    active = eta.nonzero()[:, 0]
    position = torch.full_like(eta, -1, dtype=torch.long)
    position[active] = torch.arange(len(active), device=eta.device)
    e, w = eta[active], problem.weights[active]
    v2, g2, zero = torch.zeros_like(e), torch.zeros_like(eta), eta.new_zeros(())
    failed, linear, slack, factors = zero, zero, zero, []
    for block in problem.blocks:
        columns = (position[block.groups] >= 0).nonzero()[:, 0]
        group = position[block.groups[columns]]
        everything = len(columns) == len(block.R)
        rows, B = (block.R, block.B) if everything else (block.R[columns], block.B[:, columns])
        s = e[group].sqrt()
        W = (rows if everything else rows[:, columns]) * s[:, None]
        W.mul_(s).diagonal().add_(lam)
        L, info = torch.linalg.cholesky_ex(W)
        Y = torch.cholesky_solve((B * s).T, L)
        M = (Y * s[:, None]).T
        G = (M @ rows).neg_().add_(block.B)
        v2.index_add_(0, group, Y.square().sum(1) / e[group])
        g2.index_add_(0, block.groups, G.square().sum(0))
        failed = failed + info
        linear = linear + (M * B).sum()
        slack = slack + (M * (G if everything else G[:, columns])).sum()
        factors.append(Factor(columns, group, L, Y, M, G))
    v, correlations = v2.sqrt(), g2.sqrt()
    measured = (failed, w.square() @ e, linear, slack, w @ (e * v), (correlations / problem.weights).max())
    bad, trace, tr_MB, tr_MG, penalty, violation = torch.stack(measured).tolist()  # the only wait for the device
    if bad or not math.isfinite(tr_MB):
        return None
    phi = (lam * trace - tr_MB) / 2
    return Point(
        lam, eta, active, v, correlations, tuple(factors), phi, tr_MB, tr_MB - tr_MG, penalty, violation, factorisations
    )


def _hessian(point: Point) -> Tensor:
    """``groupsum((Y Y^T) o (I - lam W^-1))`` over the active groups, summed over the blocks."""
    n = len(point.active)
    H = point.eta.new_zeros(n, n)
    for factor in point.factors:
        T = torch.cholesky_inverse(factor.L).mul_(-point.lam)
        T.diagonal().add_(1.0)
        T.mul_(factor.Y @ factor.Y.T)
        rows = T.new_zeros(n, T.shape[1]).index_add_(0, factor.group, T)
        H.index_add_(1, factor.group, rows)
    return H


def _descend(problem: GroupLasso, point: Point, shrink: float, damping: float) -> tuple[Point | None, float]:
    """One accepted step from the point towards the optimum at ``shrink`` times its lam, and the next damping."""
    step, lam = _newton_step(problem, point, shrink), point.lam * shrink
    tiny = 1e-9 if point.eta.dtype == torch.float64 else 1e-4
    limit = point.phi + tiny * problem.scale if shrink == 1.0 else math.inf
    for attempt in range(RETRIES):
        eta = step(damping)
        new = None if eta is None else _evaluate(problem, eta, lam, attempt + 1)
        if new is not None and len(new.active) and new.phi <= limit:
            relaxed = damping / 10 if damping > 1e-7 else 0.0
            return new, relaxed if attempt == 0 else damping
        damping = max(30 * damping, 1e-3)
    return _evaluate(problem, _proximal_eta(problem, point, lam), lam, RETRIES + 1), damping


def _newton_step(problem: GroupLasso, point: Point, shrink: float = 1.0) -> Callable[[float], Tensor | None]:
    """Damping -> the next eta of Newton's method; None if the damped Hessian cannot be factorised."""
    # eta * shrink at lam * shrink keeps W and M as they are; V grows by 1 / shrink
    H, eta, v, lam = _hessian(point) / shrink, point.eta * shrink, point.v / shrink, point.lam * shrink
    w, active = problem.weights, point.active
    e = eta[active]
    rhs = e * v.square() * (v / w[active] - 1)
    excess = point.correlations - lam * w
    entering = (eta == 0) & (excess > 1e-12 * lam * w)
    at_most = max(CROWD, 2 * len(active))
    if at_most < len(eta):  # too many at once would all explain the same signal
        entering &= excess >= (excess * entering / w).topk(at_most).values[-1] * w
    # a fifth of the group's own optimum: more is often too much, and Newton grows it quickly
    enter = torch.where(entering, 0.2 * excess / (w * problem.traces), 0.0)
    tiny = 1e-10 if e.dtype == torch.float64 else 1e-5

    def step(damping: float) -> Tensor | None:
        A = H.clone()
        A.diagonal().mul_(1 + damping + tiny)
        L, info = torch.linalg.cholesky_ex(A)
        if int(info):
            return None
        change = enter / (1 + 10 * damping)
        change[active] = e * torch.cholesky_solve(rhs[:, None], L)[:, 0]
        return (eta + change).clamp_min(0)

    return step


def _proximal_eta(problem: GroupLasso, point: Point, lam: float) -> Tensor:
    """Eta of a proximal gradient step on the groups that are active or may enter: phi cannot rise."""
    candidates = (point.eta > 0) | (point.correlations > (1 + 1e-12) * lam * problem.weights)
    step = 1 / _curvature(problem, candidates)
    moved = []
    for factor in point.factors:
        target = step * factor.G
        target[:, factor.columns] += factor.M
        moved.append(target)
    norms = (problem.norms(moved) - step * lam * problem.weights).clamp_min(0)
    return torch.where(candidates, norms / problem.weights, 0.0)


def _start(problem: GroupLasso, lam: float, eta: Tensor, continuation: float) -> tuple[Tensor, float, int]:
    """The first eta, the lam of the first stage, and the factorisations up to its point."""
    if bool((eta > 0).any()):
        return eta, lam, 1
    w = problem.weights
    gains = problem.norms([block.B for block in problem.blocks]) / w
    stage = max(lam, continuation * float(gains.max()))
    if lam < stage and float((gains > stage).double().mean()) > 0.5:  # most will stay: start with ridge regression
        ridge = [_ridge_solution(block) for block in problem.blocks]
        return problem.norms(ridge) / w, lam, 2
    chosen = gains > stage
    return torch.where(chosen, (gains - stage) / _curvature(problem, chosen), 0.0), stage, 1


def _curvature(problem: GroupLasso, candidates: Tensor) -> float:
    """An upper bound on the largest eigenvalue of R on the candidate groups: the smaller of two norms."""
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
