"""Slow, obvious oracles: everything is computed from samples, or by a generic convex solver."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import cvxpy as cp
import torch
from torch import Tensor

from lnr_prune import Block, GroupLasso

ACCURATE = {"solver": cp.CLARABEL, "tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}


@dataclass(frozen=True, eq=False)
class Consumer:
    """Samples of one consumer's input and wanted output, one a row."""

    x: Tensor
    y: Tensor
    groups: Tensor


@dataclass(frozen=True, eq=False)
class Case:
    """A problem and the samples that it summarises."""

    consumers: tuple[Consumer, ...]
    weights: Tensor

    @cached_property
    def problem(self) -> GroupLasso:
        return GroupLasso(tuple(block(consumer) for consumer in self.consumers), self.weights)

    @property
    def duplicates(self) -> bool:
        """Whether two penalised columns are equal: the answer is then not unique."""
        for consumer in self.consumers:
            x = consumer.x[:, consumer.groups >= 0]
            if len(torch.unique(x, dim=1).T) < len(x.T):
                return True
        return False


def block(consumer: Consumer) -> Block:
    x, y, n = consumer.x, consumer.y, len(consumer.x)
    return Block(x.T @ x / n, y.T @ x / n, float(y.square().sum() / n), consumer.groups)


def loss(case: Case, coefficients: Sequence[Tensor]) -> Tensor:
    """``sum_c 1/2 mean ||y - M x||^2 - 1/2 mean ||y||^2``."""
    total = torch.zeros((), dtype=torch.float64)
    for consumer, M in zip(case.consumers, coefficients, strict=True):
        residual = consumer.y - consumer.x @ M.T
        total = total + (residual.square().sum(1) - consumer.y.square().sum(1)).mean() / 2
    return total


def group_vector(case: Case, coefficients: Sequence[Tensor], g: int) -> Tensor:
    """All entries of group g over all consumers, as one vector."""
    pieces = [M[:, c.groups == g].flatten() for c, M in zip(case.consumers, coefficients, strict=True)]
    return torch.cat(pieces)


def objective(case: Case, coefficients: Sequence[Tensor], lam: float) -> float:
    penalty = sum(
        float(w) * float(torch.linalg.vector_norm(group_vector(case, coefficients, g)))
        for g, w in enumerate(case.weights)
    )
    return float(loss(case, coefficients)) + lam * penalty


def group_lasso(case: Case, lam: float) -> list[Tensor]:
    """The minimiser of `objective`, by an interior-point method."""
    variables = [cp.Variable((c.y.shape[1], c.x.shape[1])) for c in case.consumers]
    terms = [
        cp.sum_squares(c.y.numpy() - c.x.numpy() @ M.T) / (2 * len(c.x))
        for c, M in zip(case.consumers, variables, strict=True)
    ]
    for g, w in enumerate(case.weights):
        columns = [(c.groups == g).nonzero()[:, 0].numpy() for c in case.consumers]
        pieces = [cp.vec(M[:, k], order="F") for M, k in zip(variables, columns, strict=True) if len(k)]
        terms.append(lam * float(w) * cp.norm(cp.hstack(pieces)))
    cp.Problem(cp.Minimize(sum(terms))).solve(**ACCURATE)
    return [torch.from_numpy(M.value) for M in variables]


def prox(matrices: Sequence[Tensor], thresholds: Sequence[float], groups: Sequence[Tensor]) -> list[Tensor]:
    """``argmin_U sum_g t_g ||U_g|| + 1/2 ||U - M||^2``, by an interior-point method."""
    variables = [cp.Variable(tuple(M.shape)) for M in matrices]
    terms = [cp.sum_squares(U - M.numpy()) / 2 for U, M in zip(variables, matrices, strict=True)]
    for g, t in enumerate(thresholds):
        columns = [(group == g).nonzero()[:, 0].numpy() for group in groups]
        pieces = [cp.vec(U[:, k], order="F") for U, k in zip(variables, columns, strict=True) if len(k)]
        if pieces:
            terms.append(t * cp.norm(cp.hstack(pieces)))
    cp.Problem(cp.Minimize(sum(terms))).solve(**ACCURATE)
    return [torch.from_numpy(U.value) for U in variables]


def least_squares(case: Case, support: Tensor, ridge: float = 0.0) -> list[Tensor]:
    """Every consumer refitted on the kept and the unpenalised columns: least norm in the kept ones.

    The ridge is on the kept columns only, a fraction of the mean variance that the unpenalised
    columns leave in the penalised ones.
    """
    answers = []
    for c in case.consumers:
        n, free = len(c.x), c.x[:, c.groups < 0]
        rest = c.x - free @ _solve(free, c.x)  # residuals from the unpenalised columns
        kept = support[c.groups] & (c.groups >= 0)
        diagonal = ridge * rest[:, c.groups >= 0].square().sum(0).mean()
        rows = diagonal.sqrt() * torch.eye(int(kept.sum()), dtype=torch.float64)
        M = torch.zeros(c.y.shape[1], c.x.shape[1], dtype=torch.float64)
        targets = torch.cat([c.y - free @ _solve(free, c.y), torch.zeros(len(rows), c.y.shape[1], dtype=torch.float64)])
        M[:, kept] = _solve(torch.cat([rest[:, kept], rows]), targets).T
        M[:, c.groups < 0] = _solve(free, c.y - c.x @ M.T).T
        assert len(rest) == n
        answers.append(M)
    return answers


def _solve(a: Tensor, b: Tensor) -> Tensor:
    """Least-squares solution of least norm, whatever the rank."""
    return torch.linalg.lstsq(a, b, rcond=1e-9, driver="gelsd").solution
