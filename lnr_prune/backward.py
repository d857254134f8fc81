"""Backward elimination and exchanges on a group-lasso problem: supports from least squares alone, without lam."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lnr_prune.problem import Block, GroupLasso

RIDGE = 1e-8  # relative to every column's second moment
DEPENDENT = 1e-6  # share of a column's second moment below which the kept columns explain it
PANEL = 96  # columns that go before H and M are updated as a whole
LEAF = 256  # size below which an inverse is LAPACK's


@dataclass(frozen=True, eq=False)
class Elimination:
    """A nested sequence of supports, from all groups to none.

    Attributes:
        order: Groups in the order of their removal, (n_groups,) int64.
        errors: ``sum_c E||y_c - M_c x_c||^2 / sum_c E||y_c||^2`` of the refit with k groups kept, index k,
            (n_groups + 1,) float64. The ridge's own share is counted in: but for rounding it is never too small.
    """

    order: Tensor
    errors: Tensor

    def support(self, count: int) -> Tensor:
        """The last ``count`` groups to go, (n_groups,) bool.

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
    """Removes, one after another, the group whose absence costs least when all others are refitted.

    With ``H = (R + ridge)^-1`` and ``M = B H`` on the groups still there, summed over the consumers,

        cost_g = Tr(M_g H_gg^-1 M_g^T),   M <- M - M_g H_gg^-1 H_g:,   H <- H - H_:g H_gg^-1 H_g: .

    Unpenalised columns are eliminated first; the weights w play no part. The updates of `PANEL` columns are
    gathered and applied as one matrix product, and both matrices are computed afresh whenever half of the
    columns have gone, so that rounding does not pile up.

    Args:
        problem: The problem.
        ridge: Relative to every column's own second moment, > 0: it makes a singular R invertible.

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
    alive = torch.ones(n, dtype=torch.bool, device=problem.weights.device)
    order: list[int] = []
    errors, sweeps, fresh = [0.0] * (n + 1), list[_Sweep](), 2 * n
    scale = problem.t if problem.t > 0 else 1.0
    while len(order) < n:
        if 2 * (n - len(order)) <= fresh:
            sweeps = [_Sweep(block, alive, ridge) for block in reduced.blocks]
            fresh = n - len(order)
            errors[n - len(order)] = (reduced.t - sum(sweep.explained for sweep in sweeps)) / scale
        steps = min(max(1, PANEL // max(sweep.width for sweep in sweeps)), n - len(order))
        for step in range(steps):
            costs = torch.stack([sweep.costs() for sweep in sweeps]).sum(0).where(alive, math.inf)
            if step == 0:
                for sweep in sweeps:
                    sweep.open(costs.argsort()[: steps + steps // 2])
            cost, g = (number.item() for number in costs.min(0))
            order.append(int(g))
            errors[n - len(order)] = errors[n - len(order) + 1] + max(cost, 0.0) / scale
            alive[int(g)] = False
            for sweep in sweeps:
                sweep.remove(int(g))
        for sweep in sweeps:
            sweep.close()
    return Elimination(torch.tensor(order, device=alive.device), torch.tensor(errors, dtype=torch.float64).clamp_min(0))


class _Sweep:
    """One consumer's H and M on the columns that are left, and what the panel has taken from them.

    With ``u = H_:g L^-T``, ``L L^T = H_gg``, ``a = M_g L^-T``, ``z = M^T a`` and ``v = z - u a^T a / 2``, removing g is
    ``H -= u u^T``, ``M -= a u^T`` and ``M^T M -= u v^T + v u^T``: H and M stay as they are until `close`.
    """

    def __init__(self, block: Block, alive: Tensor, ridge: float) -> None:
        kept = alive[block.groups].nonzero()[:, 0]
        R, B = _normalised(block, kept, ridge)
        self.group = block.groups[kept]
        self.H = _inverse(R)
        self.M = B @ self.H
        self.explained = float((self.M * B).sum())
        self.columns = _members(self.group, len(alive))
        self.width = self.columns.shape[1]
        self.h, self.m = _blocks(self.H, self.M, self.columns, torch.ones_like(alive))  # of H and M^T M

    def costs(self) -> Tensor:
        """``Tr(M_g H_gg^-1 M_g^T)`` of every group, 0 for those that have gone."""
        return _traces(self.h, self.m)

    def open(self, candidates: Tensor) -> None:
        """Starts a panel; rows of ``M^T M`` are made ready for those who will probably go."""
        k = len(self.group)
        index = self.columns[candidates].flatten()
        index = index[index < k]
        self.place = torch.full((k,), -1, device=index.device)
        self.place[index] = torch.arange(len(index), device=index.device)
        self.gram = self.M[:, index].T @ self.M
        self.taken = self.H.new_empty(PANEL + self.width, 2, k)
        self.moved = self.M.new_empty(PANEL + self.width, len(self.M))
        self.used = 0

    def remove(self, g: int) -> None:
        """Takes group g out."""
        columns = self.columns[g]
        columns = columns[columns < len(self.group)]
        w, j = len(columns), self.used
        if w == 0:
            return
        rows, place = self.H[columns], self.place[columns]
        products = self.gram[place] if bool((place >= 0).all()) else self.M[:, columns].T @ self.M
        m = self.M[:, columns].T
        if j:
            taken = self.taken[:j]
            uv = taken.index_select(2, columns)  # (j, 2, w)
            pairs = torch.cat([torch.stack([uv[:, 0], torch.zeros_like(uv[:, 0])], 1), uv.flip(1)], 2)
            change = pairs.view(2 * j, 2 * w).T @ taken.view(2 * j, -1)
            rows, products = rows - change[:w], products - change[w:]
            m = m - uv[:, 0].T @ self.moved[:j]
        L = torch.linalg.cholesky_ex(rows[:, columns])[0]
        u, z, a = (torch.linalg.solve_triangular(L, x, upper=False) for x in (rows, products, m))
        v = z - (a @ a.T) @ u / 2
        self.taken[j : j + w, 0], self.taken[j : j + w, 1], self.moved[j : j + w] = u, v, a
        self.used += w
        padded = torch.nn.functional.pad(torch.stack([u, v]), (0, 1))
        u_g, v_g = padded.index_select(2, self.columns.flatten()).view(2, w, *self.columns.shape)
        if self.width == 1:
            self.h -= u_g[0].square()[..., None]
            self.m -= 2 * (u_g[0] * v_g[0])[..., None]
        else:
            self.h -= torch.einsum("wgi,wgj->gij", u_g, u_g)
            uv_g = torch.einsum("wgi,wgj->gij", u_g, v_g)
            self.m -= uv_g + uv_g.mT

    def close(self) -> None:
        """Applies the panel to H and M; columns that have gone are zero from then on."""
        u, a = self.taken[: self.used, 0], self.moved[: self.used]
        self.H.addmm_(u.T, u, alpha=-1)
        self.M.addmm_(a.T, u, alpha=-1)


def exchange(problem: GroupLasso, support: Tensor, *, ridge: float = RIDGE, tries: int = 8) -> Tensor:
    """Swaps one kept for one dropped group until the refit's error falls no more; the count stays.

    A dropped group is let in, then the group goes that costs least: if that is another one, the swap was worth
    it. All follows from one tableau per consumer, on which letting groups in or out is the same pivot (the sweep
    operator), with ``S`` the kept columns, ``H = R_SS^-1`` and ``D`` the others:

        T = [[-H, H R_SD], [R_DS H, R_DD - R_DS H R_SD]],   X = [M_S, B_D - M_S R_SD].

    Args:
        problem: The problem.
        support: True for every group that is kept at first, (n_groups,) bool.
        ridge: As for `backward`.
        tries: How many dropped groups, those of largest gain first, are tried before giving up; those that
            the kept ones explain are passed over.

    Returns:
        The new support, (n_groups,) bool.

    References:
        Miller, "Subset Selection in Regression", 2002, section 3.9 (sequential replacement).
    """
    kept = support.clone()
    blocks = problem.eliminated.problem.blocks
    tableaus = [_Tableau(block, kept, ridge) for block in blocks]
    explained = sum(tableau.explained for tableau in tableaus)
    improved = bool(kept.any())
    while improved:
        improved = False
        gains = _values(tableaus, kept).where(~kept, -math.inf)
        for p in gains.argsort(descending=True)[: min(tries, int((~kept).sum()))].tolist():
            if not all(tableau.accepts(p) for tableau in tableaus):
                continue
            for tableau in tableaus:
                tableau.pivot(p, 1)
            kept[p] = True
            cost, g = (number.item() for number in _values(tableaus, kept).where(kept, math.inf).min(0))
            improved = int(g) != p and cost < (1 - 1e-6) * float(gains[p])
            leaver = int(g) if improved else p
            for tableau in tableaus:
                tableau.pivot(leaver, -1)
            kept[leaver] = False
            if improved:
                break
    better = sum(_Tableau(block, kept, ridge).explained for block in blocks) > explained  # not by rounding alone
    return kept if better else support.clone()


class _Tableau:
    """One consumer's T and X of `exchange`."""

    def __init__(self, block: Block, kept: Tensor, ridge: float) -> None:
        self.T, self.X = _normalised(block, torch.arange(len(block.R), device=kept.device), ridge)
        self.columns = _members(block.groups, len(kept))
        S, D = (mask[block.groups].nonzero()[:, 0] for mask in (kept, ~kept))
        H, R_SD = _inverse(self.T[S][:, S]), self.T[S][:, D]
        HR, M = H @ R_SD, self.X[:, S] @ H
        self.T[D[:, None], D] -= R_SD.T @ HR
        self.T[S[:, None], S], self.T[S[:, None], D], self.T[D[:, None], S] = -H, HR, HR.T
        self.explained = float((M * self.X[:, S]).sum())
        self.X[:, D] -= M @ R_SD
        self.X[:, S] = M

    def accepts(self, g: int) -> bool:
        """Whether group g is not all but explained by the kept ones: pivots on rounding would spoil T."""
        columns = self.columns[g]
        columns = columns[columns < len(self.T)]
        L, info = torch.linalg.cholesky_ex(self.T[columns][:, columns])
        return int(info) == 0 and bool((L.diagonal() > DEPENDENT**0.5).all())

    def pivot(self, g: int, sign: int) -> None:
        """Lets group g in (sign 1) or out (sign -1)."""
        columns = self.columns[g]
        columns = columns[columns < len(self.T)]
        if not len(columns):
            return
        rows, x = self.T[columns], self.X[:, columns]
        corner = torch.linalg.inv(rows[:, columns])
        solved = corner @ rows
        self.T.addmm_(rows.T, solved, alpha=-1)
        self.X.addmm_(x, solved, alpha=-1)
        self.T[columns], self.T[:, columns] = sign * solved, sign * solved.T
        self.T[columns[:, None], columns] = -corner
        self.X[:, columns] = sign * (x @ corner)


def _normalised(block: Block, columns: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """R and B of these columns at unit second moment, which no cost depends on, with the ridge."""
    R, B = block.R[columns][:, columns].double(), block.B[:, columns].double()
    size = R.diagonal().sqrt()
    scale = torch.where(size > 0, 1 / size, 0.0)
    R = R * scale * scale[:, None]
    R.diagonal().fill_(1 + ridge)
    B = B * scale
    return R, torch.linalg.qr(B, mode="r").R if len(B) > len(R) else B  # only B^T B matters


def _values(tableaus: list[_Tableau], kept: Tensor) -> Tensor:
    """What every group is worth: the error that letting it in takes away, or that letting it go adds."""
    sign = torch.where(kept, -1.0, 1.0)
    blocks = (_blocks(tableau.T, tableau.X, tableau.columns, sign) for tableau in tableaus)
    return torch.stack([_traces(t, x) for t, x in blocks]).sum(0)


def _members(group: Tensor, n_groups: int) -> Tensor:
    """Columns of every group, (n_groups, width), padded with the number of columns."""
    order = group.argsort(stable=True)
    sizes = torch.bincount(group, minlength=n_groups)
    slot = torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group[order]]
    columns = torch.full((n_groups, max(1, int(sizes.max()))), len(group), device=group.device)
    columns[group[order], slot] = order
    return columns


def _blocks(A: Tensor, M: Tensor, columns: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """Every group's blocks of sign A (the identity where padded) and of ``M^T M``, (n_groups, width, width)."""
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


def _traces(a: Tensor, m: Tensor) -> Tensor:
    """``Tr(m_g a_g^-1)`` of every group; 0 where ``a_g`` is not positive definite."""
    if a.shape[1] == 1:
        return (m / a).flatten()
    L, info = torch.linalg.cholesky_ex(a)
    return torch.cholesky_solve(m, L).diagonal(dim1=1, dim2=2).sum(1).where(info == 0, 0.0)


def _inverse(A: Tensor) -> Tensor:
    """``A^-1``; where rounding has made A indefinite, with the least of some growing ridges."""
    ridge = 0.0
    while True:
        try:
            return _by_halves(A)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            ridge = max(10 * ridge, RIDGE)
            A = A.clone()
            A.diagonal().add_(ridge * A.diagonal().mean())


def _by_halves(A: Tensor) -> Tensor:
    """``A^-1`` of a positive definite A: nearly all of it is matrix products."""
    n = len(A)
    if n <= LEAF:
        return torch.cholesky_inverse(torch.linalg.cholesky(A))
    half = n // 2
    inverse = _by_halves(A[:half, :half])
    X = inverse @ A[:half, half:]
    corner = _by_halves(torch.addmm(A[half:, half:], A[half:, :half], X, alpha=-1))
    XC = X @ corner
    result = torch.empty_like(A)
    result[half:, half:], result[:half, half:], result[half:, :half] = corner, -XC, -XC.T
    result[:half, :half] = inverse.addmm_(XC, X.T)
    return result
