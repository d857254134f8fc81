"""Least squares with a positive semidefinite matrix that may be singular."""

import torch
from torch import Tensor

RIDGE = 1e-9  # added to a singular R, relative to its mean diagonal
REFINEMENTS = 3  # refinement steps, which undo the ridge


def _least_squares(R: Tensor, B: Tensor) -> Tensor:
    """``B R^+``, of least norm where R is singular to working precision; usually one Cholesky factorisation.

    A singular R gets a ridge as small as rounding errors. A few steps of iterative refinement undo its effect
    (iterated Tikhonov). Eigenvalues are computed only if that fails.
    """
    alive = R.diagonal() > 0  # dead columns get zeros, without rounding errors
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
