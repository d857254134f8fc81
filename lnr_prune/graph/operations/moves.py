"""Rules for the operations that only move data: they are run on the ids themselves."""

import itertools
from typing import Any

import torch
from torch import Tensor, fx

from lnr_prune.graph.nodes import argument, describe, op_name, shape_of
from lnr_prune.graph.owners import Cut, collapse_axes, nobody
from lnr_prune.graph.rules import Ids, Propagation, meet, rule

MOVES = {
    "adjoint", "atleast_1d", "atleast_2d", "atleast_3d", "chunk", "diagonal", "flatten", "flip", "fliplr", "flipud",
    "im2col", "mH", "mT", "matrix_H", "moveaxis", "movedim", "narrow", "numpy_T", "permute", "ravel", "repeat",
    "reshape", "roll", "rot90", "select", "slice", "split", "split_with_sizes", "squeeze",
    "swapaxes", "swapdims", "t", "tensor_split", "tile", "transpose", "tril", "triu", "unbind", "unflatten", "unfold",
    "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "unsqueeze", "view",
}  # fmt: skip
JOINS: dict[str, int | None] = {
    "cat": None, "concat": None, "concatenate": None, "stack": None,
    "hstack": 1, "column_stack": 1, "vstack": 0, "row_stack": 0, "dstack": 2,
}  # fmt: skip
"""The axis along which an operation joins values, if it is always the same."""


@rule(*MOVES)
def move(state: Propagation, node: fx.Node) -> Ids:
    """Moves every channel's elements along; of an axis that is cut, parts shrink alike; picked positions stay."""
    source = argument(node, 0, "self")
    name, ids, shape = op_name(node), state.of(source), shape_of(source)
    if 0 in shape_of(node):
        return nobody(shape_of(node))
    reason = f"fixed positions in {describe(node)}"
    for axis, ends in _named_positions(node):
        if ids.shape[axis] == 1:
            continue
        if isinstance(ends, int):
            state.owners.mix(ids.unflatten(axis, (-1, ends)), [axis % len(shape) + 1], reason)
        elif ends is None:
            ids = state.owners.mix(ids, [axis % len(shape)], reason)
        else:
            state.owners.cuts.append(Cut(ids, axis % len(shape), ends, reason))
    if name == "im2col":
        channels = state.owners.mix(ids, [2, 3], describe(node)).reshape(-1)
        return channels.expand(shape[1]).repeat_interleave(shape_of(node)[1] // shape[1]).view(1, -1, 1)
    args = fx.node.map_arg(node.args[1:], state.constant)
    kwargs = {key: fx.node.map_arg(value, state.constant) for key, value in node.kwargs.items()}
    kwargs.pop("memory_format", None)
    target: Any = torch.reshape if name == "view" else node.target  # expanded ids cannot be viewed
    moved = target(ids.expand(shape), *args, **kwargs)
    return [collapse_axes(part) for part in moved] if isinstance(moved, list | tuple) else collapse_axes(moved)


@rule("repeat_interleave")
def _repeat_interleave(state: Propagation, node: fx.Node) -> Ids | None:
    """With counts that depend on the inputs, what is repeated has one owner along the axis."""
    source, counts = argument(node, 0, "self"), argument(node, 1, "repeats")
    axis = argument(node, 2, "dim")
    if counts not in state.moving:
        return move(state, node)
    if axis is None:
        return None
    reason = describe(node)
    state.owners.freeze(state.of(counts), f"decides how much is repeated in {reason}")
    return state.owners.mix(state.of(source), [axis % len(shape_of(source))], reason)


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def _rearrange(state: Propagation, node: fx.Node) -> Ids | None:
    """The factor is fixed, so what it splits or joins can only leave as a whole."""
    name, factor = op_name(node), argument(node, 1, "factor")
    ids, reason = state.of(argument(node, 0, "self")), describe(node)
    axis = 1 if name == "channel_shuffle" else ids.dim() - 3
    if name == "pixel_unshuffle":
        state.owners.mix(ids, [axis + 1, axis + 2], reason)
    elif ids.shape[axis] > 1:
        sizes = (factor, -1) if name == "channel_shuffle" else (-1, factor**2)
        state.owners.mix(ids.unflatten(axis, sizes), [axis if name == "channel_shuffle" else axis + 1], reason)
    return move(state, node)


@rule("reshape_as", "view_as")
def _reshape_as(state: Propagation, node: fx.Node) -> Tensor:
    """Moves every channel's elements along."""
    source = argument(node, 0, "self")
    return collapse_axes(state.of(source).expand(shape_of(source)).reshape(shape_of(node)))


def _named_positions(node: fx.Node) -> list[tuple[int, tuple[int, ...] | int | None]]:
    """Axes that the operation cuts into parts, with the parts' ends; None if it picks single positions.

    A step that picks one position of every so many is given by this number: they leave together, and the next step
    then finds the same ones.

    After channels have left, the forward will use the same positions, or the same fractions of the axis.
    """
    name = op_name(node).removeprefix("unsafe_")
    unknown = "unknown" in node.meta  # cuts at positions that depend on the data
    if name == "select":
        return [(argument(node, 1, "dim"), None)]
    if name == "unfold":
        return [(argument(node, 1, "dimension"), None)]
    if name == "unbind":
        return [(argument(node, 1, "dim", 0), None)]
    if name == "roll":
        return [(axis, None) for axis in argument(node, 2, "dims", ())]
    if name in ("tril", "triu", "diagonal"):
        return [(-1, None), (-2, None)]
    size = shape_of(argument(node, 0, "self"))
    if name in ("slice", "narrow"):
        axis = argument(node, 1, "dim", 0)
        if unknown:
            return [(axis, None)]
        start, end = argument(node, 2, "start"), argument(node, 3, "end" if name == "slice" else "length")
        if name == "narrow":
            end = start + end
        cut = range(size[axis])[slice(start, end, argument(node, 4, "step", 1))]
        if size[axis] % cut.step == 0 and cut.start < cut.step and len(cut) == size[axis] // cut.step > 1:
            return [(axis, cut.step)] if cut.step > 1 else []
        if len(cut) == size[axis]:
            return []
        return [(axis, None if cut.step != 1 else tuple(sorted({cut.start, cut.stop, size[axis]} - {0})))]
    if name in ("chunk", "tensor_split", "split", "split_with_sizes"):
        axis, wanted = argument(node, 2, "dim", 0), argument(node, 1, "split_size")
        if unknown:
            return [(axis, None)]
        if isinstance(wanted, list | tuple) and name == "tensor_split":
            ends = [*wanted, size[axis]]
        elif isinstance(wanted, list | tuple):
            ends = list(itertools.accumulate(wanted))
        elif name == "split":
            ends = [*range(wanted, size[axis], wanted), size[axis]]
        else:
            if size[axis] % wanted:
                return [(axis, None)]
            ends = list(range(size[axis] // wanted, size[axis] + 1, size[axis] // wanted))
        return [(axis, tuple(sorted({end for end in ends if end > 0})))]
    return []


@rule("view_as_real", "view_as_complex")
def _complex(state: Propagation, node: fx.Node) -> Tensor:
    """Adds a last axis for real and imaginary parts, or mixes the one that there is and removes it."""
    ids = state.of(argument(node, 0, "self"))
    if op_name(node) == "view_as_real":
        return ids.unsqueeze(-1)
    return state.owners.mix(ids, [ids.dim() - 1], describe(node)).squeeze(-1)


@rule("slice_scatter")
def _slice_scatter(state: Propagation, node: fx.Node) -> Tensor | None:
    """A part of a value is replaced by another value, so the two leave together."""
    source, axis, shape = argument(node, 1, "src"), argument(node, 2, "dim", 0), shape_of(node)
    part = range(shape[axis])[slice(argument(node, 3, "start"), argument(node, 4, "end"), argument(node, 5, "step", 1))]
    ids, written = state.of(argument(node, 0, "self")), (state.of(source), state.extent(source))
    if ids.shape[axis] == written[0].shape[axis] == 1:
        return meet(state, node, [(ids, shape_of(source)), written], shape_of(source))
    if "unknown" in node.meta or part.step != 1 or ids.shape[axis] == 1:
        return None
    reason, sizes = f"fixed positions in {describe(node)}", [part.start, len(part), shape[axis] - part.stop]
    state.owners.cuts.append(Cut(ids, axis % len(shape), tuple(itertools.accumulate(filter(None, sizes))), reason))
    parts = list(ids.split(sizes, axis))
    parts[1] = meet(state, node, [(parts[1], shape_of(source)), written], shape_of(source))
    return _side_by_side(parts, sizes, axis % len(shape))


def _side_by_side(parts: list[Tensor], sizes: list[int], axis: int) -> Tensor:
    """Concatenates ids of these sizes along an axis; they are expanded only where they must be."""
    common = [max(part.shape[k] for part in parts) for k in range(parts[0].dim())]
    full = [part.expand([*common[:axis], size, *common[axis + 1 :]]) for part, size in zip(parts, sizes, strict=True)]
    return collapse_axes(torch.cat(full, axis))


@rule("expand", "expand_as", "broadcast_to")
def _expand(state: Propagation, node: fx.Node) -> Tensor:
    """Only axes of size 1 grow."""
    ids = state.of(argument(node, 0, "self"))
    return ids.reshape([1] * (len(shape_of(node)) - ids.dim()) + list(ids.shape))


@rule(*JOINS)
def _join(state: Propagation, node: fx.Node) -> Tensor | None:
    """Puts values side by side; zeros and the like that are joined along another axis belong to the channels there."""
    values = [value for value in argument(node, 0, "tensors") if 0 not in shape_of(value)]
    rank, stack = len(shape_of(values[0])), op_name(node) == "stack"
    axis = joined_axis(node)
    if axis >= rank + stack:
        return None
    ids = [state.of(value) for value in values]
    common = [max(each.shape[k] for each in ids) for k in range(rank)]
    elsewhere = [k for k in range(rank) if common[k] > 1 and (stack or k != axis)]
    neighbours = [each for each in ids if bool(each.any()) and (stack or each.shape[axis] == 1)]
    full = []
    for value, each in zip(values, ids, strict=True):
        if elsewhere and neighbours and not bool(each.any()) and all(state.extent(value)[k] == 1 for k in elsewhere):
            each = neighbours[0]
        sizes = [shape_of(value)[k] if k == axis and not stack else common[k] for k in range(rank)]
        full.append(each.expand(sizes))
    return collapse_axes((torch.stack if stack else torch.cat)(full, axis))


def joined_axis(node: fx.Node) -> int:
    """The axis of the result along which values are put side by side."""
    fixed = JOINS[op_name(node)]
    return int(argument(node, 1, "dim", 0)) % len(shape_of(node)) if fixed is None else fixed
