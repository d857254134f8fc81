"""Backward elimination on a group-lasso problem: nested supports from least squares alone, without lam."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lnr_prune.lasso.problem import Block, GroupLasso

RIDGE = 1e-8  # relative to every column's second moment
PANEL = 128  # columns removed before H and M are updated
TIE = 1e-6  # relative difference of two costs that may be due to rounding
LEAF = 256  # matrices up to this size are inverted by LAPACK


@dataclass(frozen=True, eq=False)
class Elimination:
    """A nested sequence of supports, from all groups to none.

    Attributes:
        order: Groups in the order of their removal, (n_groups,) int64.
        errors: ``sum_c E||y_c - M_c x_c||^2 / sum_c E||y_c||^2`` of the refit that keeps k groups, at index k,
            (n_groups + 1,) float64. The error that the ridge adds is included: only rounding can make it too small.
    """

    order: Tensor
    errors: Tensor

    def support(self, count: int) -> Tensor:
        """The ``count`` groups that are removed last, (n_groups,) bool.

        Raises:
            ValueError: If count is out of range.
        """
        n_groups = len(self.order)
        if not 0 <= count <= n_groups:
            raise ValueError(f"count must be between 0 and the {n_groups} groups, got {count}")
        support = torch.ones(n_groups, dtype=torch.bool, device=self.order.device)
        support[self.order[: n_groups - count]] = False
        return support


def backward(problem: GroupLasso, *, ridge: float = RIDGE) -> Elimination:
    """Removes one group after another: always the one whose removal costs least once the others are refitted.

    With ``H = (R + ridge)^-1`` and ``M = B H`` on the remaining groups, summed over the consumers::

        cost_g = Tr(M_g H_gg^-1 M_g^T),   M <- M - M_g H_gg^-1 H_g:,   H <- H - H_:g H_gg^-1 H_g: .

    Unpenalised columns are eliminated first; the weights w are not used. Each panel plans the removal of about
    `PANEL` columns, from the groups that are cheapest at that point, as if there were no others. One matrix product
    then gives what every group would have cost at every step of the panel. The panel is valid up to the first step at
    which another group would have been cheaper. Both matrices are recomputed whenever three quarters of the groups
    have been removed, so that rounding errors do not add up.

    Args:
        problem: The problem.
        ridge: Ridge relative to every column's own second moment, > 0. It makes a singular R invertible.

    Returns:
        The `Elimination`.

    Raises:
        ValueError: If the ridge is not positive.

    References:
        Hastie, Tibshirani and Tibshirani, "Best Subset, Forward Stepwise or Lasso?", 2020.
        Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993.

    Example:
        >>> R, B = torch.eye(3, dtype=torch.float64), torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64)
        >>> result = backward(GroupLasso((Block(R, B, t=14.0),)))
        >>> result.order, result.support(1)
        (tensor([1, 2, 0]), tensor([ True, False, False]))
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be > 0, got {ridge}")
    reduced, n = problem.eliminated.problem, problem.n_groups
    device = problem.weights.device
    names, alive = torch.arange(n, device=device), torch.ones(n, dtype=torch.bool, device=device)
    order: list[int] = []
    errors, sweeps, fresh = [0.0] * (n + 1), list[_Sweep](), 4 * n
    scale = problem.t if problem.t > 0 else 1.0
    while len(order) < n:
        left = n - len(order)
        if 4 * left <= max(3 * len(names), fresh):
            for sweep in sweeps:
                sweep.compact(alive)
            names, alive = names[alive], alive[alive]
        if 4 * left <= fresh:
            sweeps, fresh = [_Sweep(block, names, n, ridge) for block in reduced.blocks], left
            errors[left] = (reduced.t - sum(sweep.explained for sweep in sweeps)) / scale
        steps = min(max(1, PANEL // max(sweep.columns.shape[1] for sweep in sweeps)), left)
        costs = _total([traces(sweep.h, sweep.m) for sweep in sweeps]).where(alive, math.inf)
        candidates = costs.argsort()[: min(steps + steps // 2, left)]
        guess = candidates[_cheapest([sweep.few(candidates) for sweep in sweeps], steps)]
        costs = _total([sweep.open(guess) for sweep in sweeps])  # cost of every group before every step
        gone = torch.zeros_like(costs, dtype=torch.int8).scatter_(1, guess[:, None], 1)
        costs = costs.where(alive & (gone.cumsum(0) <= gone), math.inf)
        own = costs.gather(1, guess[:, None])[:, 0]
        wrong = own > (1 + TIE) * costs.amin(1) + 1e-14 * scale
        wrong[0] = False  # the first step is right; at a wrong one, a group outside the candidates became cheaper
        done = int(wrong.nonzero()[0]) if bool(wrong.any()) else steps
        for g, cost in zip(names[guess[:done]].tolist(), own.tolist(), strict=False):
            order.append(g)
            errors[n - len(order)] = errors[n - len(order) + 1] + max(cost, 0.0) / scale
        alive[guess[:done]] = False
        for sweep in sweeps:
            sweep.close(done)
    return Elimination(torch.tensor(order, device=alive.device), torch.tensor(errors, dtype=torch.float64).clamp_min(0))


def _total(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(terms)).sum(0) if len(terms) > 1 else terms[0]


def _cheapest(parts: Sequence[tuple[Tensor, Tensor]], steps: int) -> Tensor:
    """The first ``steps`` groups to remove among a few, given H and ``M^T M``, both (groups, width, groups, width).

    With ``K = H_gg^-1 H_g:`` and ``V = (M^T M)_g: - (M^T M)_gg K / 2``, removing g means ``H -= H_:g K`` and
    ``M^T M -= K^T V + V^T K``.
    """
    alive = torch.ones(len(parts[0][0]), dtype=torch.bool, device=parts[0][0].device)
    order = []
    for _ in range(steps):
        costs = [traces(*(A.diagonal(dim1=0, dim2=2).permute(2, 0, 1) for A in part)) for part in parts]
        g = int(_total(costs).where(alive, math.inf).argmin())
        order.append(g)
        alive[g] = False
        for H, MM in parts:
            k = H.shape[0] * H.shape[1]
            H_g, MM_g = H[g].view(-1, k), MM[g].view(-1, k)
            K = torch.linalg.inv_ex(H[g, :, g])[0] @ H_g
            V = torch.addmm(MM_g, MM[g, :, g], K, alpha=-0.5)
            H.view(k, k).addmm_(H_g.T.clone(), K, alpha=-1)
            MM.view(k, k).addmm_(K.T, V, alpha=-1).addmm_(V.T, K, alpha=-1)
    return torch.tensor(order, device=alive.device)


class _Sweep:
    """One consumer's H and M on the remaining columns, and the diagonal blocks h of H and m of ``M^T M``.

    With ``u = L^-1 H_g:``, ``L L^T = H_gg``, ``a = L^-1 M_g^T``, ``z = a M`` and ``v = z - a a^T u / 2``, removing g
    means ``H -= u^T u``, ``M -= a^T u`` and ``M^T M -= u^T v + v^T u``.
    """

    def __init__(self, block: Block, names: Tensor, n_groups: int, ridge: float) -> None:
        kept = torch.isin(block.groups, names).nonzero()[:, 0]
        R, B = normalised(block, kept, ridge)
        self.H = inverse(R)
        self.M = B @ self.H
        self.explained = float((self.M * B).sum())
        self.columns = members(block.groups[kept], n_groups)[names]
        self.h, self.m = diagonal_blocks(self.H, self.M, self.columns, torch.ones_like(names))

    def compact(self, alive: Tensor) -> None:
        """Drops the columns of the removed groups, which have been zero so far."""
        there = torch.ones(len(self.H) + 1, dtype=torch.bool, device=alive.device)
        there[self.columns[~alive]], there[-1] = False, False
        kept = there.nonzero()[:, 0]
        self.H, self.M = self.H[kept][:, kept], self.M[:, kept]
        self.columns = (there.cumsum(0) - 1).where(there, len(kept))[self.columns[alive]]
        self.h, self.m = self.h[alive], self.m[alive]

    def few(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """H and ``M^T M`` of a few groups, (groups, width, groups, width); H is the identity where padded."""
        index = self.columns[candidates].flatten()
        there = index < len(self.H)
        index = index * there
        M, shape = self.M[:, index] * there, self.columns[candidates].shape * 2
        H = self.H[index][:, index] * (there * there[:, None])
        H.diagonal().add_(~there)
        return H.view(shape), (M.T @ M).view(shape)

    def open(self, groups: Tensor) -> Tensor:
        """Prepares to remove these groups in this order; returns what every group costs before each step."""
        columns = self.columns[groups]
        there = columns < len(self.H)
        index, self.ends = columns[there], there.sum(1).cumsum(0)
        rows = self.H[index]
        L = torch.linalg.cholesky_ex(rows[:, index])[0]
        self.u = torch.linalg.solve_triangular(L, rows, upper=False)
        self.a = torch.linalg.solve_triangular(L, self.M[:, index].T, upper=False)
        aa = (self.a @ self.a.T).tril()
        aa.diagonal().div_(2)
        v = torch.addmm(self.a @ self.M, aa, self.u, alpha=-1)
        # (steps, width, groups, width), zero where padded
        u_g, v_g = (x.new_zeros(*there.shape, *self.columns.shape) for x in (self.u, v))
        u_g[there], v_g[there] = (torch.nn.functional.pad(x, (0, 1))[:, self.columns] for x in (self.u, v))
        uv = torch.einsum("swgi,swgj->sgij", u_g, v_g)
        uu = torch.einsum("swgi,swgj->sgij", u_g, u_g)
        self.hs = torch.cat([self.h[None], -uu]).cumsum(0)
        self.ms = torch.cat([self.m[None], -uv - uv.mT]).cumsum(0)
        costs = traces(self.hs[:-1].flatten(0, 1), self.ms[:-1].flatten(0, 1))
        return costs.view(len(groups), -1)

    def close(self, done: int) -> None:
        """Removes the groups of the first ``done`` steps from H and M."""
        used = int(self.ends[done - 1])
        u, a = self.u[:used], self.a[:used]
        self.H.addmm_(u.T, u, alpha=-1)
        self.M.addmm_(a.T, u, alpha=-1)
        self.h, self.m = self.hs[done], self.ms[done]


def normalised(block: Block, columns: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """R and B of these columns, scaled to unit second moment (which changes no cost), with the ridge."""
    R, B = block.R[columns].double()[:, columns], block.B[:, columns].double()
    size = R.diagonal().sqrt()
    scale = torch.where(size > 0, 1 / size, 0.0)
    R.mul_(scale).mul_(scale[:, None]).diagonal().fill_(1 + ridge)
    B = B * scale
    return R, torch.linalg.qr(B, mode="r").R if len(B) > len(R) else B  # only B^T B matters


def members(group: Tensor, n_groups: int) -> Tensor:
    """Columns of every group, (n_groups, width), padded with ``len(group)``."""
    order = group.argsort(stable=True)
    sizes = torch.bincount(group, minlength=n_groups)
    slot = torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group[order]]
    columns = torch.full((n_groups, max(1, int(sizes.max()))), len(group), device=group.device)
    columns[group[order], slot] = order
    return columns


def diagonal_blocks(A: Tensor, M: Tensor, columns: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """Every group's blocks of ``sign A`` (the identity where padded) and of ``M^T M``, (n_groups, width, width)."""
    there = columns < len(A)
    if not len(A):
        return there[:, :, None] + A.new_ones(1, 1, 1), there[:, :, None] * A.new_ones(1, 1, 1)
    index = columns.clamp_max(len(A) - 1)
    a = A[index[:, :, None], index[:, None]].where(there[:, :, None] & there[:, None], 0.0)
    a = a * sign[:, None, None]
    a.diagonal(dim1=1, dim2=2).add_(~there)
    if columns.shape[1] == 1:
        return a, M.square().sum(0)[index][..., None].where(there[..., None], 0.0)
    m = M.T[index].where(there[..., None], 0.0)
    return a, m @ m.mT


def traces(a: Tensor, m: Tensor) -> Tensor:
    """``Tr(m_g a_g^-1)`` of every group; 0 where ``a_g`` is not positive definite."""
    if a.shape[1] == 1:
        return (m / a).flatten()
    L, info = torch.linalg.cholesky_ex(a)
    return torch.cholesky_solve(m, L).diagonal(dim1=1, dim2=2).sum(1).where(info == 0, 0.0)


def inverse(A: Tensor) -> Tensor:
    """``A^-1``. If rounding has made A indefinite, a ridge is added that grows until the inverse exists."""
    ridge = 0.0
    while True:
        try:
            return _by_halves(A)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            ridge = max(10 * ridge, RIDGE)
            A = A.clone()
            A.diagonal().add_(ridge * A.diagonal().mean())


def _by_halves(A: Tensor) -> Tensor:
    """``A^-1`` of a positive definite A, computed almost entirely by matrix products."""
    n = len(A)
    if n <= LEAF:
        return torch.cholesky_inverse(torch.linalg.cholesky(A))
    half = n // 2
    top = _by_halves(A[:half, :half])
    X = top @ A[:half, half:]
    corner = _by_halves(_add_symmetric(A[half:, half:].clone(), A[half:, :half], X, -1))
    XC = X @ corner
    result = torch.empty_like(A)
    result[half:, half:], result[:half, half:], result[half:, :half] = corner, -XC, -XC.T
    result[:half, :half] = _add_symmetric(top, XC, X.T, 1)
    return result


def _add_symmetric(A: Tensor, X: Tensor, Y: Tensor, sign: int) -> Tensor:
    """``A += sign X Y`` in place for symmetric A and ``X Y``: computes little more than half of the product."""
    if len(A) <= LEAF:
        return A.addmm_(X, Y, alpha=sign)
    half = len(A) // 2
    for part in (slice(half), slice(half, None)):
        _add_symmetric(A[part, part], X[part], Y[:, part], sign)
    A[:half, half:] = A[half:, :half].addmm_(X[half:], Y[:, :half], alpha=sign).T
    return A
