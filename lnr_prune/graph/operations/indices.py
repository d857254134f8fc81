"""Rules for operations that read or write at the positions that an index or a mask names.

What is indexed can only leave as a whole, because the indices stay as they are; so it does not matter what they are.
"""

import torch
from torch import Tensor, fx

from lnr_prune.graph.nodes import argument, describe, named_argument, op_name, shape_of
from lnr_prune.graph.owners import collapse_axes
from lnr_prune.graph.rules import Operand, Propagation, meet, rule


def _single(operand: Operand, axes: set[int]) -> Operand:
    """The operand, of size 1 along these axes; its ids no longer vary on them."""
    ids, size = operand
    return ids, tuple(1 if axis in axes else length for axis, length in enumerate(size))


def _read(state: Propagation, value: fx.Node, axes: set[int], reason: str) -> Operand:
    """A value of which whole axes are read or written at unknown positions."""
    return _single((state.owners.mix(state.of(value), sorted(axes), reason), state.extent(value)), axes)


def _keep(state: Propagation, node: fx.Node, *indices: fx.Node) -> None:
    """Indices that channels compute would change if these left."""
    for index in indices:
        state.owners.freeze(state.of(index), f"decides what is picked in {describe(node)}")


@rule("index_select")
def _select(state: Propagation, node: fx.Node) -> Tensor:
    """Mixes the indexed axis."""
    x, axis = argument(node, 0, "self"), argument(node, 1, "dim") % len(shape_of(node))
    _keep(state, node, argument(node, 2, "index"))
    return state.owners.mix(state.of(x), [axis], f"fixed positions in {describe(node)}")


@rule("index")
def _index(state: Propagation, node: fx.Node) -> Tensor:
    """Mixes the indexed axes."""
    x, given = argument(node, 0, "self"), argument(node, 1, "indices")
    tensors = [index for index in given if index is not None]
    _keep(state, node, *tensors)
    axes: list[int] = []
    places: list[Tensor | None] = []
    for index in given:
        if index is None:
            places.append(None)
            continue
        mask = index.meta["val"].dtype in (torch.bool, torch.uint8)  # it covers several axes, and makes one
        covered, rank = (len(shape_of(index)), 1) if mask else (1, len(shape_of(index)))
        axes += range(len(places), len(places) + covered)
        places += [torch.zeros([1] * rank, dtype=torch.long)] * covered
    ids = state.owners.mix(state.of(x), axes, f"fixed positions in {describe(node)}")
    return collapse_axes(torch.ops.aten.index.Tensor(ids, places))


@rule("gather", "take_along_dim")
def _gather(state: Propagation, node: fx.Node) -> Tensor | None:
    """Mixes the indexed axis; along the others, every channel is read at the positions of its own."""
    x, index, dim = (
        argument(node, 0, "self"),
        named_argument(node, "index") or argument(node, 1, "indices"),
        named_argument(node, "dim"),
    )
    if dim is None:
        return None
    reason, axis = f"fixed positions in {describe(node)}", dim % len(shape_of(x))
    same = {1} if op_name(node) == "take_along_dim" else set()  # it broadcasts; gather reads the first ones
    cut = {k for k, size in enumerate(shape_of(x)) if shape_of(index)[k] not in {size} | same}
    return meet(state, node, [_read(state, value, {axis} | cut, reason) for value in (x, index)])


@rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(state: Propagation, node: fx.Node) -> Tensor:
    """Mixes the indexed axis; along the others, every channel is written at the positions of its own."""
    x, index, src = argument(node, 0, "self"), argument(node, 2, "index"), named_argument(node, "src")
    values = [value for value in (x, index, src) if isinstance(value, fx.Node)]
    axis, shape = argument(node, 1, "dim") % len(shape_of(x)), shape_of(x)
    partly = {k for k in range(len(shape)) if any(shape_of(value)[k] != shape[k] for value in values)}
    axes = {axis} | partly  # where an index is shorter, only the first ones are written
    return meet(state, node, [_read(state, value, axes, describe(node)) for value in values])


@rule("index_add", "index_copy", "index_reduce", "index_fill", "select_scatter")
def _write_rows(state: Propagation, node: fx.Node) -> Tensor:
    """Mixes the indexed axis."""
    x, index, axes = (
        argument(node, 0, "self"),
        named_argument(node, "index"),
        {named_argument(node, "dim") % len(shape_of(node))},
    )
    if isinstance(index, fx.Node):
        _keep(state, node, index)
    operands = [_read(state, x, axes, describe(node))]
    source = next(
        (each for name in ("source", "src", "value") if isinstance(each := named_argument(node, name), fx.Node)), None
    )
    if source is not None and len(shape_of(source)) < len(shape_of(x)):
        ids, size = state.of(source), state.extent(source)
        (axis,) = axes
        operands.append((ids.unsqueeze(axis), (*size[:axis], 1, *size[axis:])) if shape_of(source) else (ids, size))
    elif source is not None:
        operands.append(_read(state, source, axes, describe(node)))
    return meet(state, node, operands)


@rule("index_put")
def _index_put(state: Propagation, node: fx.Node) -> Tensor | None:
    """Mixes the indexed axes; a mask chooses, element by element, and mixes nothing."""
    x, given, values = argument(node, 0, "self"), argument(node, 1, "indices"), argument(node, 2, "values")
    indices = {axis: index for axis, index in enumerate(given) if index is not None}
    masks = [axis for axis, index in indices.items() if index.meta["val"].dtype == torch.bool]
    ids, rank, reason = state.of(x), len(shape_of(x)), describe(node)
    written = state.of(values), state.extent(values)
    if masks and len(indices) > 1:
        return None
    if masks:
        (first,), (mask,) = masks, indices.values()
        after = rank - first - len(shape_of(mask))
        if max(written[1], default=1) > 1 and len(written[1]) > after:
            if len(written[1]) > after + 1 or written[1][0] > 1:
                return None  # the values' order is that of what is True
            written = written[0].squeeze(0), written[1][1:]
        if max(written[1], default=1) == 1:
            written = written[0].reshape(()), ()
        chosen = state.of(mask).reshape([*[1] * first, *state.of(mask).shape, *[1] * after])
        return meet(
            state, node, [(ids, shape_of(x)), (chosen, (*[1] * first, *state.extent(mask), *[1] * after)), written]
        )
    _keep(state, node, *indices.values())
    places = max(len(shape_of(index)) for index in indices.values())
    whole = rank - len(indices) + places
    adjacent = max(indices) - min(indices) == len(indices) - 1
    start = min(indices) if adjacent else 0
    lead = [1] * (whole - len(written[1]))
    new = state.owners.mix(written[0].reshape([*lead, *written[0].shape]), range(start, start + places), reason)
    kept = [axis for axis in range(whole) if not start <= axis < start + places]
    sizes = [(*lead, *written[1])[axis] for axis in kept]
    shapes = [new.shape[axis] for axis in kept]
    for axis in sorted(indices):
        sizes.insert(axis, 1)
        shapes.insert(axis, 1)
    return meet(state, node, [_read(state, x, set(indices), reason), (new.reshape(shapes), tuple(sizes))])


@rule("masked_scatter")
def _masked_scatter(state: Propagation, node: fx.Node) -> Tensor | None:
    """If the mask is the same along the last axis, whole rows of the source are copied; it mixes these rows."""
    x, mask, source = argument(node, 0, "self"), argument(node, 1, "mask"), argument(node, 2, "source")
    shape, size, chosen = shape_of(x), state.extent(source), state.extent(mask)
    ids, where = (state.of(x), shape), (state.of(mask), chosen)
    if max(size, default=1) == 1:
        return meet(state, node, [ids, where, (state.of(source).reshape(()), ())])
    if chosen[-1:] not in ((), (1,)) or len(shape_of(source)) < 2 or shape_of(source)[-1] != shape[-1]:
        return None
    rows = state.owners.mix(state.of(source), range(len(size) - 1), describe(node)).reshape(
        [*[1] * (len(shape) - 1), -1]
    )
    return meet(state, node, [ids, where, (rows, (*shape[:-1], size[-1]))])
