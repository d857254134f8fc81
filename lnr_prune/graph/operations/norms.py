"""Rules for operations that mix along some axes, and keep them: softmax, sorting, Fourier transforms, norms."""

from torch import Tensor, fx

from lnr_prune.graph.nodes import argument, axes_argument, describe, named_argument, op_name, shape_of
from lnr_prune.graph.owners import collapse_axes
from lnr_prune.graph.rules import Propagation, meet, rule


@rule(
    "softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "special_softmax", "special_log_softmax",
    "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort",
)  # fmt: skip
def _along_one_axis(state: Propagation, node: fx.Node) -> Tensor:
    """Mixes one axis."""
    ids = state.of(argument(node, 0, "self"))
    return state.owners.mix(ids, axes_argument(node, ids.dim()), describe(node))


@rule("diff")
def _difference(state: Propagation, node: fx.Node) -> Tensor | None:
    """Mixes one axis."""
    if len(node.all_input_nodes) > 1:  # something is put before or behind
        return None
    ids = state.of(argument(node, 0, "self"))
    return state.owners.mix(ids, axes_argument(node, ids.dim()), describe(node))


@rule(
    *(f"fft_{kind}{n}" for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft") for n in ("", "2", "n")),
    "fft_fftshift", "fft_ifftshift",
)  # fmt: skip
def _fourier(state: Propagation, node: fx.Node) -> Tensor:
    """Mixes the axes that it transforms or shifts."""
    ids, sizes = state.of(argument(node, 0, "self")), named_argument(node, "s")
    axes = axes_argument(node, ids.dim())
    if named_argument(node, "dim") is None and sizes is not None:
        axes = axes[-len(sizes) :]
    return state.owners.mix(ids, axes, describe(node))


@rule(
    "cholesky", "inverse", "linalg_cholesky", "linalg_inv", "linalg_matrix_exp", "linalg_matrix_power", "linalg_pinv",
    "matrix_exp", "matrix_power", "pinverse",
)  # fmt: skip
def _matrices(state: Propagation, node: fx.Node) -> Tensor:
    """Mixes the last two axes."""
    ids = state.of(argument(node, 0, "self"))
    return state.owners.mix(ids, [ids.dim() - 2, ids.dim() - 1], describe(node))


@rule("glu")
def _glu(state: Propagation, node: fx.Node) -> Tensor:
    """Couples the halves of one axis."""
    x, axis = argument(node, 0, "self"), argument(node, 1, "dim", -1)
    shape = shape_of(x)
    halves = state.of(x).expand(shape).chunk(2, axis)
    state.owners.grids.append(collapse_axes(state.of(x).expand(shape).unflatten(axis, (2, -1))))
    return meet(state, node, [(collapse_axes(half), shape_of(node)) for half in halves])


@rule("batch_norm", "_native_batch_norm_legit_no_training", "prelu", "_prelu_kernel", "instance_norm")
def _per_channel(state: Propagation, node: fx.Node) -> Tensor | None:
    """Parameters belong to axis 1, and leave with it; statistics of the batch mix the other axes."""
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
    """Mixes the last axes, as many as it normalizes."""
    x, normalized = argument(node, 0, "input"), argument(node, 1, "normalized_shape")
    parameters = [entry for entry in node.args[2:4] if isinstance(entry, fx.Node)]
    ids = meet(
        state, node, [(state.of(x), shape_of(x)), *((state.of(p), shape_of(p)) for p in parameters)], shape_of(x)
    )
    return state.owners.mix(ids, range(ids.dim() - len(normalized), ids.dim()), describe(node))


@rule("group_norm", "native_group_norm")
def _group_norm(state: Propagation, node: fx.Node) -> Tensor | None:
    """Whole groups of axis 1 leave; the axes behind are mixed."""
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
