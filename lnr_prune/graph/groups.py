"""Channel groups: what can leave a model together, read off the ownership of its activations."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune.errors import GraphError
from lnr_prune.graph import contractions, moves  # noqa: F401  (they register their rules)
from lnr_prune.graph.flow import data_flow
from lnr_prune.graph.owners import Owners, Slot, collapse_axes, varying_axes
from lnr_prune.graph.rules import Propagation, Site, logger, propagate
from lnr_prune.graph.sizes import HeldInt, held_ints
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
        training: Layers that read the channels in training mode only, such as an auxiliary head's; where
            nobody else reads them, ``consumers`` is empty.
        held: The ints in the model's forward that count the channels.
        attributes: (submodule, attribute) -> value in the whole model, and what it loses with each channel,
            (size,): those among the submodules' attributes that change when channels leave, see `shrinkable`.
    """

    name: str
    size: int
    producers: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    slots: Mapping[Slot, Tensor]
    rows: tuple[Slot, ...]
    training: tuple[Consumer, ...] = ()
    held: tuple[HeldInt, ...] = ()
    attributes: Mapping[tuple[str, str], tuple[int, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Graph:
    """The channel groups of a model.

    Attributes:
        groups: What can be pruned, in order of execution.
        frozen: Name of a layer whose outputs cannot -> why.
        macs: Name of a weight -> multiply-accumulates that it takes part in, in the traced call.
        layers: Every linear map of which no more than its input may change, in order of execution; each index
            of its inputs counts as a channel.
        repeated: Names of weights that are applied more than once in a forward pass.
        flow: Pairs of layers: what the first computes goes into the second, see `data_flow`.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: Mapping[str, str]
    macs: Mapping[str, int]
    layers: tuple[Consumer, ...] = ()
    repeated: frozenset[str] = frozenset()
    flow: tuple[tuple[str, str], ...] = ()


def find_groups(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Graph:
    """The channel groups of ``model(*args, **kwargs)``; the model is traced, not run.

    Raises:
        GraphError: If the model cannot be traced.
    """
    state, training = propagate(trace(model, args, kwargs)), None
    if any(
        isinstance(state.trace.tensors[name], nn.Parameter)
        for node, name in state.trace.names.items()
        if not node.users
    ):
        training = _in_training(state, model, args, kwargs)
    state.sites = [_with_own_bias(state, site) for site in state.sites]
    sites = (*state.sites, *(training.sites if training else ()))
    for site in sites:
        if site.columns in state.owners.produced:
            state.owners.freeze(state.owners.slots[site.columns], "its weight also produces the channels that it reads")
    label = close(state.owners)
    reasons = _frozen_reasons(state.owners, label)
    units: dict[int, dict[Slot, list[int]]] = defaultdict(lambda: defaultdict(list))
    for slot, labels in _labelled_slots(state.owners, label).items():
        for index, unit in enumerate(labels.tolist()):
            if unit not in reasons:
                units[unit][slot].append(index)
    members: dict[frozenset[Slot], list[int]] = defaultdict(list)
    for unit, slots in units.items():
        members[frozenset(slots)].append(unit)
    groups = [
        group
        for shared, of_group in members.items()
        if (group := _read_group(state, sites, shared, [units[unit] for unit in of_group])) is not None
    ]
    order = {site.weight: position for position, site in reversed(list(enumerate(sites)))}
    groups.sort(key=lambda group: min(order[consumer.weight] for consumer in group.consumers or group.training))
    traces = (state, training) if training else (state,)
    held = held_ints(traces, label, {group.name: group.slots for group in groups})
    groups = [replace(group, held=held[group.name]) for group in groups]
    frozen = _explain(state, groups, label, reasons)
    flow = tuple((layer_name(a), layer_name(b)) for a, b in data_flow(traces))
    return Graph(tuple(groups), frozen, state.macs, *_linear_maps(state), flow)


def _in_training(
    state: Propagation, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Propagation | None:
    """Lets heads that only run in training read the same channels: they shrink too, but cannot be refitted."""
    try:
        training = trace(model, args, kwargs, training=True)
    except GraphError:
        logger.warning("parameters that are not used in evaluation were not followed: no trace in training mode")
        return None
    return propagate(training, state.owners)


def _with_own_bias(state: Propagation, site: Site) -> Site:
    """A bias that is used elsewhere too must stay as it is."""
    if site.bias is None:
        return site
    own = sum((site.weight, site.bias) == (other.weight, other.bias) for other in state.sites)
    return site if own == _uses(state, site.bias) else replace(site, bias=None)


def _linear_maps(state: Propagation) -> tuple[tuple[Consumer, ...], frozenset[str]]:
    """The layers whose weight nothing else uses, and the names of those that are applied more than once."""
    sites = {site.weight: site for site in state.sites}
    times = Counter(site.weight for site in state.sites)
    layers = []
    for name, site in sites.items():
        if _uses(state, name) == times[name]:
            dim = site.columns[1]
            channels = torch.arange(state.trace.tensors[name].shape[dim])
            layers.append(Consumer(layer_name(name), name, site.bias, site.op, channels, dim))
    return tuple(layers), frozenset(name for name, count in times.items() if count > 1)


def _uses(state: Propagation, name: str) -> int:
    return sum(len(node.users) for node, other in state.trace.names.items() if other == name)


def layer_name(parameter: str) -> str:
    """Name of the layer that a weight belongs to; a raw parameter keeps its own name."""
    return parameter.removesuffix(".weight")


def _read_group(
    state: Propagation, sites: tuple[Site, ...], shared: frozenset[Slot], units: list[dict[Slot, list[int]]]
) -> ChannelGroup | None:
    """The group whose units share these slots; None if nobody produces it, reads it, or it is one channel."""
    reading = {site.columns: site for site in sites if site.columns in shared}
    evaluated = {site.columns for site in state.sites}
    rows = tuple(slot for slot in state.owners.produced if slot in shared)
    if not reading or not rows or len(units) < 2:
        return None
    slots: dict[Slot, Tensor] = {}
    for name, dim in sorted(shared):
        channels = torch.full((state.owners.tensors[name].shape[dim],), -1)
        for channel, unit in enumerate(units):
            channels[unit[name, dim]] = channel
        slots[name, dim] = channels
    producers = tuple(layer_name(name) for name, _ in rows)
    blocks = any(int(torch.bincount(slots[row][slots[row] >= 0]).max()) > 1 for row in rows)
    consumers = {
        columns: Consumer(layer_name(site.weight), site.weight, site.bias, site.op, slots[columns], columns[1], blocks)
        for columns, site in reading.items()
    }
    return ChannelGroup(
        producers[0],
        len(units),
        producers,
        tuple(consumer for columns, consumer in consumers.items() if columns in evaluated),
        slots,
        rows,
        training=tuple(consumer for columns, consumer in consumers.items() if columns not in evaluated),
    )


def close(owners: Owners) -> Tensor:
    """Unit of each id, (count,): ids that are coupled, until every unit fills whole slabs of every activation.

    Where the owners of an activation vary on several axes, a unit that is not a whole slab along one of
    them would leave a ragged tensor: it joins the others in the smallest slab that holds it. Attention
    heads and channel-shuffle pairs come out of this.
    """
    for name in owners.elements:
        if any(parameter == name for parameter, _ in owners.slots):
            owners.freeze_parameter(name, "used both as a weight and as a value")
    label = torch.arange(owners.count)
    edges = torch.cat(owners.couplings, 1) if owners.couplings else torch.empty(2, 0, dtype=torch.long)
    grids = [*owners.grids, *owners.elements.values()]
    while edges.shape[1]:
        label = _components(label, edges)
        joined = [pairs for grid in grids for pairs in _ragged(collapse_axes(label[grid]))]
        edges = torch.cat(joined, 1) if joined else torch.empty(2, 0, dtype=torch.long)
    return label


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
    """Layer -> why its outputs are in no group."""
    found = {producer for group in groups for producer in group.producers}
    mixed: dict[int, str] = {}
    for ids, reason in state.owners.mixed:
        for unit in torch.unique(label[ids]).tolist():
            mixed.setdefault(unit, f"its channels can only leave together: mixed by {reason}")
    why: dict[str, str] = {}
    for (weight, _), ids in state.owners.produced.items():
        name = layer_name(weight)
        if name not in found:
            units = label[ids].tolist()
            stated = (said[unit] for said in (reasons, mixed) for unit in units if unit in said)
            why[name] = next(stated, "no layer that could be refitted reads its channels")
    return why
