"""Channel groups: what can leave a model together, read off the ownership of its activations."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune.graph.owners import Owners, Slot, collapse_axes
from lnr_prune.graph.rules import Propagation, propagate
from lnr_prune.graph.trace import trace


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer ``y = W x`` that reads a group's channels.

    Attributes:
        name: Name of the layer, such as "features.3".
        weight: Name of its weight.
        bias: Name of its bias; None if it has none, or if the bias is to stay as it is.
        op: "linear", "conv2d", ...
        channels: Channel that each index of the weight's input dimension reads, -1 = not of this group.
    """

    name: str
    weight: str
    bias: str | None
    op: str
    channels: Tensor


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that one or more producers make and one or more consumers read.

    Attributes:
        name: Name of the first producer.
        size: Number of channels.
        producers: Names of the layers whose rows (filters) are the channels.
        consumers: The layers that read them.
        slots: (parameter, dimension) -> channel of every index, -1 = stays: all that shrinks.
    """

    name: str
    size: int
    producers: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    slots: Mapping[Slot, Tensor]


@dataclass(frozen=True, eq=False)
class Graph:
    """The channel groups of a model.

    Attributes:
        groups: What can be pruned, in order of execution.
        frozen: Name of a layer whose outputs cannot -> why.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: Mapping[str, str]


def find_groups(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Graph:
    """The channel groups of ``model(*args, **kwargs)``; the model is traced, not run.

    Raises:
        GraphError: If the model cannot be traced.
    """
    state = propagate(trace(model, args, kwargs))
    owners = state.owners
    label = _components(owners)
    reasons = _frozen_reasons(owners, label)
    units: dict[int, dict[Slot, list[int]]] = defaultdict(lambda: defaultdict(list))
    for slot, ids in owners.slots.items():
        for index, unit in enumerate(label[ids].tolist()):
            if unit not in reasons:
                units[unit][slot].append(index)
    members: dict[frozenset[Slot], list[int]] = defaultdict(list)
    for unit, slots in units.items():
        members[frozenset(slots)].append(unit)
    groups = [
        group
        for shared, of_group in members.items()
        if (group := _read_group(state, shared, [units[unit] for unit in of_group])) is not None
    ]
    order = {site.weight: position for position, site in reversed(list(enumerate(state.sites)))}
    groups.sort(key=lambda group: min(order[consumer.weight] for consumer in group.consumers))
    return Graph(tuple(groups), _explain(state, groups, label, reasons))


def layer_name(parameter: str) -> str:
    """Name of the layer that a weight belongs to; a raw parameter keeps its own name."""
    return parameter.removesuffix(".weight")


def _read_group(state: Propagation, shared: frozenset[Slot], units: list[dict[Slot, list[int]]]) -> ChannelGroup | None:
    """The group whose units share these slots; None if nobody produces it, reads it, or it is one channel."""
    sites = {site.columns: site for site in state.sites if site.columns in shared}
    producers = dict.fromkeys(layer_name(site.weight) for site in state.sites if site.rows in shared)
    if not sites or not producers or len(units) < 2:
        return None
    slots: dict[Slot, Tensor] = {}
    for slot in sorted(shared):
        channels = torch.full_like(state.owners.slots[slot], -1)
        for channel, unit in enumerate(units):
            channels[unit[slot]] = channel
        slots[slot] = channels
    consumers = tuple(
        Consumer(layer_name(site.weight), site.weight, site.bias, site.op, slots[columns])
        for columns, site in sites.items()
    )
    return ChannelGroup(next(iter(producers)), len(units), tuple(producers), consumers, slots)


def _components(owners: Owners) -> Tensor:
    """Smallest id that each id is coupled to, (count,): equal labels are one unit."""
    label = torch.arange(owners.count)
    edges = torch.cat(owners.couplings, 1) if owners.couplings else torch.empty(2, 0, dtype=torch.long)
    while True:
        ends = label[edges]
        least = ends.amin(0)
        new = label.scatter_reduce(0, ends[0], least, "amin").scatter_reduce(0, ends[1], least, "amin")
        new = new[new]  # pointer jumping: long chains take few rounds
        if torch.equal(new, label):
            return label
        label = new


def _frozen_reasons(owners: Owners, label: Tensor) -> dict[int, str]:
    """Unit -> why it stays."""
    reasons: dict[int, str] = {}
    for ids, reason in owners.frozen:
        for unit in torch.unique(label[ids]).tolist():
            reasons.setdefault(unit, reason)
    for grid in owners.grids:
        for unit in _not_slabs(collapse_axes(label[grid])):
            reasons.setdefault(unit, "would leave a ragged tensor")
    return reasons


def _not_slabs(grid: Tensor) -> list[int]:
    """Units that do not fill whole slices of the grid along some axis: without them it is no rectangle."""
    if sum(size > 1 for size in grid.shape) < 2:
        return []
    units, index = torch.unique(grid, return_inverse=True)
    count = torch.bincount(index.reshape(-1), minlength=len(units))
    slab = torch.zeros(len(units), dtype=torch.bool)
    for axis, size in enumerate(grid.shape):
        if size > 1:
            touched = torch.zeros(len(units), size, dtype=torch.bool)
            touched[index.movedim(axis, 0).reshape(size, -1), torch.arange(size)[:, None]] = True
            slab |= touched.sum(1) * (grid.numel() // size) == count
    return [int(unit) for unit in units[~slab].tolist() if unit != 0]


def _explain(
    state: Propagation, groups: list[ChannelGroup], label: Tensor, reasons: Mapping[int, str]
) -> dict[str, str]:
    """Layer -> why its outputs are in no group."""
    found = {producer for group in groups for producer in group.producers}
    why: dict[str, str] = {}
    for site in state.sites:
        name = layer_name(site.weight)
        if name not in found:
            units = label[state.owners.slots[site.rows]].tolist()
            why[name] = next(
                (reasons[unit] for unit in units if unit in reasons),
                "its channels can only leave together" if len(units) > 1 else "has a single channel",
            )
    return why
