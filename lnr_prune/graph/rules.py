"""How ownership passes through ATen operations; an operation without a rule freezes what it touches."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lnr_prune.graph.owners import Owners, Slot, along, collapse_axes, nobody
from lnr_prune.graph.trace import Trace

logger = logging.getLogger("lnr_prune")
TORCH = str(Path(torch.__file__).parent)

# Only the view of the data changes: the operation itself is run on the ids.
MOVES = {
    "alias", "clone", "contiguous", "detach", "expand", "flatten", "permute", "reshape", "squeeze", "t",
    "transpose", "unflatten", "unsqueeze", "view",
}  # fmt: skip
SAME = {"dropout", "feature_dropout", "alpha_dropout", "to", "_to_copy", "type_as"}
# Pointwise operations that lack PyTorch's tag for it.
POINTWISE = {"hardswish", "hardsigmoid", "softplus", "relu6", "selu", "elu", "celu", "gelu", "prelu"}
POOLS = {
    f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)
} | {f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "bilinear2d", "bicubic2d")}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """A place where a weight is applied to an activation: ``y = W x``.

    Attributes:
        weight: Name of the weight.
        bias: Name of the bias, if any.
        op: ATen name of the operation, such as "linear" or "conv2d".
        rows: The weight's dimension of outputs.
        columns: The weight's dimension of inputs.
    """

    weight: str
    bias: str | None
    op: str
    rows: Slot
    columns: Slot


@dataclass(eq=False)
class Propagation:
    """Ownership of every value in a trace."""

    trace: Trace
    owners: Owners
    ids: dict[fx.Node, Tensor]
    sites: list[Site]

    def of(self, node: fx.Node) -> Tensor:
        """The ids of a value. A parameter that is used as a value owns itself, if it varies on one axis."""
        if node not in self.ids:
            shape = shape_of(node)
            varying = [axis for axis, size in enumerate(shape) if size > 1]
            name = self.trace.names.get(node)
            if name is not None and len(varying) == 1:
                self.ids[node] = along(self.owners.slot(name, varying[0]), varying[0], shape)
            else:
                self.ids[node] = nobody(shape)
                if name is not None:
                    self.owners.freeze_parameter(name, "a parameter used as a value")
        return self.ids[node]


Rule = Callable[[Propagation, fx.Node], Tensor | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of some ATen operations; it returns None where it does not apply."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def propagate(trace: Trace) -> Propagation:
    """Walks the graph once and returns the ownership of every value."""
    state = Propagation(trace, Owners(trace.tensors), {}, [])
    for node in trace.nodes:
        if node.op == "output":
            for value in node.all_input_nodes:
                state.owners.freeze(state.of(value), "output of the model")
        elif node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            ids = _visit(state, node)
            state.ids[node] = ids
            if sum(size > 1 for size in ids.shape) > 1:
                state.owners.grids.append(ids)
        elif node.op == "call_function" and not op_name(node).startswith("_assert"):
            _freeze_inputs(state, node)  # several outputs, or none
    return state


def describe(node: fx.Node) -> str:
    """Which operation a node is, in which module, and the line of code that calls it."""
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    path = modules[-1][0] if modules else ""
    lines = [
        line.strip()
        for line in (node.meta.get("stack_trace") or "").splitlines()
        if line.strip().startswith("File") and TORCH not in line
    ]
    where = ", ".join(part for part in (path, lines[-1] if lines else "") if part)
    return f"{op_name(node)} ({where})" if where else op_name(node)


def op_name(node: fx.Node) -> str:
    """ATen name of a node's operation, without overload and namespace; in-place variants like the others."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[1] if schema else getattr(node.target, "__name__", str(node.target))
    return name if name.startswith("__") else str(name).rstrip("_")


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's value; () where it is not a tensor."""
    return tuple(int(size) for size in getattr(node.meta.get("val"), "shape", ()))


def spatial_axes(node: fx.Node) -> int:
    """2 for "conv2d", 1 for "max_pool1d", ..."""
    return int(op_name(node).removesuffix("d")[-1])


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a node, by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _visit(state: Propagation, node: fx.Node) -> Tensor:
    touches_parameter = any(value in state.trace.names for value in node.all_input_nodes)
    if not touches_parameter and not any(bool(state.of(value).any()) for value in node.all_input_nodes):
        return nobody(shape_of(node))
    try:
        ids = _apply_rule(state, node)
    except Exception:  # a rule that does not expect this use of its operation: less is pruned
        logger.debug("the rule of %s failed", describe(node), exc_info=True)
        ids = None
    return _freeze_inputs(state, node) if ids is None else ids


def _apply_rule(state: Propagation, node: fx.Node) -> Tensor | None:
    name = op_name(node)
    if name in RULES:
        return RULES[name](state, node)
    if name in MOVES:
        return _move(state, node)
    if name in SAME:
        return state.of(argument(node, 0, "self"))
    if name in POOLS:
        return _pool(state, node)
    if name in POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _meet(state, node)
    return None


def _freeze_inputs(state: Propagation, node: fx.Node) -> Tensor:
    reason = describe(node)
    for value in node.all_input_nodes:
        if value in state.trace.names:
            state.owners.freeze_parameter(state.trace.names[value], reason)
        else:
            state.owners.freeze(state.of(value), reason)
    return nobody(shape_of(node))


def _move(state: Propagation, node: fx.Node) -> Tensor:
    source = argument(node, 0, "self")
    ids = state.of(source).expand(shape_of(source))
    target: Any = torch.reshape if op_name(node) == "view" else node.target  # expanded ids cannot be viewed
    options = {key: value for key, value in node.kwargs.items() if key != "memory_format"}
    return collapse_axes(target(ids, *node.args[1:], **options))


def _pool(state: Propagation, node: fx.Node) -> Tensor:
    ids = state.of(argument(node, 0, "self"))
    return state.owners.mix(ids, range(ids.dim() - spatial_axes(node), ids.dim()), describe(node))


def _meet(state: Propagation, node: fx.Node) -> Tensor:
    """Pointwise: what meets is coupled; what meets an unowned value that varies with it is frozen."""
    shape, reason = shape_of(node), describe(node)
    met = nobody(shape)
    operands = []
    for value in node.all_input_nodes:
        lead = [1] * (len(shape) - len(shape_of(value)))
        operands.append((state.of(value).reshape(lead + list(state.of(value).shape)), lead + list(shape_of(value))))
    for ids, _ in operands:
        if bool(ids.any()):
            if bool(met.any()):
                state.owners.couple(met, ids, reason)
                met = torch.where(met != 0, met, ids)
            else:
                met = ids
    for ids, size in operands:
        if not bool(ids.any()) and any(a > 1 and b > 1 for a, b in zip(met.shape, size, strict=True)):
            state.owners.freeze(met, f"meets a value of no known channel in {reason}")
    return met


@rule("linear", "conv1d", "conv2d", "conv3d")
def _contraction(state: Propagation, node: fx.Node) -> Tensor | None:
    x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    names, owners, reason = state.trace.names, state.owners, describe(node)
    if weight not in names or (bias is not None and bias not in names):  # a computed weight
        return None
    name, shape = names[weight], shape_of(node)
    axis = len(shape) - 1 - (0 if op_name(node) == "linear" else spatial_axes(node))
    rows = owners.slot(name, 0)
    groups = argument(node, 6, "groups", 1)
    if groups == 1:
        owners.couple_axis(state.of(x), axis, owners.slot(name, 1), f"input of {reason}")
        state.sites.append(Site(name, names.get(bias), op_name(node), (name, 0), (name, 1)))
    elif groups == shape_of(x)[axis] == len(rows):  # depthwise: channel by channel
        owners.couple_axis(state.of(x), axis, rows, f"input of {reason}")
    else:
        return None
    if bias is not None:
        owners.couple(rows, owners.slot(names[bias], 0), reason)
    return along(rows, axis, shape)


@rule("batch_norm")
def _batch_norm(state: Propagation, node: fx.Node) -> Tensor | None:
    ids, reason = state.of(argument(node, 0, "self")), describe(node)
    for entry in node.args[1:5]:
        if isinstance(entry, fx.Node):
            name = state.trace.names.get(entry)
            if name is None:
                return None
            state.owners.couple_axis(ids, 1, state.owners.slot(name, 0), reason)
    return ids


@rule("mean", "sum", "amax", "amin")
def _reduction(state: Propagation, node: fx.Node) -> Tensor | None:
    source = argument(node, 0, "self")
    ids = state.of(source)
    dims = argument(node, 1, "dim") or list(range(ids.dim()))
    dims = {dim % ids.dim() for dim in ([dims] if isinstance(dims, int) else dims)}
    ids = state.owners.mix(ids, dims, describe(node))
    if len(shape_of(node)) == ids.dim():
        return ids
    return ids.reshape([size for axis, size in enumerate(ids.shape) if axis not in dims])


@rule("cat")
def _concatenation(state: Propagation, node: fx.Node) -> Tensor:
    full = [state.of(value).expand(shape_of(value)) for value in argument(node, 0, "tensors")]
    return collapse_axes(torch.cat(full, argument(node, 1, "dim", 0)))
