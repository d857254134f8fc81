"""Rules for operations that mix along some axes: softmax, norms, reductions."""

from torch import Tensor, fx

from lnr_prune.graph.nodes import argument, describe, op_name, shape_of
from lnr_prune.graph.owners import collapse_axes, nobody
from lnr_prune.graph.rules import Propagation, meet, rule


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


@rule("topk", "argmax", "argmin")
def _choice(state: Propagation, node: fx.Node) -> list[Tensor] | Tensor:
    """Whoever gets the choice counts on the numbers of the channels: the experts of a router stay."""
    ids, value = state.of(argument(node, 0, "self")), node.meta["val"]
    reason = f"chosen by their number in {describe(node)}, as the experts of a router are"
    if argument(node, 2 if op_name(node) == "topk" else 1, "dim", -1) is None:
        return nobody(())
    state.owners.freeze(ids, reason)
    state.owners.numbered.append((ids, reason))
    return [nobody(part.shape) for part in value] if isinstance(value, list | tuple) else nobody(value.shape)
