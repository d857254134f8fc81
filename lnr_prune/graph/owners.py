"""Owner ids: who produced each element of each activation.

An owner is one index of one dimension of one parameter ("row 7 of fc1.weight"). The owners of an
activation are an int64 tensor of its shape, collapsed to size 1 along the axes on which they do not
vary; 0 is nobody. Owners that must leave together are *coupled*; owners that cannot leave are *frozen*.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Slot = tuple[str, int]
"""One dimension of one parameter."""


@dataclass(eq=False)
class Owners:
    """The owner ids given out so far, and what is known about them."""

    tensors: Mapping[str, Tensor]
    count: int = 1
    slots: dict[Slot, Tensor] = field(default_factory=dict)
    couplings: list[Tensor] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    grids: list[Tensor] = field(default_factory=list)

    def slot(self, name: str, dim: int) -> Tensor:
        """The ids of a parameter's dimension, (size,)."""
        if (name, dim) not in self.slots:
            size = self.tensors[name].shape[dim]
            self.slots[name, dim] = torch.arange(self.count, self.count + size)
            self.count += size
        return self.slots[name, dim]

    def couple(self, a: Tensor, b: Tensor, reason: str) -> None:
        """What meets leaves together; what meets nobody stays."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        pairs = torch.stack([a.expand(shape).reshape(-1), b.expand(shape).reshape(-1)])
        pairs = torch.unique(pairs[:, pairs[0] != pairs[1]], dim=1)
        orphaned = (pairs == 0).any(0)
        self.freeze(pairs[:, orphaned], reason)
        if bool((~orphaned).any()):
            self.couplings.append(pairs[:, ~orphaned])

    def couple_axis(self, ids: Tensor, axis: int, slot: Tensor, reason: str) -> None:
        """Couples position i along an axis with ``slot[i]``."""
        shape = [1] * ids.dim()
        shape[axis] = len(slot)
        self.couple(ids, slot.view(shape), reason)

    def mix(self, ids: Tensor, axes: Iterable[int], reason: str) -> Tensor:
        """Everything along the axes can only leave together; the ids no longer vary on them."""
        for axis in axes:
            if ids.shape[axis] > 1:
                first = ids.narrow(axis, 0, 1)
                self.couple(ids, first, reason)
                ids = first
        return ids

    def freeze(self, ids: Tensor, reason: str) -> None:
        """These owners stay, and whatever is coupled to them."""
        ids = torch.unique(ids)
        ids = ids[ids != 0]
        if len(ids):
            self.frozen.append((ids, reason))

    def freeze_parameter(self, name: str, reason: str) -> None:
        """No dimension of this parameter may shrink."""
        for dim in range(self.tensors[name].dim()):
            self.freeze(self.slot(name, dim), reason)


def nobody(shape: Sequence[int]) -> Tensor:
    """The ids of an activation that nobody owns."""
    return torch.zeros([1] * len(shape), dtype=torch.long)


def along(slot: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """The ids of an activation of this shape, produced along one axis by a slot."""
    view = [1] * len(shape)
    view[axis] = len(slot)
    return slot.view(view)


def collapse_axes(ids: Tensor) -> Tensor:
    """Drops the axes on which the ids do not vary to size 1."""
    for axis in range(ids.dim()):
        first = ids.narrow(axis, 0, 1)
        if ids.shape[axis] > 1 and bool((ids == first).all()):
            ids = first
    return ids.clone()
