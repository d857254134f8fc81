"""Rules for operations on images and other grids, channel by channel: pooling, interpolation, sampling, padding."""

import torch
from torch import Tensor, fx

from lnr_prune.graph.nodes import argument, describe, op_name, shape_of, spatial_axes
from lnr_prune.graph.rules import Propagation, meet, rule

POOLS = {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)} | {
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
    *(f"upsample_{kind}" for kind in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")),
    *(f"upsample_nearest{n}d" for n in (1, 2, 3)),
    *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)),
    *(f"_upsample_{kind}2d_aa" for kind in ("bilinear", "bicubic", "lanczos")),
}


@rule(*POOLS)
def _pool(state: Propagation, node: fx.Node) -> Tensor:
    """Mixes the last axes, as many as its name says."""
    ids = state.of(argument(node, 0, "self"))
    return state.owners.mix(ids, range(ids.dim() - spatial_axes(node), ids.dim()), describe(node))


@rule("max_unpool2d", "max_unpool3d")
def _unpool(state: Propagation, node: fx.Node) -> Tensor:
    """Mixes the last axes, as many as its name says; a channel's values go where its own indices say."""
    rank, operands = len(shape_of(node)), []
    spatial = range(rank - spatial_axes(node), rank)
    for value in (argument(node, 0, "self"), argument(node, 1, "indices")):
        ids = state.owners.mix(state.of(value), spatial, describe(node))
        operands.append((ids, tuple(1 if axis in spatial else size for axis, size in enumerate(state.extent(value)))))
    return meet(state, node, operands)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def _grid_sampler(state: Propagation, node: fx.Node) -> Tensor:
    """Mixes all axes after the channels', and the grid's last one; every channel is read at the same places."""
    x, grid = argument(node, 0, "input"), argument(node, 1, "grid")
    rank, reason = len(shape_of(node)), describe(node)
    ids = state.owners.mix(state.of(x), range(2, rank), reason)
    places = state.owners.mix(state.of(grid), [rank - 1], reason).movedim(-1, 1)
    size = state.extent(grid)
    return meet(state, node, [(ids, (*shape_of(x)[:2], *[1] * (rank - 2))), (places, (size[0], 1, *size[1:-1]))])


@rule("col2im")
def _fold(state: Propagation, node: fx.Node) -> Tensor:
    """Blocks are laid over an image: those of one channel leave together."""
    ids, reason = state.of(argument(node, 0, "self")), describe(node)
    ids = state.owners.mix(ids, [ids.dim() - 1], reason)
    if ids.shape[-2] > 1:
        ids = state.owners.mix(ids.unflatten(-2, (shape_of(node)[-3], -1)), [ids.dim() - 1], reason).squeeze(-2)
    return ids.unsqueeze(-1)


@rule(
    "constant_pad_nd", "pad", *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3))
)  # fmt: skip
def _pad(state: Propagation, node: fx.Node) -> Tensor | None:
    """Along an axis of channels, constants are added that nobody owns; nothing may be taken off there."""
    ids, padding = state.of(argument(node, 0, "self")), argument(node, 1, "pad")
    constant = op_name(node) == "constant_pad_nd" or argument(node, 2, "mode", "constant") == "constant"
    constant = constant and not op_name(node).startswith("re")
    for index in range(len(padding) // 2):
        axis = ids.dim() - 1 - index
        before, after = padding[2 * index], padding[2 * index + 1]
        if (before or after) and ids.shape[axis] > 1:
            if not constant or before < 0 or after < 0:
                return None
            pads = [0] * (2 * index) + [before, after]
            ids = torch.nn.functional.pad(ids, pads)  # nobody owns the padding
    return ids
