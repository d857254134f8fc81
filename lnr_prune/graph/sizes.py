"""The ints of a traced forward that count channels, and what they become when channels leave."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lnr_prune.graph.nodes import (
    UNIFORM,
    argument,
    code_line,
    is_pointwise,
    module_kind,
    module_path,
    op_name,
    shape_of,
    spatial_axes,
)  # fmt: skip
from lnr_prune.graph.operations.moves import JOINS, joined_axis
from lnr_prune.graph.owners import Slot
from lnr_prune.graph.rules import Propagation

SHAPES = {"view", "reshape", "expand", "broadcast_to"}  # operations with an argument that lists the result's sizes


@dataclass(frozen=True, eq=False)
class Count:
    """An int argument of an operation that counts indices of an axis.

    Attributes:
        position: Position of the argument, and the position in it if it is a list.
        units: Unit of every index that it counts, (int,); 0 = of no unit, or of several.
        sign: -1 where the axis is counted from its end.
    """

    position: tuple[int, ...]
    units: Tensor
    sign: int = 1


@dataclass(frozen=True, eq=False)
class HeldInt:
    """An int in a forward that counts a group's channels, such as ``num_heads`` or the 800 in ``view(-1, 800)``.

    Attributes:
        module: Name of the submodule whose forward contains it.
        line: The line of code; the submodule's name if the line is unknown.
        value: The int, in the traced call.
        per_channel: What it loses with each channel of the group, (size,).
    """

    module: str
    line: str
    value: int
    per_channel: Tensor


def along_axis(state: Propagation, label: Tensor, node: fx.Node, axis: int, part: int | None = None) -> Tensor:
    """Unit of every index of an axis of a value, (size,): 0 where an index is of several units or of none.

    Args:
        state: Ownership of every value.
        label: Unit of each id.
        node: The value.
        axis: The axis.
        part: Which output, if the operation has several.
    """
    value, ids = node.meta["val"], state.ids.get(node)
    if part is not None and isinstance(ids, list):
        ids, shape = ids[part], tuple(value[part].shape)
    else:
        ids, shape = state.of(node), shape_of(node)
    if ids.shape[axis] == 1:
        return torch.zeros(shape[axis], dtype=torch.long)
    rows = label[ids].movedim(axis, 0).reshape(ids.shape[axis], -1)
    return torch.where((rows == rows[:, :1]).all(1), rows[:, 0], 0)


def counts(state: Propagation, label: Tensor, node: fx.Node) -> Iterator[Count]:
    """The int arguments of an operation that count indices of an axis on which the units vary."""
    if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor | list | tuple):
        yield from (count for count in _counts(state, label, node) if bool(count.units.any()))


def _counts(state: Propagation, label: Tensor, node: fx.Node) -> Iterator[Count]:
    name = op_name(node)
    second = argument(node, 1, "")
    sizes = 0 if name in UNIFORM and not name.startswith("new_") else 1  # where they are
    listed = argument(node, sizes, "size")
    if name in SHAPES | UNIFORM and isinstance(listed, Sequence):
        for axis, size in enumerate(listed):
            if size != -1:
                yield Count((sizes, axis), along_axis(state, label, node, axis))
    elif name == "unflatten":
        first = second % len(shape_of(argument(node, 0, "self")))
        for index, size in enumerate(argument(node, 2, "sizes")):
            if size != -1:
                yield Count((2, index), along_axis(state, label, node, first + index))
    elif name == "split" and isinstance(second, int):
        yield Count((1,), along_axis(state, label, node, argument(node, 2, "dim", 0), 0))
    elif name in ("split", "split_with_sizes"):
        for index in range(len(second)):
            yield Count((1, index), along_axis(state, label, node, argument(node, 2, "dim", 0), index))
    elif name == "tensor_split" and isinstance(second, Sequence):
        units = along_axis(state, label, argument(node, 0, "self"), argument(node, 2, "dim", 0))
        yield from (Count((1, index), units[:cut]) for index, cut in enumerate(second) if cut >= 0)
    elif name == "narrow":
        units = along_axis(state, label, argument(node, 0, "self"), argument(node, 1, "dim"))
        start = argument(node, 2, "start")
        yield Count((2,), units[:start])
        yield Count((3,), units[start : start + argument(node, 3, "length")])
    elif name in ("slice", "slice_scatter"):
        first = 1 if name == "slice" else 2  # position of the axis
        axis, step = argument(node, first, "dim", 0), argument(node, first + 3, "step", 1)
        units = along_axis(state, label, argument(node, 0, "self") if name == "slice" else node, axis)
        for position, key in ((first + 1, "start"), (first + 2, "end")):
            cut = argument(node, position, key)
            if step == 1 and isinstance(cut, int) and -len(units) < cut < len(units):
                yield Count((position,), units[:cut]) if cut >= 0 else Count((position,), units[cut:], -1)
    elif name.startswith("conv") and argument(node, 6, "groups", 1) > 1:
        rows = along_axis(state, label, node, len(shape_of(node)) - 1 - spatial_axes(node))
        yield Count((6,), rows.view(argument(node, 6, "groups"), -1)[:, 0])
    elif name == "group_norm":
        rows = along_axis(state, label, argument(node, 0, "input"), 1)
        yield Count((1,), rows.view(argument(node, 1, "num_groups"), -1)[:, 0])


def shared_axes(node: fx.Node, value: fx.Node) -> Iterator[tuple[int, int]]:
    """Axes of an operand that are as long as axes of the result, where an operation needs that: pairs of the two."""
    name, rank, result = op_name(node), len(shape_of(value)), len(shape_of(node))
    lead = result - rank
    if is_pointwise(node) or name == "masked_scatter":
        yield from ((axis, lead + axis) for axis in range(rank) if lead + axis >= 0)
    elif name == "scaled_dot_product_attention":
        yield from ((axis, lead + axis) for axis in range(rank - 2))
    elif name in JOINS:
        joined = joined_axis(node)
        stack = name == "stack"
        yield from ((axis, axis + (stack and axis >= joined)) for axis in range(rank) if stack or axis != joined)
    elif name.startswith("conv") and value is not argument(node, 0, "input"):  # weight and bias
        yield 0, result - 1 - spatial_axes(node)
    elif name in ("gather", "scatter", "scatter_add", "scatter_reduce"):
        yield from ((axis, axis) for axis in range(rank) if axis != argument(node, 1, "dim") % rank)
    elif name.startswith("index_") and rank == result:
        yield from ((axis, axis) for axis in range(rank))


def channels_of(owners_slots: Mapping[Slot, Tensor], label: Tensor, slots: Mapping[Slot, Tensor]) -> Tensor:
    """Channel of every unit, -1 = of none, found from a group's slots."""
    channel_of = torch.full((len(label),), -1)
    for slot, channels in slots.items():
        if slot in owners_slots:
            mine = channels >= 0
            channel_of[label[owners_slots[slot]][mine]] = channels[mine]
    return channel_of


def held_ints(
    traces: Sequence[Propagation], label: Tensor, groups: Mapping[str, Mapping[Slot, Tensor]]
) -> dict[str, tuple[HeldInt, ...]]:
    """The ints that count each group's channels, in any of the traces.

    Args:
        traces: Ownership of every value, in evaluation and perhaps in training; they share their owners.
        label: Unit of each id.
        groups: Name of a group -> its slots.

    Returns:
        Name of the group -> its ints, each once, in order of execution.
    """
    names = list(groups)
    group_of, channel_of = torch.full((len(label),), -1), torch.full((len(label),), -1)
    for index, slots in enumerate(groups.values()):
        channels = channels_of(traces[0].owners.slots, label, slots)
        group_of[channels >= 0], channel_of[channels >= 0] = index, channels[channels >= 0]
    sizes = [1 + int(channel_of[group_of == index].max()) for index in range(len(names))]
    found: dict[str, dict[Any, HeldInt]] = defaultdict(dict)
    for state in traces:
        for node in state.trace.nodes:
            if module_kind(node).startswith("torch.nn."):  # the collapse handles these
                continue
            for count in counts(state, label, node):
                for index in torch.unique(group_of[count.units]).tolist():
                    if index < 0:
                        continue
                    members = channel_of[count.units[group_of[count.units] == index]]
                    per_channel = torch.bincount(members, minlength=sizes[index])
                    line = code_line(node) or module_path(node)
                    held = HeldInt(module_path(node), line, len(count.units), per_channel)
                    key = (held.module, held.line, held.value, tuple(per_channel.tolist()))
                    found[names[index]].setdefault(key, held)
    return {name: tuple(found[name].values()) for name in names}
