"""Rules for operations on images, channel by channel: pooling, interpolation, padding."""

import torch
from torch import Tensor, fx

from lnr_prune.graph.nodes import argument, describe, op_name, spatial_axes
from lnr_prune.graph.rules import Propagation, rule

POOLS = {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)} | {
    "max_pool2d_with_indices",
    *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "bilinear2d", "bicubic2d")),
}


@rule(*POOLS)
def _pool(state: Propagation, node: fx.Node) -> Tensor:
    ids = state.of(argument(node, 0, "self"))
    return state.owners.mix(ids, range(ids.dim() - spatial_axes(node), ids.dim()), describe(node))


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
