"""Backward elimination on a group-lasso problem: nested supports from least squares alone, without lam."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lnr_prune.lasso.least_squares import inverse, traces
from lnr_prune.lasso.problem import Block, GroupLasso
from lnr_prune.lasso.prox import members

RIDGE = 1e-8  # relative to every column's second moment
PANEL = 128  # columns removed before H and M are updated
TIE = 1e-6  # relative difference of two costs that may be due to rounding


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
    `PANEL` columns, from the groups that are cheapest at that point, as if there were no others. A bound tells which
    others might have been cheaper in the meantime, and matrix products what these would have cost at every step of the
    panel. It is valid up to the first step at which one of them would have been cheaper. Both matrices are recomputed
    whenever three quarters of the groups have been removed, so that rounding errors do not add up.

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
        sweeps = [sweep for sweep in sweeps if len(sweep.H)]
        if not sweeps:  # no consumer reads what is left
            order, errors[:left] = order + names[alive].tolist(), [errors[left]] * left
            break
        steps = min(max(1, PANEL // max(sweep.columns.shape[1] for sweep in sweeps)), left)
        costs = _total([traces(sweep.h, sweep.m) for sweep in sweeps]).where(alive, math.inf)
        candidates = costs.argsort()[: min(steps + steps // 2, left)]
        guess = candidates[_cheapest([sweep.few(candidates) for sweep in sweeps], steps).to(device)]
        own = _total([sweep.open(guess) for sweep in sweeps])
        others = alive.clone()
        others[candidates] = False
        least = costs.sqrt() - _total([sweep.loss for sweep in sweeps]).sqrt()
        others &= least.clamp_min(0).square() < own.max()  # they might be cheaper at some step
        rivals, done = others.nonzero()[:, 0], steps
        if len(rivals):
            costs = _total([sweep.costs(rivals) for sweep in sweeps])
            wrong = own > (1 + TIE) * costs.amin(1) + 1e-14 * scale
            wrong[0] = False  # the first step is right
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


def _cheapest(parts: Sequence["_Few"], steps: int) -> Tensor:
    """The first ``steps`` groups to remove among a few."""
    gone, order = np.zeros(len(parts[0].h)), list[int]()
    for _ in range(steps):
        g = int((sum((part.costs() for part in parts), gone)).argmin())
        order.append(g)
        gone[g] = math.inf
        for part in parts:
            part.remove(g)
    return torch.tensor(order)


class _Few:
    """H and ``M^T M`` of a few groups, on the CPU, in numpy: its small steps cost half a microsecond each.

    With ``K = H_gg^-1 H_g:`` and ``V = (M^T M)_g: - (M^T M)_gg K / 2``, removing g means ``H -= H_:g K`` and
    ``M^T M -= K^T V + V^T K``. The matrices stay as they are; only the rows that are asked for are computed.
    """

    def __init__(self, H: Tensor, MM: Tensor, width: int) -> None:
        self.H, self.MM, self.width, self.used = H.cpu().numpy(), MM.cpu().numpy(), width, 0
        self.rows, self.K, self.V = (np.empty_like(self.H) for _ in range(3))
        self.eye = np.eye(width) if width > 1 else 1.0
        self.h, self.m = (
            A.diagonal().copy()
            if width == 1
            else A.reshape(-1, width, len(A) // width, width).diagonal(axis1=0, axis2=2).transpose(2, 0, 1).copy()
            for A in (self.H, self.MM)
        )

    def costs(self) -> NDArray[np.float64]:
        """What every group costs now."""
        h, m = self.h, self.m
        return m / h if self.width == 1 else np.asarray(traces(torch.from_numpy(h), torch.from_numpy(m)))

    def remove(self, g: int) -> None:
        """Removes group g."""
        w, used = self.width, self.used
        rows, K, V = self.rows[:used], self.K[:used], self.V[:used]
        if w == 1:
            row = self.H[g] - rows[:, g] @ K
            mm = self.MM[g] - K[:, g] @ V - V[:, g] @ K
            k = row / (row[g] or 1.0)
            v = mm - (mm[g] / 2) * k
            self.h -= row * k
            self.m -= 2 * k * v
        else:
            own = slice(g * w, g * w + w)
            row = self.H[own] - rows[:, own].T @ K
            mm = self.MM[own] - K[:, own].T @ V - V[:, own].T @ K
            k = torch.linalg.inv_ex(torch.from_numpy(row[:, own].copy()))[0].numpy() @ row
            v = mm - mm[:, own] @ k / 2
            of_row, of_k, of_v = (x.reshape(w, -1, w).transpose(1, 2, 0) for x in (row, k, v))
            kv = of_k @ of_v.swapaxes(1, 2)
            self.h -= of_row @ of_k.swapaxes(1, 2)
            self.m -= kv + kv.swapaxes(1, 2)
        self.rows[used : used + w], self.K[used : used + w], self.V[used : used + w] = row, k, v
        self.h[g], self.m[g], self.used = self.eye, 0.0, used + w


class _Sweep:
    """One consumer's H and M on the remaining columns, and the diagonal blocks h of H and m of ``M^T M``.

    With ``u = L^-1 H_g:``, ``L L^T = H_gg``, ``a = L^-1 M_g^T``, ``z = a M`` and ``v = z - a a^T u / 2``, removing g
    means ``H -= u^T u``, ``M -= a^T u`` and ``M^T M -= u^T v + v^T u``. H stays as it is, and so do the rows u: only
    those rows of their difference are computed that are asked for. Mt is M transposed.
    """

    def __init__(self, block: Block, names: Tensor, n_groups: int, ridge: float) -> None:
        kept = torch.isin(block.groups, names).nonzero()[:, 0]
        R, B = normalised(block, kept, ridge)
        self.H, self.used = inverse(R), 0
        self.U = R.new_empty(len(R), len(R))  # u of all that was removed, transposed, in its first columns
        self.Mt = self.H @ B.T
        self.explained = float((self.Mt.T * B).sum())
        self.columns = members(block.groups[kept], n_groups)[names]
        self.h, _ = diagonal_blocks(self.H, B[:1], self.columns, torch.ones_like(names))
        self.m = blocks_of_gram(self.Mt, self.columns)

    def compact(self, alive: Tensor) -> None:
        """Drops the columns of the removed groups, which have been zero so far."""
        there = torch.ones(len(self.H) + 1, dtype=torch.bool, device=alive.device)
        there[self.columns[~alive]], there[-1] = False, False
        kept = there.nonzero()[:, 0]
        self.H, self.Mt, self.U = self.H[kept][:, kept], self.Mt[kept], self.U[kept]
        self.columns = (there.cumsum(0) - 1).where(there, len(kept))[self.columns[alive]]
        self.h, self.m = self.h[alive], self.m[alive]

    def few(self, candidates: Tensor) -> _Few:
        """H and ``M^T M`` of a few groups; H is the identity where padded."""
        index = self.columns[candidates].flatten()
        there = index < len(self.H)
        index = index * there
        M = self.Mt[index] * there[:, None]
        U = self.U[index, : self.used]
        H = self.H[index[:, None], index].addmm_(U, U.T, alpha=-1)
        H *= there * there[:, None]
        H.diagonal().add_(~there)
        return _Few(H, M @ M.T, self.columns.shape[1])

    def open(self, groups: Tensor) -> Tensor:
        """Prepares to remove these groups in this order; returns what each costs when its turn comes.

        By then, ``M_g H_gg^(-1/2)`` of any other group has changed by at most the root of ``loss``, in Frobenius norm:
        ``||a||^2 r / (1 - r)``, with the spectral norm of a and ``r = Tr(H_gg^-1 u_g^T u_g)``.
        """
        columns = self.columns[groups]
        self.there = there = columns < len(self.H)
        index, self.ends = columns[there], there.sum(1).cumsum(0)
        rows = self.H[index].addmm_(self.U[index, : self.used], self.U[:, : self.used].T, alpha=-1)
        L = torch.linalg.cholesky_ex(rows[:, index])[0]
        self.u = torch.linalg.solve_triangular(L, rows, upper=False)
        self.a = torch.linalg.solve_triangular(L, self.Mt[index], upper=False)
        self.uu = blocks_of_gram(self.u.T, self.columns)
        r = traces(self.h, self.uu)
        own = self.h.new_zeros(there.shape).masked_scatter_(there, self.a.square().sum(1)).sum(1)
        self.aa = self.a @ self.a.T
        most = torch.linalg.eigvalsh(self.aa)[-1] if len(index) else 0.0
        self.loss = torch.where(r < 1, most * r / (1 - r), math.inf)
        return own

    def costs(self, groups: Tensor) -> Tensor:
        """What these groups cost before each step, (steps, groups)."""
        columns = self.columns[groups]
        index = columns.clamp_max(max(0, len(self.H) - 1))
        aa, flat = self.aa.tril(), index.flatten()
        aa.diagonal().div_(2)
        u = self.u[:, flat]
        v = torch.addmm(self.a @ self.Mt[flat].T, aa, u, alpha=-1)
        # (steps, width, groups, width), zero where padded
        u_g, v_g = (x.new_zeros(*self.there.shape, *columns.shape) for x in (u, v))
        u_g[self.there], v_g[self.there] = (x.view(-1, *columns.shape) * (columns < len(self.H)) for x in (u, v))
        uv = torch.einsum("swgi,swgj->sgij", u_g, v_g)
        uu = torch.einsum("swgi,swgj->sgij", u_g, u_g)
        h = torch.cat([self.h[groups][None], -uu[:-1]]).cumsum(0)
        m = torch.cat([self.m[groups][None], -(uv + uv.mT)[:-1]]).cumsum(0)
        return traces(h.flatten(0, 1), m.flatten(0, 1)).view(len(uu), -1)

    def close(self, done: int) -> None:
        """Removes the groups of the first ``done`` steps from H and M."""
        used = int(self.ends[done - 1])
        u, a = self.u[:used], self.a[:used]
        self.U[:, self.used : self.used + used], self.used = u.T, self.used + used
        self.Mt.addmm_(u.T, a, alpha=-1)
        self.h = self.h - (self.uu if used == len(self.u) else blocks_of_gram(u.T, self.columns))
        self.m = blocks_of_gram(self.Mt, self.columns)


def blocks_of_gram(X: Tensor, columns: Tensor) -> Tensor:
    """``X_g X_g^T`` of every group's rows of X, (n_groups, width, width), zero where padded."""
    if columns.shape[1] == 1:
        return torch.nn.functional.pad(X.square().sum(1), (0, 1))[columns][..., None]
    x = torch.nn.functional.pad(X, (0, 0, 0, 1))[columns]
    return x @ x.mT


def normalised(block: Block, columns: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """R and B of these columns, scaled to unit second moment (which changes no cost), with the ridge."""
    R, B = block.R.double(), block.B.double()
    if len(columns) < len(R):
        R, B = R[columns[:, None], columns], B[:, columns]
    size = R.diagonal().sqrt()
    scale = torch.where(size > 0, 1 / size, 0.0)
    R, B = (R * scale).mul_(scale[:, None]), B * scale
    R.diagonal().fill_(1 + ridge)
    return R, torch.linalg.qr(B, mode="r").R if len(B) > len(R) else B  # only B^T B matters


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
