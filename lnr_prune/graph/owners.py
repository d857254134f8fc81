"""Owner ids: who produced each element of each activation.

An owner is one index of one dimension of one parameter ("row 7 of fc1.weight"), or one element of a
parameter that is used as a value (a position embedding). The owners of an activation are an int64 tensor
of its shape, collapsed to size 1 along the axes on which they do not vary; 0 is nobody. Owners that must
leave together are *coupled*; owners that cannot leave are *frozen*.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Slot = tuple[str, int]
"""One dimension of one parameter."""


@dataclass(frozen=True, eq=False)
class Cut:
    """Where an operation cuts an axis into parts.

    After channels have left, the forward may cut at the same fractions of the axis. So every unit must shrink
    all parts in proportion. If one does not, the equal pieces that make up the parts must shrink alike.

    Attributes:
        ids: Owners of what is cut.
        axis: The axis.
        ends: Ends of the parts, ascending; the last is the size of the axis.
        reason: The operation.
    """

    ids: Tensor
    axis: int
    ends: tuple[int, ...]
    reason: str


@dataclass(eq=False)
class Owners:
    """The owner ids given out so far, and what is known about them."""

    tensors: Mapping[str, Tensor]
    count: int = 1
    slots: dict[Slot, Tensor] = field(default_factory=dict)
    elements: dict[str, Tensor] = field(default_factory=dict)
    couplings: list[Tensor] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    mixed: list[tuple[Tensor, str]] = field(default_factory=list)
    numbered: list[tuple[Tensor, str]] = field(default_factory=list)  # what is chosen by its number
    grids: list[Tensor] = field(default_factory=list)
    produced: dict[Slot, Tensor] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    by_row: set[str] = field(default_factory=set)  # parameters that a layer's weight is computed from
    untouched: dict[str, str] = field(default_factory=dict)  # parameters that stay whole -> why

    def slot(self, name: str, dim: int) -> Tensor:
        """The ids of a parameter's dimension, (size,)."""
        if (name, dim) not in self.slots:
            self.slots[name, dim] = self._new(self.tensors[name].shape[dim])
        return self.slots[name, dim]

    def value(self, name: str) -> Tensor:
        """The ids of a parameter that is used as a value: its slot's if just one axis has size > 1, else new ones."""
        shape = self.tensors[name].shape
        if name in self.by_row:  # what is computed from it may mix all columns
            reason = "a layer's weight is computed from it: fold the weight into a plain parameter to prune its inputs"
            for dim in range(1, len(shape)):
                self.freeze(self.slot(name, dim), reason)
            self.untouched.setdefault(name, reason)
            return along(self.slot(name, 0), 0, shape)
        varying = [axis for axis, size in enumerate(shape) if size > 1]
        if len(varying) == 1:
            return along(self.slot(name, varying[0]), varying[0], shape)
        if name not in self.elements:
            self.elements[name] = self._new(shape.numel()).view(shape)
        return self.elements[name]

    def rows(self, name: str, dim: int) -> Tensor:
        """The ids of a weight's output dimension: channels that the weight produces."""
        self.produced[name, dim] = self.slot(name, dim)
        return self.produced[name, dim]

    def is_produced(self, ids: Tensor) -> bool:
        """Whether a weight produces some of these channels; other parameters are only coupled to channels."""
        largest = int(ids.max())
        return any(int(rows[0]) <= largest <= int(rows[-1]) for rows in self.produced.values() if len(rows))

    def couple(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Ids that meet each other leave together; ids that meet nobody stay."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        key = a.expand(shape) * 2**32 + b.expand(shape)  # one number per pair: unique() is fast on these
        key = torch.unique(key[a.expand(shape) != b.expand(shape)])
        if len(key):
            pairs = torch.stack([key // 2**32, key % 2**32])
            orphaned = (pairs == 0).any(0)
            self.freeze(pairs[:, orphaned], f"meets a value that belongs to no known channel in {reason}")
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
                self.mixed.append((first, reason))
                ids = first
        return ids

    def freeze(self, ids: Tensor, reason: str) -> None:
        """These owners stay, and so does whatever is coupled to them."""
        ids = torch.unique(ids)
        ids = ids[ids != 0]
        if len(ids):
            self.frozen.append((ids, reason))

    def freeze_parameter(self, name: str, reason: str) -> None:
        """No dimension of this parameter may shrink."""
        self.untouched.setdefault(name, reason)
        for dim in range(self.tensors[name].dim()):
            self.freeze(self.slot(name, dim), reason)
        if name in self.elements:
            self.freeze(self.elements[name], reason)

    @property
    def coupled(self) -> Tensor:
        """All pairs of ids that leave together, (2, n)."""
        return torch.cat(self.couplings, 1) if self.couplings else torch.empty(2, 0, dtype=torch.long)

    def all_stay(self, ids: Tensor) -> bool:
        """Whether none of these owners can leave: each is frozen, or has all indices of a parameter's dimension."""
        label = components(torch.arange(self.count), self.coupled)
        stay = {0, *(unit for frozen, _ in self.frozen for unit in label[frozen].tolist())}
        stay |= {
            int(label[slot[0]]) for slot in self.slots.values() if len(slot) > 1 and len(label[slot].unique()) == 1
        }
        return stay.issuperset(label[ids].unique().tolist())

    def _new(self, size: int) -> Tensor:
        self.count += size
        return torch.arange(self.count - size, self.count)


def nobody(shape: Sequence[int]) -> Tensor:
    """The ids of an activation that nobody owns."""
    return torch.zeros([1] * len(shape), dtype=torch.long)


def along(slot: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """The ids of an activation of this shape, produced along one axis by a slot."""
    view = [1] * len(shape)
    view[axis] = len(slot)
    return slot.view(view)


def collapse_axes(ids: Tensor) -> Tensor:
    """Reduces every axis on which the ids do not vary to size 1."""
    for axis in range(ids.dim()):
        first = ids.narrow(axis, 0, 1)
        if ids.shape[axis] > 1 and (ids.stride(axis) == 0 or bool((ids == first).all())):
            ids = first
    return ids.clone()


def varying_axes(ids: Tensor) -> list[int]:
    """Axes on which the ids vary."""
    return [axis for axis, size in enumerate(ids.shape) if size > 1]


def components(label: Tensor, edges: Tensor) -> Tensor:
    """Smallest label that each label is connected to."""
    while True:
        ends = label[edges]
        least = ends.amin(0)
        new = label.scatter_reduce(0, ends[0], least, "amin").scatter_reduce(0, ends[1], least, "amin")
        new = new[new]  # pointer jumping: long chains take few rounds
        if torch.equal(new, label):
            return label
        label = new
