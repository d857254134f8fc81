"""The pruned model as a graph of ATen operations, for forwards with fixed sizes that no attribute changes."""

import inspect
import logging
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from lnr_prune.calibration.calls import Call
from lnr_prune.collapse.collapse import collapse
from lnr_prune.collapse.plan import Plan
from lnr_prune.collapse.verify import Reference
from lnr_prune.errors import CalibrationError, GraphError, VerificationError
from lnr_prune.graph.closure import close
from lnr_prune.graph.module import named_tensors
from lnr_prune.graph.nodes import argument, shape_of
from lnr_prune.graph.rules import Propagation, propagate
from lnr_prune.graph.sizes import along_axis, counts, shared_axes
from lnr_prune.graph.trace import export, read

logger = logging.getLogger("lnr_prune")


class PrunedGraph(fx.GraphModule):
    """A pruned model as a graph of ATen operations, in evaluation mode only.

    It takes the same positional and keyword arguments as the example that it was traced with, and returns the same
    structure. The first axis of the inputs may have any size, see `batch_size`. All other sizes, and arguments that
    are not tensors, are fixed to those of the example. Parameters and buffers keep their names; those of heads that
    only run in training are left out.

    Attributes:
        batch_size: The only size of the first axis that it takes; None = it takes any.
    """

    @property
    def batch_size(self) -> int | None:
        """The only batch size that it takes, or None."""
        size: int | None = self.meta["batch_size"]
        return size

    def train(self, mode: bool = True) -> "PrunedGraph":
        """Refuses training mode, which the graph does not have."""
        if mode:
            raise GraphError(
                "a pruned graph has the model's forward in evaluation mode only; to train the pruned model, "
                "prune it as a module (into='copy')"
            )
        return self


def pruned_graph(model: nn.Module, plan: Plan, weights: Mapping[str, Tensor], example: Call) -> PrunedGraph:
    """The model without the planned channels, as a graph whose ints are those of the smaller model.

    The first axis of the inputs stays free if torch.export can leave it free. If not, `PrunedGraph.batch_size` is the
    only size that it takes.

    Args:
        model: The whole model; it is left as it is.
        plan: What is kept.
        weights: Full-size values to use instead of the model's own.
        example: Arguments of one forward pass.

    Raises:
        GraphError: If the model cannot be traced.
        VerificationError: If the graph does not equal the masked model.
    """
    traced, checked = _with_samples(example, 2), _with_samples(example, 3)
    if traced is not None and checked is not None:
        try:
            program = export(model, *traced, dynamic_shapes=free_batch(model, example))
            graph = _verified(program, model, plan, weights, checked)
        except (CalibrationError, GraphError, VerificationError):
            logger.warning("the forward of %s fixes the batch size, so the graph does, too", type(model).__name__)
        else:
            graph.meta["batch_size"] = None
            return graph
    graph = _verified(export(model, *example), model, plan, weights, example)
    graph.meta["batch_size"] = next((len(leaf) for leaf in tree_leaves(example) if _batched(leaf)), None)
    return graph


def _batched(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _with_samples(call: Call, count: int) -> Call | None:
    """The call with ``count`` samples, repeated from its own; None if its tensors do not share their first axis."""
    sizes = {len(leaf) for leaf in tree_leaves(call) if _batched(leaf)}
    if len(sizes) != 1 or 0 in sizes:
        return None
    index = torch.arange(count) % sizes.pop()
    resized: Call = tree_map(lambda leaf: leaf[index.to(leaf.device)] if _batched(leaf) else leaf, call)
    return resized


def free_batch(model: nn.Module, call: Call) -> dict[str, Any]:
    """torch.export's dynamic shapes: the first axis of every tensor is left free."""
    arguments = inspect.signature(model.forward).bind(*call[0], **call[1]).arguments
    return {
        name: tree_map(lambda leaf: {0: Dim.AUTO} if _batched(leaf) else None, value)
        for name, value in arguments.items()
    }


def _verified(
    program: ExportedProgram, model: nn.Module, plan: Plan, weights: Mapping[str, Tensor], call: Call
) -> PrunedGraph:
    """The pruned graph, compared in float64 with the masked graph, and in its own dtype with the masked model.

    A graph keeps the dtypes that its model had when it was traced, so only another graph does the same in float64.
    """
    first = {id(tensor): name for name, tensor in reversed(named_tensors(model).items())}
    masked = _module(program)
    names = {name: first.get(id(tensor), name) for name, tensor in named_tensors(masked).items()}
    tensors = {**named_tensors(model), **weights}
    full = {name: tensors[own] for name, own in names.items() if own in tensors}
    graph = _without(program, model, plan)
    indices = {name: plan.indices[own] for name, own in names.items() if own in plan.indices}
    collapse(graph, Plan({}, indices), full)
    Reference(masked, full, call).check(graph)
    Reference(model, weights, call, wide=False).check(graph)
    return graph


def _without(program: ExportedProgram, model: nn.Module, plan: Plan) -> PrunedGraph:
    """The program's graph with the ints of the smaller model, and the whole model's tensors."""
    trace = read(program, model)
    state = propagate(trace)
    label = close(state.owners)
    gone = torch.zeros(len(label), dtype=torch.bool)
    for name, dims in plan.indices.items():
        for dim, kept in dims.items():
            if (name, dim) in state.owners.slots:
                left = torch.ones(trace.tensors[name].shape[dim], dtype=torch.bool)
                left[list(kept)] = False
                gone[label[state.owners.slots[name, dim]][left]] = True
    graph = _module(program)
    _set_ints(graph.graph, state, label, gone)
    graph.recompile()
    return graph


def _module(program: ExportedProgram) -> PrunedGraph:
    """The program as a module, without the checks of what it was traced with."""
    module = program.module()
    for node in reversed(module.graph.nodes):
        if node.target == "_guards_fn" or str(node.target).startswith("aten._assert_tensor_metadata"):
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()  # the parameters of heads that only run in training, among others
    graph = PrunedGraph(module, module.graph)
    for part in graph.modules():
        part.training = False
    return graph


def _set_ints(graph: fx.Graph, state: Propagation, label: Tensor, gone: Tensor) -> None:
    """Sets every int argument that counts channels to the number of those that stay."""
    nodes = {node.name: node for node in graph.nodes}
    known = {node.name: node for node in state.trace.nodes}

    def pruned(value: Any) -> int:
        """The value that an int of the graph will have in the traced call."""
        if not isinstance(value, fx.Node):
            return int(value)
        target: Any = value.target
        if target is torch.ops.aten.sym_size.int:
            source, axis = argument(value, 0, "self"), argument(value, 1, "dim")
            return int((~gone[along_axis(state, label, known[source.name], axis)]).sum())
        if not callable(target):
            raise GraphError(f"{value.name} is an int that depends on the data: the graph cannot follow it")
        return int(target(*map(pruned, value.args)))

    for node in state.trace.nodes:
        for count in counts(state, label, node):
            user = nodes[node.name]
            stay = count.sign * int((~gone[count.units]).sum())
            first, *rest = count.position
            whole = argument(user, first, "")
            old = whole[rest[0]] if rest else whole
            if pruned(old) != stay:
                if isinstance(old, fx.Node):  # in proportion, for any batch size
                    with graph.inserting_before(user):
                        scaled = graph.call_function(operator.mul, (old, stay))
                        new: Any = graph.call_function(operator.floordiv, (scaled, pruned(old)))
                else:
                    new = stay
                if rest:
                    new = [new if index == rest[0] else entry for index, entry in enumerate(whole)]
                user.update_arg(first, new)
        for value, axis, stay in _uniform_operands(state, label, gone, node):
            user, operand = nodes[node.name], nodes[value.name]
            with graph.inserting_before(user):
                part = graph.call_function(torch.ops.aten.slice.Tensor, (operand, axis, 0, stay))
            user.replace_input_with(operand, part)


def _uniform_operands(
    state: Propagation, label: Tensor, gone: Tensor, node: fx.Node
) -> Iterator[tuple[fx.Node, int, int]]:
    """Operands without channels that are as long as an axis that shrinks, such as a bias of zeros for every head."""
    for value in node.all_input_nodes:
        for axis, along in shared_axes(node, value):
            left = gone[along_axis(state, label, node, along)]
            if shape_of(value)[axis] > 1 and state.of(value).shape[axis] == 1 and bool(left.any()):
                yield value, axis, int((~left).sum())
