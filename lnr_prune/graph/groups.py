"""Channel groups: what can leave a model together, read off the ownership of its activations."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune.errors import GraphError
from lnr_prune.graph import contractions, moves  # noqa: F401  (they register their rules)
from lnr_prune.graph.owners import Cut, Owners, Slot, along, collapse_axes, varying_axes
from lnr_prune.graph.rules import Propagation, logger, propagate
from lnr_prune.graph.trace import trace


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer ``y = W x`` that reads a group's channels.

    Attributes:
        name: Name of the layer, such as "features.3".
        weight: Name of its weight.
        bias: Name of its bias; None if it has none, or if the bias is to stay as it is.
        op: "linear", "conv2d", "conv_transpose2d", ...
        channels: Channel that each index of the weight's input dimension reads, -1 = not of this group.
        dim: That dimension: 1, or 0 where the weight is stored the other way round.
        blocks: Whether a channel is several rows of its producers (an attention head), not one.
    """

    name: str
    weight: str
    bias: str | None
    op: str
    channels: Tensor
    dim: int = 1
    blocks: bool = False


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that one or more producers make and one or more consumers read.

    Attributes:
        name: Name of the first producer.
        size: Number of channels.
        producers: Names of the layers whose rows (filters) are the channels.
        consumers: The layers that read them.
        slots: (parameter, dimension) -> channel of every index, -1 = stays: all that shrinks.
        rows: Those among the slots that produce: the dimensions of outputs of the producers' weights.
    """

    name: str
    size: int
    producers: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    slots: Mapping[Slot, Tensor]
    rows: tuple[Slot, ...]


@dataclass(frozen=True, eq=False)
class Graph:
    """The channel groups of a model.

    Attributes:
        groups: What can be pruned, in order of execution.
        frozen: Name of a layer whose outputs cannot -> why.
        macs: Name of a weight -> multiply-accumulates that it takes part in, in the traced call.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: Mapping[str, str]
    macs: Mapping[str, int]


def find_groups(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Graph:
    """The channel groups of ``model(*args, **kwargs)``; the model is traced, not run.

    Raises:
        GraphError: If the model cannot be traced.
    """
    state = propagate(trace(model, args, kwargs))
    if any(
        isinstance(state.trace.tensors[name], nn.Parameter)
        for node, name in state.trace.names.items()
        if not node.users
    ):
        _add_training(state, model, args, kwargs)
    for site in state.sites:
        if site.columns in state.owners.produced:
            state.owners.freeze(state.owners.slots[site.columns], "its weight also produces the channels that it reads")
    label = _close(state.owners)
    reasons = _frozen_reasons(state.owners, label)
    labelled = _labelled_slots(state.owners, label)
    slots: dict[int, set[Slot]] = defaultdict(set)
    for slot, labels in labelled.items():
        for unit in torch.unique(labels).tolist():
            if unit not in reasons:
                slots[unit].add(slot)
    members: dict[frozenset[Slot], list[int]] = defaultdict(list)
    for unit in slots:
        members[frozenset(slots[unit])].append(unit)
    channel = torch.full_like(label, -1)
    groups = []
    for shared, units in members.items():
        channel[units] = torch.arange(len(units))
        group = _read_group(state, {slot: channel[labelled[slot]] for slot in sorted(shared)}, len(units))
        groups += [group] if group else []
        channel[units] = -1
    order = {site.weight: position for position, site in reversed(list(enumerate(state.sites)))}
    groups.sort(key=lambda group: min(order[consumer.weight] for consumer in group.consumers))
    return Graph(tuple(groups), _explain(state, groups, label, reasons), state.macs)


def _add_training(state: Propagation, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Lets heads that only run in training read the same channels: they shrink too, but cannot be refitted."""
    try:
        training = trace(model, args, kwargs, training=True)
    except GraphError:
        logger.warning("parameters that are not used in evaluation were not followed: no trace in training mode")
        return
    propagate(training, state.owners)


def layer_name(parameter: str) -> str:
    """Name of the layer that a weight belongs to; a raw parameter keeps its own name."""
    return parameter.removesuffix(".weight")


def _read_group(state: Propagation, slots: dict[Slot, Tensor], size: int) -> ChannelGroup | None:
    """The group whose units share these slots; None if nobody produces it, reads it, or it is one channel."""
    sites = {site.columns: site for site in state.sites if site.columns in slots}
    rows = tuple(slot for slot in state.owners.produced if slot in slots)
    if not sites or not rows or size < 2:
        return None
    producers = tuple(layer_name(name) for name, _ in rows)
    blocks = any(int(torch.bincount(slots[row][slots[row] >= 0]).max()) > 1 for row in rows)
    consumers = tuple(
        Consumer(layer_name(site.weight), site.weight, site.bias, site.op, slots[columns], columns[1], blocks)
        for columns, site in sites.items()
    )
    return ChannelGroup(producers[0], size, producers, consumers, slots, rows)


def _close(owners: Owners) -> Tensor:
    """Unit of each id, (count,): ids that are coupled, until every unit fills whole slabs of every activation.

    Where the owners of an activation vary on several axes, a unit that is not a whole slab along one of
    them would leave a ragged tensor: it joins the others in the smallest slab that holds it. Attention
    heads and channel-shuffle pairs come out of this.
    """
    for name, dim in owners.slots:
        if name in owners.elements:  # used both as a weight and as a value
            elements = owners.elements[name]
            owners.couple(elements, along(owners.slots[name, dim], dim, elements.shape), f"{name}, weight and value")
    label = torch.arange(owners.count)
    edges = torch.cat(owners.couplings, 1) if owners.couplings else torch.empty(2, 0, dtype=torch.long)
    grids, cuts = [*owners.grids, *owners.elements.values()], list(owners.cuts)
    while True:
        label = _components(label, edges)
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
    """Couples position i of every piece of an axis, the largest pieces that all parts consist of."""
    before = len(owners.couplings)
    pieces = cut.ids.unflatten(cut.axis, (-1, math.gcd(*cut.ends)))
    owners.mix(pieces, [cut.axis], cut.reason)
    return owners.couplings[before:]


def _components(label: Tensor, edges: Tensor) -> Tensor:
    """Smallest label that each label is connected to."""
    while True:
        ends = label[edges]
        least = ends.amin(0)
        new = label.scatter_reduce(0, ends[0], least, "amin").scatter_reduce(0, ends[1], least, "amin")
        new = new[new]  # pointer jumping: long chains take few rounds
        if torch.equal(new, label):
            return label
        label = new


def _ragged(grid: Tensor) -> list[Tensor]:
    """Pairs of units to join, (2, n) each, so that no unit is less than a whole slab of the grid."""
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


def _frozen_reasons(owners: Owners, label: Tensor) -> dict[int, str]:
    """Unit -> why it stays."""
    reasons = {int(label[0]): "shares an activation with channels of no known owner"}
    for ids, reason in owners.frozen:
        for unit in torch.unique(label[ids]).tolist():
            reasons.setdefault(unit, reason)
    return reasons


def _labelled_slots(owners: Owners, label: Tensor) -> dict[Slot, Tensor]:
    """Unit of every index of every dimension of every parameter that ownership has reached."""
    labelled = {slot: label[ids] for slot, ids in owners.slots.items()}
    for name, ids in owners.elements.items():
        grid = collapse_axes(label[ids])
        axes = varying_axes(grid)
        if len(axes) == 1:  # closure made the units slabs; those of one axis can be told
            labelled.setdefault((name, axes[0]), grid.reshape(-1))
    return labelled


def _explain(
    state: Propagation, groups: list[ChannelGroup], label: Tensor, reasons: Mapping[int, str]
) -> dict[str, str]:
    """Layer -> why its outputs, or all of its weight, are in no group."""
    owners, found = state.owners, {producer for group in groups for producer in group.producers}
    mixed: dict[int, str] = {}
    for ids, reason in owners.mixed:
        for unit in torch.unique(label[ids]).tolist():
            mixed.setdefault(unit, f"its channels can only leave together: mixed by {reason}")

    def stated(ids: Tensor, otherwise: str) -> str:
        units = torch.unique(label[ids]).tolist()
        return next((said[unit] for said in (mixed, reasons) for unit in units if unit in said), otherwise)

    why: dict[str, str] = {}
    for (weight, _), ids in owners.produced.items():
        if layer_name(weight) not in found:
            why[layer_name(weight)] = stated(ids, "no layer that could be refitted reads its channels")
    shrink = {name for group in groups for name, _ in group.slots}
    for name, tensor in state.trace.tensors.items():
        if isinstance(tensor, nn.Parameter) and tensor.dim() > 1 and name not in shrink:
            known = [owners.slots[name, dim] for dim in range(tensor.dim()) if (name, dim) in owners.slots]
            known += [owners.elements[name].reshape(-1)] if name in owners.elements else []
            reason = stated(torch.cat(known), "shares its channels with a layer that stays") if known else "not used"
            why.setdefault(layer_name(name), owners.untouched.get(name, reason))
    return why
