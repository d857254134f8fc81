"""The group-lasso problem of linear neural reconstruction, stated in second moments alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lnr_prune.lasso.least_squares import _least_squares
from lnr_prune.lasso.prox import Matrices, group_norms


@dataclass(frozen=True, eq=False)
class Block:
    """One consumer ``y = W x``: everything that the problem needs to know about it.

    Args:
        R: ``E[x x^T]``, (d, d), symmetric positive semi-definite, possibly singular.
        B: ``E[y x^T]``, (h, d), of R's dtype and device.
        t: ``E||y||^2``, a number; only the duality gap and relative errors depend on it.
        groups: Group of every column of x, (d,) int64; -1 marks an unpenalised column (a bias, or a
            channel that must stay). Default: every column is its own group.

    Raises:
        ValueError: If shapes or dtypes do not fit, or a value is out of range or not finite.
    """

    R: Tensor
    B: Tensor
    t: float
    groups: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        d = self.R.shape[-1] if self.R.dim() else 0
        if self.R.shape != (d, d) or self.B.dim() != 2 or self.B.shape[1] != d:
            raise ValueError(f"R must be (d, d) and B (h, d), got {tuple(self.R.shape)} and {tuple(self.B.shape)}")
        if self.R.dtype != self.B.dtype or not self.R.is_floating_point():
            raise ValueError(f"R and B must share a floating-point dtype, got {self.R.dtype}, {self.B.dtype}")
        if not (math.isfinite(self.t) and bool(self.R.isfinite().all()) and bool(self.B.isfinite().all())):
            raise ValueError("R, B and t must be finite: look for NaN or Inf in the calibration data")
        if self.t < 0:
            raise ValueError(f"t = E||y||^2 must be >= 0, got {self.t}")
        if self.groups is None:
            object.__setattr__(self, "groups", torch.arange(d, device=self.R.device))
        elif self.groups.shape != (d,) or self.groups.is_floating_point() or bool((self.groups < -1).any()):
            raise ValueError(
                f"groups must have one integer >= -1 for each of the {d} columns, got {self.groups.dtype} "
                f"{tuple(self.groups.shape)}"
            )

    @cached_property
    def penalised(self) -> Tensor:
        """Indices of the columns that belong to a group."""
        return (self.groups >= 0).nonzero()[:, 0]

    @cached_property
    def unpenalised(self) -> Tensor:
        """Indices of the columns that belong to no group."""
        return (self.groups < 0).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class GroupLasso:
    """``min_M P(M) = sum_c [1/2 Tr(M_c R_c M_c^T) - Tr(B_c M_c^T)] + lam sum_g w_g (sum_c ||M_c[:,g]||_F^2)^(1/2)``.

    Up to the constant ``sum_c t_c / 2`` this is ``1/2 sum_c E||y_c - M_c x_c||^2`` plus the penalty.
    Consumers (blocks) share their groups: channel g is removed from all of them or from none.

    Args:
        blocks: One `Block` for each consumer.
        weights: ``w_g > 0``, (n_groups,). Default: 1 for every group that occurs in the blocks.

    Raises:
        ValueError: If there is no block, no group, a weight that is not positive, or a group
            index beyond the weights.

    Example:
        >>> R, B = torch.eye(3, dtype=torch.float64), torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
        >>> problem = GroupLasso((Block(R, B, t=14.0),))
        >>> problem.lambda_max()
        3.0
    """

    blocks: tuple[Block, ...]
    weights: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.blocks:
            raise ValueError("a problem needs at least one block")
        named = 1 + max(int(block.groups.max()) if len(block.groups) else -1 for block in self.blocks)
        R = self.blocks[0].R
        if any(block.R.dtype != R.dtype or block.R.device != R.device for block in self.blocks):
            raise ValueError("all blocks must share one dtype and device")
        weights = R.new_ones(named) if self.weights is None else self.weights.to(R)
        object.__setattr__(self, "weights", weights)
        if named < 1 or named > len(weights):
            raise ValueError(f"the blocks name {named} groups, the weights {len(weights)}; need 1 or more")
        if not bool((weights > 0).all() and weights.isfinite().all()):
            raise ValueError("group weights must be positive and finite; mark unpenalised columns with group -1")

    @property
    def n_groups(self) -> int:
        """Number of groups, dead ones included."""
        return len(self.weights)

    @property
    def groups(self) -> Matrices:
        """Group of every column, one tensor per block."""
        return tuple(block.groups for block in self.blocks)

    @property
    def t(self) -> float:
        """``sum_c E||y_c||^2``: twice the error of M = 0, the scale of every relative error."""
        return float(sum(block.t for block in self.blocks))

    def zeros(self) -> Matrices:
        """The coefficients M = 0."""
        return tuple(torch.zeros_like(block.B) for block in self.blocks)

    def norms(self, coefficients: Sequence[Tensor]) -> Tensor:
        """Joint Frobenius norm of every group over the blocks, (n_groups,)."""
        return group_norms(coefficients, self.groups, self.n_groups)

    def products(self, coefficients: Sequence[Tensor]) -> Matrices:
        """``M_c R_c`` for every block."""
        return tuple(M @ block.R for M, block in zip(coefficients, self.blocks, strict=True))

    def gradient(self, coefficients: Sequence[Tensor]) -> Matrices:
        """``M_c R_c - B_c``: gradient of the smooth part."""
        MR = self.products(coefficients)
        return tuple(MR_c - block.B for MR_c, block in zip(MR, self.blocks, strict=True))

    def value(self, coefficients: Sequence[Tensor], lam: float = 0.0) -> float:
        """The objective ``P(M)``; at ``lam = 0`` the reconstruction error minus ``t / 2``."""
        return self._value(coefficients, self.products(coefficients), lam)

    def error(self, coefficients: Sequence[Tensor]) -> float:
        """``sum_c E||y_c - M_c x_c||^2 / sum_c E||y_c||^2``: 0 is exact, 1 is what M = 0 gives."""
        return max(0.0, 1 + 2 * self.value(coefficients) / self.t) if self.t > 0 else 0.0

    def lambda_max(self) -> float:
        """``max_g ||B'[:, g]||_F / w_g``: the smallest lam at which no group is kept."""
        reduced = self.eliminated.problem
        return float((reduced.norms([block.B for block in reduced.blocks]) / self.weights).max())

    def duality_gap(self, coefficients: Sequence[Tensor], lam: float) -> float:
        """``(P(M) - D) / (t' / 2)``, an upper bound on M's distance to the optimum, from R, B and t alone.

        D is the dual value of a feasible point that is easy to find: a mixture of M and the
        least-squares solution, scaled until every ``||G_g|| <= lam w_g``, with ``G = B' - M R'`` (a prime means
        that unpenalised columns are eliminated). Rounding can make a gap of zero slightly positive or negative.
        """
        eliminated = self.eliminated
        reduced = eliminated.problem
        M = tuple(M[:, block.penalised] for M, block in zip(coefficients, self.blocks, strict=True))
        primal, gap = reduced.certificate(M, reduced.products(M), lam)
        # what unpenalised columns cost because they are not at their optimum:
        excess = self.value(coefficients, lam) + eliminated.constant - primal
        return gap + excess / reduced.scale

    @property
    def scale(self) -> float:
        """``t / 2``, by which gaps and errors are divided (1 for a problem without signal)."""
        return self.t / 2 if self.t > 0 else 1.0

    @cached_property
    def traces(self) -> Tensor:
        """Trace of R over every group's columns in all blocks, (n_groups,): it bounds the group's curvature."""
        traces = self.weights.new_zeros(self.n_groups + 1)
        for block in self.blocks:
            traces.index_add_(0, block.groups.where(block.groups >= 0, self.n_groups), block.R.diagonal())
        return traces[:-1].clamp_min(torch.finfo(traces.dtype).tiny)

    @cached_property
    def single(self) -> "GroupLasso | None":
        """The problem in float32; None if it is not float64, or if its squares may exceed float32's range."""
        sizes = [float(a.abs().max()) for block in self.blocks for a in (block.R, block.B) if a.numel()]
        if self.weights.dtype != torch.float64 or not all(1e-12 < size < 1e12 for size in sizes):
            return None
        blocks = (Block(block.R.float(), block.B.float(), block.t, block.groups) for block in self.blocks)
        return GroupLasso(tuple(blocks), self.weights.float())

    def certificate(self, M: Sequence[Tensor], MR: Sequence[Tensor], lam: float) -> tuple[float, float]:
        """Objective and relative duality gap of M, given ``M R``; for a problem without unpenalised columns."""
        Bs = [block.B for block in self.blocks]
        G = [B - P for B, P in zip(Bs, MR, strict=True)]
        violation = float((self.norms(G) / self.weights).max())
        return self.bounds(_inner(M, Bs), _inner(M, MR), float(self.weights @ self.norms(M)), violation, lam)

    def bounds(
        self, linear: float, quadratic: float, penalty: float, violation: float, lam: float
    ) -> tuple[float, float]:
        """`certificate` from ``Tr(M B^T)``, ``Tr(M R M^T)``, ``sum_g w_g ||M_g||`` and ``max_g ||G_g|| / w_g``."""
        s = min(1.0, lam / violation) if violation > 0 else 1.0
        primal = quadratic / 2 - linear + lam * penalty
        dual = -0.5 * ((1 - s) ** 2 * self.t + 2 * s * (1 - s) * linear + s**2 * quadratic)
        return primal, (primal - dual) / self.scale

    def _value(self, M: Sequence[Tensor], MR: Sequence[Tensor], lam: float) -> float:
        linear = _inner(M, [block.B for block in self.blocks])
        penalty = lam * float(self.weights @ self.norms(M)) if lam else 0.0
        return _inner(M, MR) / 2 - linear + penalty

    @cached_property
    def eliminated(self) -> "Eliminated":
        """The same problem with its unpenalised columns u eliminated, by the Schur complement.

        ``R' = R_pp - R_pu R_uu^+ R_up``, ``B' = B_p - B_u R_uu^+ R_up``, ``t' = t - Tr(B_u R_uu^+ B_u^T)``.
        """
        if all(len(block.unpenalised) == 0 for block in self.blocks):
            return Eliminated(self, tuple, 0.0)
        schur = [_schur(block) for block in self.blocks]
        problem = GroupLasso(tuple(block for block, _, _ in schur), self.weights)

        def complete(coefficients: Sequence[Tensor]) -> Matrices:
            return tuple(back(M) for M, (_, back, _) in zip(coefficients, schur, strict=True))

        return Eliminated(problem, complete, sum(constant for _, _, constant in schur))


@dataclass(frozen=True, eq=False)
class Eliminated:
    """A problem without unpenalised columns, and how to get back to the full one.

    Attributes:
        problem: The reduced problem.
        complete: Its coefficients -> those of the full problem, with the unpenalised columns at their optimum.
        constant: Objective of the reduced problem minus that of the full one.
    """

    problem: GroupLasso
    complete: Callable[[Sequence[Tensor]], Matrices]
    constant: float


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return float(sum((a * b).sum() for a, b in zip(left, right, strict=True)))


def _schur(block: Block) -> tuple[Block, Callable[[Tensor], Tensor], float]:
    p, u = block.penalised, block.unpenalised
    R_pu, B_u = block.R[p][:, u], block.B[:, u]
    T, M_u = _least_squares(block.R[u][:, u], torch.cat([R_pu, B_u])).split(
        [len(p), len(B_u)]
    )  # R_pu R_uu^+, B_u R_uu^+
    explained = float((M_u * B_u).sum())
    R, B = block.R[p][:, p], block.B[:, p]
    remains = R.diagonal() - (T * R_pu).sum(1) > torch.finfo(R.dtype).eps ** (2 / 3) * R.diagonal()
    R = (R - T @ R_pu.T) * remains * remains[:, None]  # columns that u explains up to rounding are zeroed
    t = block.t - explained if explained < (1 - 1e-14) * block.t else 0.0
    reduced = Block((R + R.T) / 2, (B - M_u @ R_pu.T) * remains, t, block.groups[p])

    def back(M_p: Tensor) -> Tensor:
        M = torch.zeros_like(block.B)
        M[:, p] = M_p
        M[:, u] = M_u - M_p @ T
        return M

    return reduced, back, explained / 2


def debias(problem: GroupLasso, support: Tensor, ridge: float = 0.0) -> Matrices:
    """``argmin_M sum_c E||y_c - M_c x_c||^2 + ridge * mean(diag R_c) * ||M_c||_F^2``, M zero off the support.

    This least-squares refit undoes the shrinkage of the lasso. Unpenalised columns are always refitted, and
    never get a ridge. If the kept columns are linearly dependent and ``ridge = 0``, the result is the solution
    of least norm.

    Args:
        problem: The problem, including its unpenalised columns.
        support: True for every group that is kept, (n_groups,) bool.
        ridge: Ridge as a fraction of the mean second moment of the block's columns, >= 0.

    Returns:
        One (h_c, d_c) matrix per block.

    Raises:
        ValueError: If support has the wrong shape or ridge is negative.
    """
    if support.shape != (problem.n_groups,) or support.dtype != torch.bool:
        raise ValueError(f"support must be {problem.n_groups} bools, got {support.dtype} {tuple(support.shape)}")
    if not ridge >= 0:
        raise ValueError(f"ridge must be >= 0, got {ridge}")
    reduced = problem.eliminated.problem
    coefficients = reduced.zeros()
    for M, block in zip(coefficients, reduced.blocks, strict=True):
        kept = support[block.groups].nonzero()[:, 0]
        R = block.R[kept][:, kept]
        R.diagonal().add_(ridge * block.R.diagonal().mean())
        M[:, kept] = _least_squares(R, block.B[:, kept])
    return problem.eliminated.complete(coefficients)
