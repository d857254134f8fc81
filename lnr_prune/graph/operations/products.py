"""Rules for products of two activations: matrix products, einsum, attention."""

import math

import torch
from torch import Tensor, fx

from lnr_prune.graph.nodes import argument, describe, shape_of
from lnr_prune.graph.operations.layers import apply_weight
from lnr_prune.graph.rules import Propagation, meet, rule


@rule("matmul", "mm", "bmm")
def _product(state: Propagation, node: fx.Node) -> Tensor | None:
    """Mixes the axis that is summed, which is the same in both; reads it, if the second one is a weight."""
    a, b = argument(node, 0, "self"), argument(node, 1, "other")
    left, right = shape_of(a), shape_of(b)
    if len(right) == 2 and b in state.trace.names:
        return apply_weight(state, node, (a, b, None), len(shape_of(node)) - 1, rows=1, columns=0)
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
    """A sum of products, of one or two operands: mixes the axes that are summed, which are the same in both."""
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
