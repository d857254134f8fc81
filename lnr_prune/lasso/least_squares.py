"""Least squares with a positive semidefinite matrix that may be singular."""

import torch
from torch import Tensor

RIDGE = 1e-9  # of a singular R, relative to its mean diagonal
REFINEMENTS = 3  # by which the ridge is taken back


def _least_squares(R: Tensor, B: Tensor) -> Tensor:
    """``B R^+``, of least norm where R is singular to working precision: one Cholesky factorisation as a rule.

    A singular R gets a ridge that rounding could have made, whose effect a few steps of iterative refinement
    take back (iterated Tikhonov); eigenvalues come in only where that fails.
    """
    alive = R.diagonal() > 0  # nothing of dead columns, not even rounding
    rounding = len(R) * torch.finfo(R.dtype).eps
    L, info = torch.linalg.cholesky_ex(R)
    if int(info) == 0 and bool((L.diagonal().square() > 1e3 * rounding * R.diagonal()).all()):
        return torch.cholesky_solve(B.T, L).T
    A = R.clone()
    A.diagonal().add_(RIDGE * R.diagonal().mean())
    L, info = torch.linalg.cholesky_ex(A)
    if R.dtype == torch.float64 and int(info) == 0:
        M = torch.cholesky_solve(B.T, L).T
        for _ in range(REFINEMENTS):
            M = M + torch.cholesky_solve((B - M @ R).T, L).T
        if float((B - M @ R).norm()) <= 1e2 * rounding * float(M.norm() * R.norm()):
            return M * alive
    R_inverse: Tensor = torch.linalg.pinv(R, hermitian=True, rtol=1e2 * rounding)
    return B @ R_inverse * alive
