"""Swaps of a kept group for a dropped one: a last improvement of any support."""

import math

import torch
from torch import Tensor

from lnr_prune.lasso.backward import RIDGE, diagonal_blocks, normalised
from lnr_prune.lasso.least_squares import inverse, traces
from lnr_prune.lasso.problem import Block, GroupLasso
from lnr_prune.lasso.prox import members

DEPENDENT = 1e-6  # the kept columns explain a column if less than this share of its second moment remains


def exchange(problem: GroupLasso, support: Tensor, *, ridge: float = RIDGE, tries: int = 8) -> Tensor:
    """Swaps a kept group for a dropped one until the refit's error stops falling; their number stays the same.

    A dropped group is added, then the group that costs least is removed. If that is another group, the swap has
    paid off. Everything is read from one tableau per consumer; adding and removing a group are the same pivot on it
    (the sweep operator). With ``S`` the kept columns, ``D`` the others and ``H = R_SS^-1``:

        T = [[-H, H R_SD], [R_DS H, R_DD - R_DS H R_SD]],   X = [M_S, B_D - M_S R_SD].

    Args:
        problem: The problem.
        support: True for every group that is kept at the start, (n_groups,) bool.
        ridge: As for `backward`.
        tries: How many dropped groups are tried before giving up, the largest gain first. Groups that the kept
            ones explain are skipped.

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
    better = sum(_Tableau(block, kept, ridge).explained for block in blocks) > explained  # not just rounding
    return kept if better else support.clone()


class _Tableau:
    """T and X of `exchange`, for one consumer."""

    def __init__(self, block: Block, kept: Tensor, ridge: float) -> None:
        self.T, self.X = normalised(block, torch.arange(len(block.R), device=kept.device), ridge)
        self.columns = members(block.groups, len(kept))
        S, D = (mask[block.groups].nonzero()[:, 0] for mask in (kept, ~kept))
        H, R_SD = inverse(self.T[S][:, S]), self.T[S][:, D]
        HR, M = H @ R_SD, self.X[:, S] @ H
        self.T[D[:, None], D] -= R_SD.T @ HR
        self.T[S[:, None], S], self.T[S[:, None], D], self.T[D[:, None], S] = -H, HR, HR.T
        self.explained = float((M * self.X[:, S]).sum())
        self.X[:, D] -= M @ R_SD
        self.X[:, S] = M

    def accepts(self, g: int) -> bool:
        """False if the kept groups all but explain group g: a pivot on rounding errors would spoil T."""
        columns = self.columns[g]
        columns = columns[columns < len(self.T)]
        L, info = torch.linalg.cholesky_ex(self.T[columns][:, columns])
        return int(info) == 0 and bool((L.diagonal() > DEPENDENT**0.5).all())

    def pivot(self, g: int, sign: int) -> None:
        """Adds group g (sign 1) or removes it (sign -1)."""
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


def _values(tableaus: list[_Tableau], kept: Tensor) -> Tensor:
    """What every group is worth: by how much the error falls if it is added, or rises if it is removed."""
    sign = torch.where(kept, -1.0, 1.0)
    blocks = (diagonal_blocks(tableau.T, tableau.X, tableau.columns, sign) for tableau in tableaus)
    return torch.stack([traces(t, x) for t, x in blocks]).sum(0)
