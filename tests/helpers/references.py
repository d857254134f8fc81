"""Slow, obvious oracles: everything is computed from samples, or by a generic convex solver."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import cvxpy as cp
import torch
from torch import Tensor, nn

from lnr_prune import Block, GroupLasso


@dataclass(frozen=True, eq=False, repr=False)
class Consumer:
    """Samples of one consumer's input and wanted output, one a row."""

    x: Tensor
    y: Tensor
    groups: Tensor


@dataclass(frozen=True, eq=False, repr=False)
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
    tolerances = {"tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9}
    cp.Problem(cp.Minimize(sum(terms))).solve(solver=cp.CLARABEL, **tolerances)
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
    cp.Problem(cp.Minimize(sum(terms))).solve(solver=cp.CLARABEL)
    return [torch.from_numpy(U.value) for U in variables]


def least_squares(case: Case, support: Tensor, ridge: float = 0.0) -> list[Tensor]:
    """Every consumer refitted on the kept and the unpenalised columns: least norm in the kept ones.

    The ridge is on the kept columns only, a fraction of the mean variance that the unpenalised
    columns leave in the penalised ones.
    """
    answers = []
    for c in case.consumers:
        free, kept = c.x[:, c.groups < 0], torch.cat([support, support.new_zeros(1)])[c.groups]
        x, y = (a - free @ _solve(free, a) for a in (c.x, c.y))  # what the unpenalised columns leave
        x = x * (x.norm(dim=0) > 1e-9 * c.x.norm(dim=0))
        root = (ridge * x[:, c.groups >= 0].square().sum(0).mean()).sqrt()
        rows = root * torch.eye(int(kept.sum()), dtype=torch.float64)
        M = x.new_zeros(y.shape[1], x.shape[1])
        M[:, kept] = _solve(torch.cat([x[:, kept], rows]), torch.cat([y, y.new_zeros(len(rows), y.shape[1])])).T
        M[:, c.groups < 0] = _solve(free, c.y - c.x @ M.T).T
        answers.append(M)
    return answers


def _solve(a: Tensor, b: Tensor) -> Tensor:
    """Least-squares solution of least norm, whatever the rank."""
    return torch.linalg.lstsq(a, b, rcond=1e-9, driver="gelsd").solution


def relative_error(case: Case, coefficients: Sequence[Tensor]) -> float:
    """``sum_c mean ||y - M x||^2 / sum_c mean ||y||^2``."""
    energy = sum(float(c.y.square().sum() / len(c.y)) for c in case.consumers)
    return 1 + 2 * float(loss(case, coefficients)) / energy if energy else 0.0


def without(case: Case, support: Tensor, g: int) -> float:
    """Relative error of the refit on the support without group g."""
    smaller = support.clone()
    smaller[g] = False
    return relative_error(case, least_squares(case, smaller))


def best_rank_error(y: Tensor, rank: int) -> float:
    """Least ``E||y - y'||^2`` of any y' in an affine space of that dimension (Eckart and Young)."""
    return float(torch.linalg.eigvalsh(torch.cov(y.T, correction=0))[:-rank].sum())


def descended(model: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> float:
    """Mean squared error of the outputs after a long descent in all convolutions' weights and batch norms' biases."""
    fixed = {name: value.detach() for name, value in weights.items()}
    shape = {
        name: value.detach().clone().requires_grad_()
        for name, value in fixed.items()
        if value.dim() == 4 or name.endswith(".bias")
    }
    mask = {name: (value != 0).double() for name, value in shape.items() if value.dim() == 4}
    wanted = model(x)
    optimizer = torch.optim.LBFGS(list(shape.values()), max_iter=1500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        given = {name: value * mask.get(name, 1.0) for name, value in shape.items()}
        got = torch.func.functional_call(model, {**fixed, **given}, (x,))
        error = (wanted - got).square().sum(1).mean()
        error.backward()
        return error

    optimizer.step(loss)
    return float(loss().detach())
