"""Channel groups: what can leave a model together, found from the owners of its activations."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune.graph import operations  # noqa: F401  (they register their rules)
from lnr_prune.graph.closure import close
from lnr_prune.graph.flow import data_flow
from lnr_prune.graph.module import Example
from lnr_prune.graph.modules.folding import frozen_reasons
from lnr_prune.graph.owners import Owners, Slot, collapse_axes, varying_axes
from lnr_prune.graph.paths import Paths, follow, unused_weights
from lnr_prune.graph.rules import Propagation, Site
from lnr_prune.graph.sizes import HeldInt, held_ints
from lnr_prune.graph.weights import part_name

UNUSED = "not used in the calls that were traced; if another method uses it, give that method in also="


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer ``y = W x`` that reads a group's channels.

    Attributes:
        name: Name of the layer, such as "features.3".
        weight: Name of its weight.
        bias: Name of its bias; None if it has none, or if the bias must stay as it is.
        op: "linear", "conv2d", "conv_transpose2d", ...
        channels: Channel that each index of the weight's input dimension reads, -1 = not of this group.
        dim: That dimension: 1, or 0 if the weight is stored the other way round.
        blocks: Whether a channel consists of several rows of its producers (an attention head).
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
        name: Name of the first producer that no earlier group is named after.
        size: Number of channels.
        producers: Names of the layers whose rows (filters) are the channels.
        consumers: The layers that read them.
        slots: Everything that shrinks: (parameter, dimension) -> channel of every index, -1 = stays.
        rows: The slots that produce the channels: the output dimensions of the producers' weights.
        training: Layers that read the channels only where the calibration data does not come: in training mode, such
            as those of an auxiliary head, or in other methods. If no other layer reads them, ``consumers`` is empty.
        held: The ints in the model's forward that count the channels.
        multiple: How many channels are kept must be a multiple of this, unless all are.
        attributes: The submodules' attributes that change when channels leave: (submodule, attribute) -> value
            in the whole model, and what it loses with each channel, (size,). See `shrinkable`.
    """

    name: str
    size: int
    producers: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    slots: Mapping[Slot, Tensor]
    rows: tuple[Slot, ...]
    training: tuple[Consumer, ...] = ()
    held: tuple[HeldInt, ...] = ()
    multiple: int = 1
    attributes: Mapping[tuple[str, str], tuple[int, Tensor]] = field(default_factory=dict)

    @property
    def kind(self) -> tuple[int, int, tuple[Slot, ...]]:
        """The same for groups that differ only in the numbers of their layers: ``layers.3.mlp``, ``layers.4.mlp``."""
        slots = sorted((re.sub(r"(?<![^.])\d+(?![^.])", "N", name), dim) for name, dim in self.slots)
        return self.size, self.multiple, tuple(slots)


@dataclass(frozen=True, eq=False)
class Graph:
    """The channel groups of a model.

    Attributes:
        groups: What can be pruned, in order of execution.
        frozen: Name of a layer with outputs that cannot be pruned -> why.
        macs: Name of a weight -> multiply-accumulates that it takes part in, in the traced call.
        products: For every product of two activations, its multiply-accumulates in the traced call, and for each group
            the share of them that is saved when one channel leaves.
        layers: Every layer ``y = W x`` whose weight is used nowhere else, in order of execution; each index of its
            inputs counts as a channel.
        repeated: Names of weights that are applied more than once in a forward pass, or to rows that the forward
            chooses: the experts of a mixture.
        flow: Pairs of layers: what the first computes goes into the second, see `data_flow`.
        unused: Layers whose weight no traced path reads.
        estimated: Names of weights whose multiply-accumulates depend on the data, so that the trace does not know them.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: Mapping[str, str]
    macs: Mapping[str, int]
    products: tuple[tuple[int, Mapping[str, float]], ...] = ()
    layers: tuple[Consumer, ...] = ()
    repeated: frozenset[str] = frozenset()
    flow: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()
    estimated: frozenset[str] = frozenset()


def find_groups(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], also: Sequence[Example] = ()
) -> Graph:
    """The channel groups of ``model(*args, **kwargs)``; the model is traced, not run.

    Args:
        model: The model.
        args: Positional arguments of a forward pass.
        kwargs: Keyword arguments.
        also: Other calls, whose paths are traced, too.

    Raises:
        GraphError: If the model cannot be traced.
    """
    paths = follow(model, args, kwargs, also)
    state, sites = paths.main, paths.sites
    for site in sites:
        if site.columns in state.owners.produced:
            state.owners.freeze(state.owners.slots[site.columns], "its weight also produces the channels that it reads")
    label = close(state.owners)
    reasons = _frozen_reasons(state.owners, label)
    labelled = labelled_slots(state.owners, label)
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
        group = _read_group(paths, {slot: channel[labelled[slot]] for slot in sorted(shared)}, len(units))
        groups += [group] if group else []
        channel[units] = -1
    of_sites = [weight for site in sites for weight, _ in _weights(site)]
    order = {weight: position for position, weight in reversed(list(enumerate(of_sites)))}
    groups.sort(key=lambda group: min(order[consumer.weight] for consumer in group.consumers or group.training))
    groups = _named(groups)
    held = held_ints(paths.all, label, {group.name: group.slots for group in groups})
    groups = [replace(group, held=held[group.name]) for group in groups]
    frozen = frozen_reasons(model, _explain(paths, groups, label, reasons))
    flow = tuple((layer_name(a), layer_name(b)) for a, b in data_flow(paths.all))
    return Graph(
        tuple(groups), frozen, state.macs, _products(state, groups, label), *_linear_maps(paths), flow,
        tuple(map(layer_name, unused_weights(paths))), frozenset(state.estimated),
    )  # fmt: skip


def _linear_maps(paths: Paths) -> tuple[tuple[Consumer, ...], frozenset[str]]:
    """The layers whose weight is used nowhere else, and the names of weights that are applied more than once."""
    first = {site.columns: site for site in reversed(paths.calibrated_sites)}
    layers, repeated = dict[str, Consumer](), set[str]()
    for site in paths.calibrated_sites:
        if paths.applied_only(site.weight) and first[site.columns].rows == site.rows:
            channels = torch.arange(paths.tensors[site.weight].shape[site.columns[1]])
            layers |= {layer.weight: layer for layer in _consumers(site, channels, blocks=False)}
        if site.repeats or site.parts or paths.times(site.weight) > 1:
            repeated.update(weight for weight, _ in _weights(site))
    return tuple(layers.values()), frozenset(repeated)


def _weights(site: Site) -> list[tuple[str, int]]:
    """Names of the weights of a site, and the dimension of their inputs: one for each part of a stack."""
    dim = site.columns[1]
    return [(part_name(site.weight, part), dim - 1) for part in site.parts] if site.parts else [(site.weight, dim)]


def _consumers(site: Site, channels: Tensor, *, blocks: bool) -> list[Consumer]:
    return [
        Consumer(layer_name(weight), weight, site.bias, site.op, channels, dim, blocks)
        for weight, dim in _weights(site)
    ]


def _named(groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """The groups, each with a name of its own, as one layer's channels may be in several groups."""
    named: dict[str, ChannelGroup] = {}
    for number, group in enumerate(groups):
        name = next((name for name in group.producers if name not in named), f"{group.name} ({number})")
        named[name] = replace(group, name=name)
    return list(named.values())


def _products(
    state: Propagation, groups: Sequence[ChannelGroup], label: Tensor
) -> tuple[tuple[int, Mapping[str, float]], ...]:
    number = torch.full_like(label, len(groups))  # unit -> number of its group
    for index, group in enumerate(groups):
        row = group.rows[0]
        number[label[state.owners.slots[row][group.slots[row] >= 0]]] = index
    products = []
    for macs, ids in state.products:
        owned = torch.bincount(number[label[ids]].flatten(), minlength=len(groups)).tolist()
        shares = {g.name: count / ids.numel() / g.size for g, count in zip(groups, owned, strict=False) if count}
        products.append((macs, shares))
    return tuple(products)


def layer_name(parameter: str) -> str:
    """Name of the layer that a weight belongs to; a raw parameter keeps its own name."""
    return parameter.removesuffix(".weight")


def _read_group(paths: Paths, slots: dict[Slot, Tensor], size: int) -> ChannelGroup | None:
    """The group whose units share these slots; None if it has no producer, no consumer, or only one channel."""
    reading = [site for site in paths.sites if site.columns in slots]
    evaluated = {weight for site in paths.calibrated_sites for weight in _weights(site)}
    rows = tuple(slot for slot in paths.main.owners.produced if slot in slots)
    if not reading or not rows or size < 2:
        return None
    producers = tuple(layer_name(name) for name, _ in rows)
    blocks = any(int(torch.bincount(slots[row][slots[row] >= 0]).max()) > 1 for row in rows)
    consumers: dict[tuple[str, int], Consumer] = {}
    for site in reading:
        for each in _consumers(site, slots[site.columns], blocks=blocks):
            consumers.setdefault((each.weight, each.dim), each)
    return ChannelGroup(
        producers[0],
        size,
        producers,
        tuple(consumer for key, consumer in consumers.items() if key in evaluated),
        slots,
        rows,
        training=tuple(consumer for key, consumer in consumers.items() if key not in evaluated),
        multiple=math.lcm(*(site.multiple for site in paths.sites if {site.rows, site.columns} & slots.keys())),
    )


def _frozen_reasons(owners: Owners, label: Tensor) -> dict[int, str]:
    """Unit -> why it stays."""
    reasons = {int(label[0]): "shares an activation with values that belong to no known channel"}
    for ids, reason in owners.frozen:
        for unit in torch.unique(label[ids]).tolist():
            reasons.setdefault(unit, reason)
    return reasons


def labelled_slots(owners: Owners, label: Tensor) -> dict[Slot, Tensor]:
    """Unit of every index of every dimension of every parameter that ownership has reached."""
    labelled = {slot: label[ids] for slot, ids in owners.slots.items()}
    for name, ids in owners.elements.items():
        grid = collapse_axes(label[ids])
        axes = varying_axes(grid)
        if len(axes) == 1:  # closure made the units slabs; on one axis, a slab is an index
            labelled.setdefault((name, axes[0]), grid.reshape(-1))
    return labelled


def _explain(paths: Paths, groups: list[ChannelGroup], label: Tensor, reasons: Mapping[int, str]) -> dict[str, str]:
    """Layer -> why its outputs, some of its outputs, or its whole weight are in no group."""
    owners = paths.main.owners
    mixed: dict[int, str] = {}
    together = [(ids, f"its channels can only be removed together: mixed by {reason}") for ids, reason in owners.mixed]
    for ids, reason in (*owners.numbered, *together):
        for unit in torch.unique(label[ids]).tolist():
            mixed.setdefault(unit, reason)

    def stated(ids: Tensor, otherwise: str) -> str:
        units = torch.unique(label[ids]).tolist()
        return next((said[unit] for said in (mixed, reasons) for unit in units if unit in said), otherwise)

    why: dict[str, str] = {}
    for row, ids in owners.produced.items():
        left = torch.stack([group.slots[row] < 0 for group in groups if row in group.slots] or [ids >= 0]).all(0)
        if count := int(left.sum()):
            reason = stated(ids[left], "no layer that could be refitted reads its channels")
            why[layer_name(row[0])] = reason if count == len(ids) else f"{count} of its {len(ids)} channels: {reason}"
    shrink = {name for group in groups for name, _ in group.slots}
    for name, tensor in paths.tensors.items():
        if isinstance(tensor, nn.Parameter) and tensor.dim() > 1 and name not in shrink:
            known = [owners.slots[name, dim] for dim in range(tensor.dim()) if (name, dim) in owners.slots]
            known += [owners.elements[name].reshape(-1)] if name in owners.elements else []
            reason = stated(torch.cat(known), "shares its channels with a layer that stays") if known else UNUSED
            why.setdefault(layer_name(name), owners.untouched.get(name, reason))
    return why


def layers_between(group: ChannelGroup, flow: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Layers that neither make a group's channels nor read them, but work on each, such as depthwise convolutions."""
    ends = {*group.producers, *(consumer.name for consumer in (*group.consumers, *group.training))}
    own = {layer_name(name) for name, _ in group.slots} - ends
    return tuple(layer for layer in dict.fromkeys(target for _, target in flow) if layer in own)
