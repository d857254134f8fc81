"""The proximal operator of the group-lasso penalty: block soft-thresholding."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

Matrices = tuple[Tensor, ...]
"""One coefficient matrix for each consumer; a group's columns may lie in several of them."""


def group_norms(matrices: Sequence[Tensor], groups: Sequence[Tensor], n_groups: int) -> Tensor:
    """``(sum_c ||M_c[:, g]||_F^2)^(1/2)`` of every group ``g``; columns of group -1 are ignored.

    Args:
        matrices: One (h_c, d_c) matrix per consumer.
        groups: For each matrix, the group of every column, (d_c,) int64, -1 = in no group.
        n_groups: Number of groups.

    Returns:
        (n_groups,) norms, in the matrices' dtype.
    """
    squares = matrices[0].new_zeros(n_groups + 1)
    for matrix, group in zip(matrices, groups, strict=True):
        squares.index_add_(0, group.where(group >= 0, n_groups), matrix.square().sum(0))
    return squares[:n_groups].sqrt()


def members(group: Tensor, n_groups: int) -> Tensor:
    """Columns of every group, (n_groups, width), padded with ``len(group)``."""
    order = group.argsort(stable=True)
    sizes = torch.bincount(group, minlength=n_groups)
    slot = torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group[order]]
    columns = torch.full((n_groups, max(1, int(sizes.max()))), len(group), device=group.device)
    columns[group[order], slot] = order
    return columns


@overload
def prox_group_lasso(matrices: Tensor, threshold: float | Tensor, groups: Tensor | None = None) -> Tensor: ...


@overload
def prox_group_lasso(matrices: Sequence[Tensor], threshold: float | Tensor, groups: Sequence[Tensor]) -> Matrices: ...


def prox_group_lasso(
    matrices: Tensor | Sequence[Tensor],
    threshold: float | Tensor,
    groups: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | Matrices:
    """``argmin_U  sum_g t_g ||U_g||_F + 1/2 ||U - M||_F^2``, in closed form.

    Every group is scaled by ``max(0, 1 - t_g / ||M_g||)``: groups whose norm is at most ``t_g``
    become exactly zero. Columns of group -1 are not penalised and stay as they are.

    Args:
        matrices: The point M, (h, d); or one matrix for each consumer, with shared groups.
        threshold: t >= 0, one number or one for each group, (n_groups,).
        groups: Group of every column, (d,) int64, -1 = unpenalised; one tensor per matrix if
            several are given. Default: every column is its own group.

    Returns:
        The proximal point, in the form of ``matrices``.

    Raises:
        ValueError: If a threshold is negative or NaN, or the groups do not fit the columns.

    References:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.5.4.

    Example:
        >>> prox_group_lasso(torch.tensor([[3.0, 0.6], [4.0, 0.8]]), 1.0)
        tensor([[2.4000, 0.0000],
                [3.2000, 0.0000]])
    """
    if isinstance(matrices, Tensor):
        columns = torch.arange(matrices.shape[1], device=matrices.device) if groups is None else groups
        if not isinstance(columns, Tensor):
            raise ValueError("groups must be one tensor when one matrix is given")
        return prox_group_lasso((matrices,), threshold, (columns,))[0]
    if groups is None or isinstance(groups, Tensor):
        raise ValueError("groups must hold one tensor for each matrix")
    for matrix, group in zip(matrices, groups, strict=True):
        if group.shape != matrix.shape[1:]:
            raise ValueError(
                f"groups has shape {tuple(group.shape)}, expected one entry for each of the {matrix.shape[1]} columns"
            )
    t = torch.as_tensor(threshold, dtype=matrices[0].dtype, device=matrices[0].device)
    if not bool((t >= 0).all()):
        raise ValueError(f"threshold must be >= 0, got {threshold}")
    named = 1 + max(int(group.max()) if len(group) else -1 for group in groups)
    n_groups = len(t) if t.dim() else named
    if named > n_groups or any(bool((group < -1).any()) for group in groups):
        raise ValueError(f"groups must lie between -1 and {n_groups - 1}, one threshold each, got up to {named - 1}")
    return shrink(matrices, t, groups, n_groups)


def shrink(matrices: Sequence[Tensor], threshold: Tensor, groups: Sequence[Tensor], n_groups: int) -> Matrices:
    """`prox_group_lasso` without the checks, for the solvers' inner loops."""
    norms = group_norms(matrices, groups, n_groups)
    scale = (1 - threshold / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)
    scale = torch.cat([scale, scale.new_ones(1)])  # group -1, the last entry, is not shrunk
    return tuple(matrix * scale[group] for matrix, group in zip(matrices, groups, strict=True))
