"""Least squares with a positive semidefinite matrix that may be singular; inverses of positive definite ones."""

import torch
from torch import Tensor

RIDGE = 1e-9  # added to a singular R, relative to its mean diagonal
REFINEMENTS = 3  # refinement steps, which undo the ridge
LIFT = 1e-8  # the first ridge for an inverse that rounding has spoilt, relative to the mean diagonal
LEAF = 256  # matrices up to this size are inverted by LAPACK


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
            ridge = max(10 * ridge, LIFT)
            A = A.clone()
            A.diagonal().add_(ridge * A.diagonal().mean())


def _by_halves(A: Tensor) -> Tensor:
    """``A^-1`` of a positive definite A, computed almost entirely by matrix products."""
    n = len(A)
    if n <= LEAF:
        return torch.cholesky_inverse(torch.linalg.cholesky(A))
    half = n // 2
    top = _by_halves(A[:half, :half])
    X = (top @ A[:half, half:]).neg_()
    corner = _by_halves(_add_symmetric(A[half:, half:].clone(), A[half:, :half], X, 1))
    result = torch.empty_like(A)
    XC = torch.mm(X, corner, out=result[:half, half:])
    result[half:, half:], result[half:, :half] = corner, XC.T
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
