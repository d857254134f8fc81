"""Exchanges of one kept for one dropped group: a last improvement of any support."""

import math

import torch
from torch import Tensor

from lnr_prune.lasso.backward import RIDGE, diagonal_blocks, inverse, members, normalised, traces
from lnr_prune.lasso.problem import Block, GroupLasso

DEPENDENT = 1e-6  # share of a column's second moment below which the kept columns explain it


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


def _values(tableaus: list[_Tableau], kept: Tensor) -> Tensor:
    """What every group is worth: the error that letting it in takes away, or that letting it go adds."""
    sign = torch.where(kept, -1.0, 1.0)
    blocks = (diagonal_blocks(tableau.T, tableau.X, tableau.columns, sign) for tableau in tableaus)
    return torch.stack([traces(t, x) for t, x in blocks]).sum(0)
