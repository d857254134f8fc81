"""Rules for products, of an activation and a weight or of two activations: matrix products, einsum, attention."""

import math

import torch
from torch import Tensor, fx

from lnr_prune.graph.nodes import argument, describe, shape_of
from lnr_prune.graph.operations.layers import apply_weight
from lnr_prune.graph.owners import nobody, varying_axes
from lnr_prune.graph.rules import Propagation, meet, rule
from lnr_prune.graph.weights import View, contraction, spelled


@rule("matmul", "mm", "bmm")
def _product(state: Propagation, node: fx.Node) -> Tensor | None:
    """Mixes the axis that is summed, which is the same in both; reads it, if the second one is a weight."""
    a, b = argument(node, 0, "self"), argument(node, 1, "other")
    left, right = shape_of(a), shape_of(b)
    if b in state.views and a not in state.views and _is_weight(state.views[b], left):
        return apply_weight(state, node, (a, b, None), -1, rows=-1, columns=-2)
    if a in state.views and b not in state.views and len(right) > 1 and _is_weight(state.views[a], right):
        return apply_weight(state, node, (b, a, None), -2, rows=-2, columns=-1)
    if len(left) < 2 or len(right) < 2:
        return None
    reason = describe(node)
    _count_product(state, math.prod(shape_of(node)) * left[-1], state.of(a), state.of(b))
    rows = state.owners.mix(state.of(a), [len(left) - 1], reason)
    columns = state.owners.mix(state.of(b), [len(right) - 2], reason)
    _couple_contracted(state, state.of(a).movedim(-1, 0), state.of(b).movedim(-2, 0), reason)
    return meet(state, node, [(rows, (*left[:-1], 1)), (columns, (*right[:-2], 1, right[-1]))])


def _is_weight(view: View, x: tuple[int, ...]) -> bool:
    """Whether a product applies a view to an activation of this shape as a weight: as a matrix, or part by part."""
    return len(view.dims) == 2 or (view.stacked and len(x) > 2)


@rule("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
def _grouped_product(state: Propagation, node: fx.Node) -> Tensor | None:
    """Every part of a stack is applied to rows of its own, which lie one after the other."""
    x, weight = node.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or weight not in state.views:
        return None
    if not state.views[weight].stacked or len(shape_of(x)) != 2 or argument(node, 3, "bias") is not None:
        return None
    multiple = max(1, 16 // x.meta["val"].element_size())  # torch's kernel reads 16 bytes at a time
    return apply_weight(state, node, (x, weight, None), -1, rows=2, columns=1, multiple=multiple)


def _count_product(state: Propagation, macs: int, *ids: Tensor) -> None:
    """Counts multiply-accumulates of activations; they fall at least as fast as the channels of the larger one."""
    state.products.append((macs, max(ids, key=Tensor.numel)))


def _couple_contracted(state: Propagation, a: Tensor, b: Tensor, reason: str) -> None:
    """The contracted axis, here the first, shrinks on both sides or on neither."""
    if len(a) > 1 or len(b) > 1:
        one, other = (of.reshape(len(of), -1)[:, :1] if len(of) > 1 else nobody((1, 1)) for of in (a, b))
        state.owners.couple(one, other, reason)


@rule("einsum")
def _einsum(state: Propagation, node: fx.Node) -> Tensor | None:
    """A sum of products, of one or two operands: mixes the axes that are summed, which are the same in both."""
    equation, values = str(node.args[0]), argument(node, 1, "tensors")
    found = spelled(equation, [len(shape_of(value)) for value in values]) if len(values) < 3 else None
    layer = _linear_einsum(state, node, equation, values) if len(values) == 2 else None
    if found is None or layer is not None:
        return layer
    labels, target = found
    if any(len(set(part)) < len(part) for part in labels):
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
        _couple_contracted(state, left, right, reason)
    return meet(state, node, operands)


def _linear_einsum(state: Propagation, node: fx.Node, equation: str, values: list[fx.Node]) -> Tensor | None:
    """An einsum that applies a weight."""
    weights = [index for index, value in enumerate(values) if value in state.views]
    if len(weights) != 1:
        return None
    w, x = values[weights[0]], values[1 - weights[0]]
    found = contraction(equation, (len(shape_of(values[0])), len(shape_of(values[1]))), weights[0])
    ids = state.of(x)
    if found is None or (ids.shape[found.x[-1]] == 1 and varying_axes(ids)):  # it mixes positions, not channels
        return None
    if len(found.weight) == 3 and not (state.views[w].stacked and found.weight[0] == 0):
        return None
    *_, rows, columns = found.weight
    return apply_weight(state, node, (x, w, None), found.x[-1], rows, columns, output_axis=found.y[-1])


@rule("scaled_dot_product_attention")
def _attention(state: Propagation, node: fx.Node) -> Tensor | None:
    """Heads leave as a whole, from queries, keys and values; the axis of the values' features is free."""
    q, k, v = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    mask, reason, owners = argument(node, 3, "attn_mask"), describe(node), state.owners
    rank, heads = len(shape_of(q)), shape_of(q)[:-2]
    if argument(node, 4, "dropout_p", 0.0) and not state.trace.training:
        return None  # random numbers are drawn for each head
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
