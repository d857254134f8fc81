"""From an nn.Module to a torch.fx graph of ATen operations whose parameters have names."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from lnr_prune.errors import GraphError, ran_out_of_memory
from lnr_prune.graph.guard import uninterrupted, users_device
from lnr_prune.graph.module import _returning_no_caches, in_mode, named_tensors, unfused_attention

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""Types that sizes have in a graph if they depend on the input."""


@dataclass(frozen=True, eq=False)
class Trace:
    """What a forward pass of the model does.

    Attributes:
        module: The ATen graph, with the submodules that it calls.
        names: Placeholder node -> name of its parameter or buffer; tied tensors share one name.
        tensors: Name -> parameter or buffer.
        constants: Placeholder node -> tensor that the forward creates itself.
    """

    module: fx.GraphModule
    names: Mapping[fx.Node, str]
    tensors: Mapping[str, Tensor]
    constants: Mapping[fx.Node, Any]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The operations, in order of execution."""
        return tuple(self.module.graph.nodes)


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool = False) -> Trace:
    """Exports ``model(*args, **kwargs)``, in evaluation or training mode, to a graph of ATen operations.

    Raises:
        GraphError: If torch.export cannot follow the model's forward.
    """
    return read(export(model, args, kwargs, training=training), model)


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    training: bool = False,
    dynamic_shapes: dict[str, Any] | None = None,
) -> ExportedProgram:
    """``torch.export.export`` of the model, without regions that hide operations.

    Raises:
        GraphError: If torch.export cannot follow the model's forward.
    """
    try:
        with (
            uninterrupted(), in_mode(model, training), unfused_attention(), _returning_no_caches(model),
            users_device(), warnings.catch_warnings(),
        ):  # fmt: skip
            warnings.simplefilter("ignore")  # torch's own warnings
            program = torch.export.export(model, args, dict(kwargs), strict=False, dynamic_shapes=dynamic_shapes)
            if any(_hides_something(node) for node in program.graph.nodes):
                program = program.run_decompositions({})  # inlines regions, replaces writes through views
    except Exception as error:  # torch.export raises errors of many kinds
        if ran_out_of_memory(error):
            raise GraphError(
                f"{type(model).__name__} ran out of memory while it was traced: give smaller batches"
            ) from error
        raise GraphError(
            f"torch.export could not trace {type(model).__name__}: {str(error).strip().splitlines()[0]}. "
            "Make the forward traceable (torch.export.export(model, args, strict=False) must pass), "
            "or prune the traceable submodule that holds the layers"
        ) from error
    return program


def read(program: ExportedProgram, model: nn.Module) -> Trace:
    """The trace of an exported program of the model; sizes are those of the traced call."""
    signature = program.graph_signature
    placeholders = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    state = named_tensors(model)
    first: dict[int, str] = {}
    canonical = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}
    names, constants = {}, {}
    module = _with_known_sizes(program.graph_module)
    module.graph.eliminate_dead_code()  # such as attention weights that nobody uses
    for node in module.graph.nodes:
        if node.op == "placeholder" and placeholders.get(node.name) in canonical:
            names[node] = canonical[placeholders[node.name]]
        elif node.op == "placeholder" and node.name in signature.inputs_to_lifted_tensor_constants:
            constants[node] = program.constants[signature.inputs_to_lifted_tensor_constants[node.name]]
    tensors = {name: state[name] for name in names.values()}
    return Trace(module, names, tensors, constants)


def _with_known_sizes(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with the traced call's ints in place of symbols; its nodes keep their names."""

    def known(value: Any) -> Any:
        if isinstance(value, SYMBOLS):
            return value.node.hint
        if isinstance(value, Tensor) and any(isinstance(size, SYMBOLS) for size in value.shape):
            return value.new_empty(known(tuple(value.shape)), device="meta")
        if isinstance(value, tuple | list):
            return type(value)(known(part) for part in value)
        return value

    if not any(isinstance(node.meta.get("val"), SYMBOLS) for node in module.graph.nodes):
        return module
    graph, copies = fx.Graph(), {}
    for node in module.graph.nodes:
        if isinstance(node.meta.get("val"), SYMBOLS):
            copies[node] = known(node.meta["val"])
        elif not str(node.target).startswith(("aten._assert_", "aten.sym_constrain")):
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {**node.meta, "val": known(node.meta.get("val"))}
    return fx.GraphModule(module, graph)


def _hides_something(node: fx.Node) -> bool:
    """Whether a node runs a region of its own, or writes to a tensor through a view of it."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or not node.all_input_nodes:
        return False
    written = node.all_input_nodes[0]
    return getattr(written.target, "is_view", False) or any(user > node for user in written.users)
