"""Rules for reductions and choices: what they work along can only leave as a whole."""

from collections.abc import Collection

import torch
from torch import Tensor, fx

from lnr_prune.graph.nodes import argument, axes_argument, describe, named_argument, op_name, shape_of
from lnr_prune.graph.rules import Propagation, meet, rule

NORMS = {"norm", "frobenius_norm", "linalg_norm", "linalg_matrix_norm", "linalg_vector_norm"}


def reduced(state: Propagation, node: fx.Node, ids: Tensor, axes: Collection[int]) -> Tensor:
    """The ids of a reduction along these axes, which the result keeps if the operation is told to."""
    ids = state.owners.mix(ids, axes, describe(node))
    if named_argument(node, "keepdim"):
        return ids
    return ids.reshape([size for axis, size in enumerate(ids.shape) if axis not in axes])


@rule(
    "mean", "nanmean", "sum", "nansum", "prod", "amax", "amin", "aminmax", "max", "min", "median", "nanmedian", "mode",
    "kthvalue", "quantile", "nanquantile", "logsumexp", "special_logsumexp", "var", "std", "var_mean", "std_mean",
    "any", "all", "count_nonzero", *NORMS,
)  # fmt: skip
def _reduction(state: Propagation, node: fx.Node) -> Tensor | None:
    """Mixes the axes that it reduces."""
    other, q = named_argument(node, "other"), named_argument(node, "q")
    ids = state.of(argument(node, 0, "self"))
    if other is not None:  # the larger of two
        return meet(state, node, [(state.of(value), state.extent(value)) for value in node.all_input_nodes])
    if isinstance(q, fx.Node) and shape_of(q):  # a new axis for the quantiles
        return None
    return reduced(state, node, ids, axes_argument(node, ids.dim()))


@rule("topk", "argmax", "argmin")
def _choice(state: Propagation, node: fx.Node) -> Tensor:
    """Mixes the axis along which it chooses: what is chosen by its number, such as an expert by a router, stays."""
    ids = state.of(argument(node, 0, "self"))
    axes = axes_argument(node, ids.dim())
    if ids.numel() == 1 or any(ids.shape[axis] > 1 for axis in axes):  # 1: mixed before, as by a softmax
        state.owners.numbered.append((ids[ids != 0], f"chosen by their number in {describe(node)}"))
    return state.owners.mix(ids, axes, describe(node)) if op_name(node) == "topk" else reduced(state, node, ids, axes)


@rule("cosine_similarity", "pairwise_distance", "linalg_vecdot", "linalg_cross")
def _between_two(state: Propagation, node: fx.Node) -> Tensor:
    """Couples what is compared, and mixes the axis along which it is."""
    values = node.all_input_nodes
    sizes = [state.extent(value) for value in values]
    shape = torch.broadcast_shapes(*(shape_of(value) for value in values))
    ids = meet(state, node, [(state.of(value), size) for value, size in zip(values, sizes, strict=True)], shape)
    dim = named_argument(node, "dim")
    axis = (-1 if dim is None else dim) % len(shape)  # pairwise_distance has no such argument
    if op_name(node) == "linalg_cross":
        return state.owners.mix(ids, [axis], describe(node))
    return reduced(state, node, ids, [axis])
