"""Coordinates of a layer's matrix in which its inputs, and the gradients of its outputs, are white."""

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 1e-3  # of the second moments, as a fraction of their mean


@dataclass(frozen=True, eq=False)
class Coordinates:
    """``V = C^T M L`` for the entries of M that may change, where ``L L^T`` and ``C C^T`` are second moments.

    Attributes:
        start: M, (h, d).
        at: Rows that are still read, and columns that stay.
        L: Factor of the second moments of the inputs.
        C: Factor of those of the gradients of the outputs.
    """

    start: Tensor
    at: tuple[Tensor, Tensor]
    L: Tensor
    C: Tensor

    @classmethod
    def of(cls, M: Tensor, stays: Tensor, inputs: Tensor, outputs: Tensor) -> "Coordinates":
        """The coordinates around M.

        Args:
            M: The matrix, (h, d).
            stays: Its columns that stay, (d,) bool.
            inputs: Second moments of these columns' inputs.
            outputs: Second moments of the gradients of the outputs, (h, h).
        """
        power = outputs.diagonal()
        alive = (power > 1e-12 * power.max()).nonzero()
        at = alive, stays.nonzero().flatten()
        return cls(M, at, _root(inputs), _root(outputs[alive, alive.flatten()]))

    def of_matrix(self, M: Tensor) -> Tensor:
        """V."""
        V: Tensor = self.C.T @ M[self.at] @ self.L
        return V.contiguous()

    def matrix(self, V: Tensor) -> Tensor:
        """M."""
        part = torch.linalg.solve_triangular(self.L, V, upper=False, left=False)
        part = torch.linalg.solve_triangular(self.C.T, part, upper=True)
        M: Tensor = self.start.index_put(self.at, part)
        return M


def _root(A: Tensor) -> Tensor:
    """Cholesky's factor of a matrix, damped until it has one."""
    L: Tensor
    damping = DAMPING * float(A.diagonal().mean()) or 1.0
    while True:
        L, info = torch.linalg.cholesky_ex(A + damping * torch.eye(len(A), dtype=A.dtype, device=A.device))
        if int(info) == 0:
            return L
        damping *= 10
