"""Closure: joins coupled ids until what leaves together fills whole slabs of every activation."""

import math

import torch
from torch import Tensor

from lnr_prune.graph.owners import Cut, Owners, along, collapse_axes, components, varying_axes


def close(owners: Owners) -> Tensor:
    """Unit of each id, (count,): coupled ids are joined until every unit fills whole slabs of every activation.

    If the owners of an activation vary on several axes, removing a unit that is not a whole slab along one
    of them would make the tensor ragged. Such a unit joins the others in the smallest slab that contains it.
    Attention heads and channel-shuffle pairs are found in this way.
    """
    for name, dim in owners.slots:
        if name in owners.elements:  # used both as a weight and as a value
            elements = owners.elements[name]
            owners.couple(elements, along(owners.slots[name, dim], dim, elements.shape), f"{name}, weight and value")
    label = torch.arange(owners.count)
    edges = owners.coupled
    grids, cuts = [*owners.grids, *owners.elements.values()], list(owners.cuts)
    while True:
        label = components(label, edges)
        joined = [pairs for grid in grids for pairs in _ragged(collapse_axes(label[grid]))]
        if not joined:
            uneven = [cut for cut in cuts if not _in_proportion(label[cut.ids], cut)]
            cuts = [cut for cut in cuts if cut not in uneven]
            joined = [label[pairs] for cut in uneven for pairs in _alike(owners, cut)]
        if not joined:
            return label
        edges = torch.cat(joined, 1)


def _in_proportion(grid: Tensor, cut: Cut) -> bool:
    """Whether every unit owns the same share of every part."""
    units, index = torch.unique(grid.movedim(cut.axis, 0).reshape(cut.ends[-1], -1), return_inverse=True)
    sizes = torch.tensor(cut.ends).diff(prepend=torch.zeros(1, dtype=torch.long))
    part = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[:, None]
    count = torch.bincount((index * len(sizes) + part).flatten(), minlength=len(units) * len(sizes))
    count = count.view(len(units), len(sizes))
    return bool((count * sizes[0] == count[:, :1] * sizes).all())


def _alike(owners: Owners, cut: Cut) -> list[Tensor]:
    """Couples position i of every piece of an axis; the pieces are the largest equal ones that make up all parts."""
    before = len(owners.couplings)
    pieces = cut.ids.unflatten(cut.axis, (-1, math.gcd(*cut.ends)))
    owners.mix(pieces, [cut.axis], cut.reason)
    return owners.couplings[before:]


def _ragged(grid: Tensor) -> list[Tensor]:
    """Pairs of units to join, (2, n) each, so that every unit is at least a whole slab of the grid."""
    axes = varying_axes(grid)
    if len(axes) < 2:
        return []
    units, index = torch.unique(grid, return_inverse=True)
    count = torch.bincount(index.reshape(-1), minlength=len(units))
    touched, sizes = [], []
    for axis in axes:
        size = grid.shape[axis]
        on_axis = torch.zeros(len(units), size, dtype=torch.bool)
        on_axis[index.movedim(axis, 0).reshape(size, -1), torch.arange(size)[:, None]] = True
        touched.append(on_axis)
        sizes.append(on_axis.sum(1) * (grid.numel() // size))
    smallest = torch.stack(sizes).min(0)
    ragged = (smallest.values != count) & (units != 0)
    joined = []
    for k, axis in enumerate(axes):  # everything in a slab that a ragged unit touches leaves together
        slabs = touched[k][ragged & (smallest.indices == k)].any(0).nonzero()[:, 0]
        if len(slabs):
            members = grid.index_select(axis, slabs).movedim(axis, 0).flatten(1)
            joined.append(torch.stack([members, members[:, :1].expand_as(members)]).flatten(1))
    return joined
