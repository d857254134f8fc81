"""Rules for layers, ``y = W x``: who reads the columns of a weight, and who makes its rows."""

import math

import torch
from torch import Tensor, fx

from lnr_prune.graph.nodes import argument, describe, op_name, shape_of, spatial_axes
from lnr_prune.graph.owners import along, collapse_axes, varying_axes
from lnr_prune.graph.rules import Propagation, Site, meet, rule
from lnr_prune.graph.weights import View


def apply_weight(
    state: Propagation,
    node: fx.Node,
    operands: tuple[fx.Node, fx.Node, fx.Node | None],
    axis: int,
    rows: int = 0,
    columns: int = 1,
    *,
    output_axis: int | None = None,
    multiple: int = 1,
) -> Tensor | None:
    """``y = W x``: x's channels along the axis are the weight's columns, y's its rows, perhaps along another axis."""
    x, weight, bias = operands
    names, owners, reason = state.trace.names, state.owners, describe(node)
    output_axis, view = axis if output_axis is None else output_axis, _weight(state, node, weight)
    if view is None:
        found = _computed_rows(state, weight, rows)
        if found is None:
            return None
        owners.freeze(state.of(x), f"read by a computed weight in {reason}")
        return _produce(state, node, operands, output_axis, *found)
    name, rows, columns = view.name, view.dims[rows], view.dims[columns]
    if view.parts:
        owners.freeze(owners.slot(name, 0), f"{reason} picks among its parts by their number")
    op = op_name(node) if op_name(node).startswith("conv") else "linear"
    row_ids, ids = owners.rows(name, rows), state.of(x)
    own = None if bias is None or view.parts else names.get(bias)
    state.sites.append(Site(name, own, op, (name, rows), (name, columns), parts=view.parts, multiple=multiple))
    elsewhere = ids.shape[axis] == 1 and varying_axes(ids) and op == "linear" and output_axis == axis
    if elsewhere and not owners.all_stay(ids):
        stays = [ids] if view.stacked else []  # they may lie along the parts, which stay
        for slot in (row_ids, owners.slot(name, columns), *stays):
            owners.freeze(slot, f"positions, not channels, are mixed by {reason}")
        _couple_bias(state, node, bias, row_ids)
        summed = state.trace.tensors[name].shape[columns]
        state.products.append((math.prod(shape_of(node)) * summed, ids))  # it falls with the channels that pass
        return ids.reshape([1] * (len(shape_of(node)) - ids.dim()) + list(ids.shape))
    owners.couple_axis(ids, axis, owners.slot(name, columns), f"input of {reason}")
    return _produce(state, node, operands, output_axis, name, row_ids)


def _weight(state: Propagation, node: fx.Node, weight: fx.Node) -> View | None:
    """The parameter that is a layer's weight, and how it is read; a convolution reads it as it is."""
    if not op_name(node).startswith("conv"):
        return state.views.get(weight)
    name = state.trace.names.get(weight)
    return None if name is None else View(name, tuple(range(len(shape_of(weight)))))


def _computed_rows(state: Propagation, weight: fx.Node, rows: int) -> tuple[str, Tensor] | None:
    """The parameter whose rows are the rows of a computed weight, and their ids."""
    if weight in state.moving or not bool(state.of(weight).any()):
        return None
    owners, others = state.owners, [axis for axis in range(len(shape_of(weight))) if axis != rows]
    ids = owners.mix(state.of(weight), others, f"computing {describe(weight)}").reshape(-1)
    for name in owners.by_row:
        if bool(torch.isin(ids, owners.slot(name, 0)).all()):
            owners.rows(name, 0)
            return name, ids
    return None


def _produce(
    state: Propagation,
    node: fx.Node,
    operands: tuple[fx.Node, fx.Node, fx.Node | None],
    axis: int,
    name: str,
    row_ids: Tensor,
) -> Tensor:
    """The ids of a contraction's output: its weight's rows, to which the bias is coupled."""
    x, _, bias = operands
    _couple_bias(state, node, bias, row_ids)
    applied = x if op_name(node).startswith("conv_transpose") else node  # where the weight is applied
    shape = shape_of(applied)
    view = _weight(state, node, operands[1])
    size = state.trace.tensors[name].shape
    matrix = size[1:] if view is not None and view.parts else size  # a row of the batch meets one part of a stack
    state.macs[name] += math.prod(shape) // shape[axis] * math.prod(matrix)
    if "unknown" in node.meta:
        state.estimated.add(name)
    return along(row_ids, axis, shape_of(node))


def _couple_bias(state: Propagation, node: fx.Node, bias: fx.Node | None, row_ids: Tensor) -> None:
    if bias is not None and state.extent(bias) != (1,):
        state.owners.couple(row_ids, state.of(bias).expand(shape_of(bias)), describe(node))


@rule("linear")
def _linear(state: Propagation, node: fx.Node) -> Tensor | None:
    """Reads the channels of the last axis, as columns of its weight; makes new ones, its rows."""
    x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    return apply_weight(state, node, (x, weight, bias), len(shape_of(node)) - 1)


@rule("addmm")
def _addmm(state: Propagation, node: fx.Node) -> Tensor | None:
    """Reads the channels of the last axis; the weight is stored the other way round."""
    bias, x, weight = (argument(node, i, name) for i, name in enumerate(("self", "mat1", "mat2")))
    if node.kwargs:  # beta, alpha
        return None
    return apply_weight(state, node, (x, weight, bias), 1, rows=1, columns=0)


@rule("conv1d", "conv2d", "conv3d")
def _convolution(state: Propagation, node: fx.Node) -> Tensor | None:
    """Reads axis 1, and makes new channels; in groups, whole groups leave, and one filter for all may be constant."""
    x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    groups, axis = argument(node, 6, "groups", 1), len(shape_of(node)) - 1 - spatial_axes(node)
    if groups == 1:
        return apply_weight(state, node, (x, weight, bias), axis)
    return _whole_groups(state, node, groups, axis)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed_convolution(state: Propagation, node: fx.Node) -> Tensor | None:
    """Reads axis 1, and makes new channels; in groups, whole groups leave, and one filter for all may be constant."""
    x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    axis = len(shape_of(node)) - 1 - spatial_axes(node)
    groups = argument(node, 6, "groups", 1)
    if groups == 1:
        return apply_weight(state, node, (x, weight, bias), axis, rows=1, columns=0)
    return _whole_groups(state, node, groups, axis)


def _whole_groups(state: Propagation, node: fx.Node, groups: int, axis: int) -> Tensor | None:
    """A grouped convolution loses whole groups of inputs and outputs; if depthwise, a group is one channel."""
    x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    names, owners, reason = state.trace.names, state.owners, describe(node)
    if weight not in names and state.of(weight).shape[0] == 1:
        return _same_filters(state, node, groups, axis)
    found = (names[weight], owners.slot(names[weight], 0)) if weight in names else _computed_rows(state, weight, 0)
    if found is None:
        return None
    first = found[1].view(groups, -1)[:, :1]
    owners.couple(found[1].view(groups, -1), first, reason)
    inputs, outputs = (first.expand(groups, shape_of(side)[axis] // groups).reshape(-1) for side in (x, node))
    owners.couple_axis(state.of(x), axis, inputs, f"input of {reason}")
    return _produce(state, node, (x, weight, bias), axis, found[0], outputs)


def _same_filters(state: Propagation, node: fx.Node, groups: int, axis: int) -> Tensor | None:
    """A grouped convolution of which all groups have the same filters, such as a blur: these are repeated as needed."""
    x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    same = state.extent(weight)[0] == 1
    if not same and weight not in state.moving:
        same = len(collapse_axes(state.constant(weight).unflatten(0, (groups, -1)))) == 1
    if not same:
        return None
    owners, reason, shape = state.owners, describe(node), shape_of(node)
    owners.freeze(state.of(weight), f"a filter for all channels in {reason}")
    applied = x if op_name(node).startswith("conv_transpose") else node
    state.products.append((math.prod(shape_of(applied)) * math.prod(shape_of(weight)[1:]), state.of(x)))
    ids = owners.mix(state.of(x), range(axis + 1, len(shape)), reason)
    if ids.shape[axis] > 1:
        ids = owners.mix(ids.unflatten(axis, (groups, -1)), [axis + 1], reason).squeeze(axis + 1)
        ids = ids.repeat_interleave(shape[axis] // groups, axis)
    if bias is None:
        return ids
    added = [1] * (len(shape) - 1 - axis)
    return meet(
        state, node, [(ids, shape), (state.of(bias).reshape([-1, *added]), (*state.extent(bias), *added))], shape
    )


@rule("embedding")
def _embedding(state: Propagation, node: fx.Node) -> Tensor | None:
    """Makes channels along the last axis; the vocabulary stays."""
    weight = argument(node, 0, "weight")
    if weight not in state.trace.names:
        return None
    name, owners = state.trace.names[weight], state.owners
    owners.freeze(owners.slot(name, 0), f"vocabulary of {describe(node)}")
    return along(owners.rows(name, 1), len(shape_of(node)) - 1, shape_of(node))


@rule("_weight_norm", "_weight_norm_interface")
def _weight_norm(state: Propagation, node: fx.Node) -> Tensor | None:
    """Rows of the weight leave; its other axes are mixed."""
    direction, magnitude = argument(node, 0, "v"), argument(node, 1, "g")
    if argument(node, 2, "dim", 0) != 0:
        return None
    ids = state.owners.mix(state.of(direction), range(1, len(shape_of(direction))), describe(node))
    return meet(
        state, node, [(ids, shape_of(direction)), (state.of(magnitude), shape_of(magnitude))], shape_of(direction)
    )
