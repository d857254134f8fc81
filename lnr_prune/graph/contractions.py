"""Rules for the operations that mix channels: contractions, attention, reductions, norms."""

import math

import torch
from torch import Tensor, fx

from lnr_prune.graph.nodes import argument, describe, op_name, shape_of, spatial_axes
from lnr_prune.graph.owners import along, collapse_axes
from lnr_prune.graph.rules import Propagation, Site, meet, rule


def _apply_weight(
    state: Propagation,
    node: fx.Node,
    operands: tuple[fx.Node, fx.Node, fx.Node | None],
    axis: int,
    rows: int = 0,
    columns: int = 1,
) -> Tensor | None:
    """``y = W x``: x's channels along the axis are the weight's columns, y's its rows."""
    x, weight, bias = operands
    names, owners, reason = state.trace.names, state.owners, describe(node)
    if weight not in names:
        found = _computed_rows(state, weight, rows)
        if found is None:
            return None
        owners.freeze(state.of(x), f"read by a computed weight in {reason}")
        return _produce(state, node, operands, axis, *found)
    name = names[weight]
    op = "linear" if op_name(node) in ("addmm", "matmul", "mm") else op_name(node)
    row_ids = owners.rows(name, rows)
    owners.couple_axis(state.of(x), axis, owners.slot(name, columns), f"input of {reason}")
    state.sites.append(Site(name, names.get(bias) if bias is not None else None, op, (name, rows), (name, columns)))
    return _produce(state, node, operands, axis, name, row_ids)


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
    if bias is not None:
        state.owners.couple(row_ids, state.of(bias).expand(shape_of(bias)), describe(node))
    applied = x if op_name(node).startswith("conv_transpose") else node  # where the weight is applied
    shape = shape_of(applied)
    state.macs[name] += math.prod(shape) // shape[axis] * state.trace.tensors[name].numel()
    return along(row_ids, axis, shape_of(node))


@rule("linear")
def _linear(state: Propagation, node: fx.Node) -> Tensor | None:
    x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    return _apply_weight(state, node, (x, weight, bias), len(shape_of(node)) - 1)


@rule("addmm")
def _addmm(state: Propagation, node: fx.Node) -> Tensor | None:
    bias, x, weight = (argument(node, i, name) for i, name in enumerate(("self", "mat1", "mat2")))
    if node.kwargs:  # beta, alpha
        return None
    return _apply_weight(state, node, (x, weight, bias), 1, rows=1, columns=0)


@rule("conv1d", "conv2d", "conv3d")
def _convolution(state: Propagation, node: fx.Node) -> Tensor | None:
    x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    groups, axis = argument(node, 6, "groups", 1), len(shape_of(node)) - 1 - spatial_axes(node)
    if groups == 1:
        return _apply_weight(state, node, (x, weight, bias), axis)
    return _whole_groups(state, node, groups, axis)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed_convolution(state: Propagation, node: fx.Node) -> Tensor | None:
    x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    axis = len(shape_of(node)) - 1 - spatial_axes(node)
    groups = argument(node, 6, "groups", 1)
    if groups == 1:
        return _apply_weight(state, node, (x, weight, bias), axis, rows=1, columns=0)
    return _whole_groups(state, node, groups, axis)


def _whole_groups(state: Propagation, node: fx.Node, groups: int, axis: int) -> Tensor | None:
    """A grouped convolution loses whole groups of inputs and outputs; if depthwise, a group is one channel."""
    x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    names, owners, reason = state.trace.names, state.owners, describe(node)
    found = (names[weight], owners.slot(names[weight], 0)) if weight in names else _computed_rows(state, weight, 0)
    if found is None:
        return None
    first = found[1].view(groups, -1)[:, :1]
    owners.couple(found[1].view(groups, -1), first, reason)
    inputs, outputs = (first.expand(groups, shape_of(side)[axis] // groups).reshape(-1) for side in (x, node))
    owners.couple_axis(state.of(x), axis, inputs, f"input of {reason}")
    return _produce(state, node, (x, weight, bias), axis, found[0], outputs)


@rule("embedding")
def _embedding(state: Propagation, node: fx.Node) -> Tensor | None:
    weight = argument(node, 0, "weight")
    if weight not in state.trace.names:
        return None
    name, owners = state.trace.names[weight], state.owners
    owners.freeze(owners.slot(name, 0), f"vocabulary of {describe(node)}")
    return along(owners.rows(name, 1), len(shape_of(node)) - 1, shape_of(node))


@rule("matmul", "mm", "bmm")
def _product(state: Propagation, node: fx.Node) -> Tensor | None:
    a, b = argument(node, 0, "self"), argument(node, 1, "other")
    left, right = shape_of(a), shape_of(b)
    if len(right) == 2 and b in state.trace.names:
        return _apply_weight(state, node, (a, b, None), len(shape_of(node)) - 1, rows=1, columns=0)
    if len(left) < 2 or len(right) < 2:
        return None
    reason = describe(node)
    _count_product(state, math.prod(shape_of(node)) * left[-1], state.of(a), state.of(b))
    rows = state.owners.mix(state.of(a), [len(left) - 1], reason)
    columns = state.owners.mix(state.of(b), [len(right) - 2], reason)
    _couple_contracted(state, state.of(a), state.of(b), reason)
    return meet(state, node, [(rows, (*left[:-1], 1)), (columns, (*right[:-2], 1, right[-1]))])


def _count_product(state: Propagation, macs: int, *ids: Tensor) -> None:
    """Counts multiply-accumulates of activations; they fall at least as fast as the channels of the larger one."""
    state.products.append((macs, max(ids, key=Tensor.numel)))


def _couple_contracted(state: Propagation, a: Tensor, b: Tensor, reason: str) -> None:
    """The contracted axis shrinks on both sides or on neither."""
    left, right = a.movedim(-1, 0), b.movedim(-2, 0)
    state.owners.couple(left.reshape(len(left), -1)[:, :1], right.reshape(len(right), -1)[:, :1], reason)


@rule("einsum")
def _einsum(state: Propagation, node: fx.Node) -> Tensor | None:
    """A sum of products, of one or two operands."""
    equation, values = str(node.args[0]).replace(" ", ""), argument(node, 1, "tensors")
    sources, arrow, target = equation.partition("->")
    labels = sources.split(",")
    if not arrow or "." in equation or len(values) > 2 or any(len(set(part)) < len(part) for part in labels):
        return None
    reason, operands = describe(node), []
    if len(values) > 1:
        sizes = dict(zip("".join(labels), (size for value in values for size in shape_of(value)), strict=True))
        _count_product(state, math.prod(sizes.values()), *(state.of(value) for value in values))
    for value, part in zip(values, labels, strict=True):
        summed = [axis for axis, label in enumerate(part) if label not in target]
        ids = state.owners.mix(state.of(value), summed, reason)
        order = [part.index(label) if label in part else None for label in target]
        kept = [axis for axis in order if axis is not None]
        ids = ids.permute(*kept, *summed).reshape([ids.shape[axis] for axis in kept])
        view = [slice(None) if axis is not None else None for axis in order]
        operands.append((ids[tuple(view)], tuple(shape_of(value)[axis] if axis is not None else 1 for axis in order)))
    for label in (set(labels[0]) & set(labels[-1])) - set(target) if len(labels) > 1 else ():
        left, right = (
            state.of(value).movedim(part.index(label), 0) for value, part in zip(values, labels, strict=True)
        )
        state.owners.couple(left.reshape(len(left), -1)[:, :1], right.reshape(len(right), -1)[:, :1], reason)
    return meet(state, node, operands)


@rule("_weight_norm", "_weight_norm_interface")
def _weight_norm(state: Propagation, node: fx.Node) -> Tensor | None:
    direction, magnitude = argument(node, 0, "v"), argument(node, 1, "g")
    if argument(node, 2, "dim", 0) != 0:
        return None
    ids = state.owners.mix(state.of(direction), range(1, len(shape_of(direction))), describe(node))
    return meet(
        state, node, [(ids, shape_of(direction)), (state.of(magnitude), shape_of(magnitude))], shape_of(direction)
    )


@rule("scaled_dot_product_attention")
def _attention(state: Propagation, node: fx.Node) -> Tensor:
    q, k, v = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    mask, reason, owners = argument(node, 3, "attn_mask"), describe(node), state.owners
    rank, heads = len(shape_of(q)), shape_of(q)[:-2]
    repeat = heads[-1] // shape_of(k)[-3] if rank > 3 else 1

    def every_head(value: fx.Node) -> tuple[Tensor, tuple[int, ...]]:
        ids, size = state.of(value), state.extent(value)
        if repeat > 1 and size[-3] > 1:
            ids, size = ids if ids.shape[-3] == 1 else ids.repeat_interleave(repeat, -3), (*heads, *size[-2:])
        return ids, size

    (ids_q, size_q), (ids_k, size_k), (ids_v, size_v) = (state.of(q), state.extent(q)), every_head(k), every_head(v)
    pairs = math.prod(shape_of(q)[:-1]) * shape_of(k)[-2]
    _count_product(state, pairs * shape_of(q)[-1], ids_q, ids_k)
    _count_product(state, pairs * shape_of(v)[-1], ids_v)  # the attention weights' ids are q's and k's
    ids_q, ids_k = (owners.mix(ids, [rank - 1], reason) for ids in (ids_q, ids_k))
    scores = [(ids_q, (*size_q[:-1], 1)), (ids_k.transpose(-1, -2), (*size_k[:-2], 1, size_k[-2]))]
    if mask is not None:
        scores.append((state.of(mask), state.extent(mask)))
    size = torch.broadcast_shapes(*(sizes for _, sizes in scores))
    weights = owners.mix(meet(state, node, scores, size), [rank - 1], reason)
    ids_v = owners.mix(ids_v, [rank - 2], reason)
    return meet(state, node, [(weights, (*size[:-1], 1)), (ids_v, (*size_v[:-2], 1, size_v[-1]))])


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp")
def _along_one_axis(state: Propagation, node: fx.Node) -> Tensor:
    ids = state.of(argument(node, 0, "self"))
    return state.owners.mix(ids, [argument(node, 1, "dim") % ids.dim()], describe(node))


@rule("glu")
def _glu(state: Propagation, node: fx.Node) -> Tensor:
    x, axis = argument(node, 0, "self"), argument(node, 1, "dim", -1)
    shape = shape_of(x)
    halves = state.of(x).expand(shape).chunk(2, axis)
    state.owners.grids.append(collapse_axes(state.of(x).expand(shape).unflatten(axis, (2, -1))))
    return meet(state, node, [(collapse_axes(half), shape_of(node)) for half in halves])


@rule("batch_norm", "_native_batch_norm_legit_no_training", "prelu", "_prelu_kernel", "instance_norm")
def _per_channel(state: Propagation, node: fx.Node) -> Tensor | None:
    x = argument(node, 0, "self")
    ids, reason = state.of(x), describe(node)
    for entry in node.args[1:5]:
        if isinstance(entry, fx.Node) and shape_of(entry) != (1,):
            if len(shape_of(entry)) != 1:
                return None
            channels = state.of(entry).expand(shape_of(entry))
            state.owners.couple_axis(ids, 1, channels, reason)
    training = op_name(node) == "batch_norm" and argument(node, 5, "training")
    if training or op_name(node) == "instance_norm":
        ids = state.owners.mix(ids, [0, *range(2, ids.dim())] if training else range(2, ids.dim()), reason)
    return ids


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(state: Propagation, node: fx.Node) -> Tensor:
    x, normalized = argument(node, 0, "input"), argument(node, 1, "normalized_shape")
    parameters = [entry for entry in node.args[2:4] if isinstance(entry, fx.Node)]
    ids = meet(
        state, node, [(state.of(x), shape_of(x)), *((state.of(p), shape_of(p)) for p in parameters)], shape_of(x)
    )
    return state.owners.mix(ids, range(ids.dim() - len(normalized), ids.dim()), describe(node))


@rule("group_norm", "native_group_norm")
def _group_norm(state: Propagation, node: fx.Node) -> Tensor | None:
    if op_name(node) != "group_norm":
        return None
    x, groups = argument(node, 0, "input"), argument(node, 1, "num_groups")
    ids, reason, channels = state.of(x), describe(node), shape_of(x)[1]
    for entry in node.args[2:4]:
        if isinstance(entry, fx.Node):
            state.owners.couple_axis(ids, 1, state.of(entry).expand(channels), reason)
    if ids.shape[1] > 1:
        grid = ids.unflatten(1, (groups, -1))
        state.owners.mix(grid, [2], reason)
    return state.owners.mix(ids, range(2, ids.dim()), reason)


@rule(
    "mean", "sum", "prod", "amax", "amin", "max", "min", "logsumexp", "var", "std", "any", "all", "linalg_vector_norm"
)
def _reduction(state: Propagation, node: fx.Node) -> Tensor:
    ids = state.of(argument(node, 0, "self"))
    names = [each.name for each in node.target._schema.arguments]  # type: ignore[union-attr]
    dims = argument(node, names.index("dim"), "dim") if "dim" in names else None
    if dims is None or dims == []:
        dims = list(range(ids.dim()))
    dims = {dim % ids.dim() for dim in ([dims] if isinstance(dims, int) else dims)}
    ids = state.owners.mix(ids, dims, describe(node))
    value = node.meta["val"]
    rank = (value[0] if isinstance(value, list | tuple) else value).dim()
    if rank == ids.dim():
        return ids
    return ids.reshape([size for axis, size in enumerate(ids.shape) if axis not in dims])


@rule("constant_pad_nd", "pad", "reflection_pad2d", "replication_pad2d", "reflection_pad1d", "replication_pad1d")
def _pad(state: Propagation, node: fx.Node) -> Tensor | None:
    ids, padding = state.of(argument(node, 0, "self")), argument(node, 1, "pad")
    constant = op_name(node) == "constant_pad_nd" or argument(node, 2, "mode", "constant") == "constant"
    for index in range(len(padding) // 2):
        axis = ids.dim() - 1 - index
        before, after = padding[2 * index], padding[2 * index + 1]
        if (before or after) and ids.shape[axis] > 1:
            if not constant or before < 0 or after < 0:
                return None
            pads = [0] * (2 * index) + [before, after]
            ids = torch.nn.functional.pad(ids, pads)  # nobody owns the padding
    return ids
