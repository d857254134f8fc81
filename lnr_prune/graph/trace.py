"""From an nn.Module to a torch.fx graph of ATen operations whose parameters have names."""

import functools
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.utils.rnn import PackedSequence

from lnr_prune.errors import GraphError, ran_out_of_memory
from lnr_prune.graph.module import failing_layer, in_mode, named_tensors, unfused_attention, without_caches
from lnr_prune.graph.modules.constants import RealNumbers, real_values
from lnr_prune.graph.modules.guard import uninterrupted, users_device
from lnr_prune.graph.nodes import TORCH
from lnr_prune.runtime import noise

OURS = str(Path(__file__).parents[1])
SOME = 12
"""Stands for sizes and numbers that depend on the data; what they count is kept whole."""
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
        training: Whether the forward ran in training mode.
    """

    module: fx.GraphModule
    names: Mapping[fx.Node, str]
    tensors: Mapping[str, Tensor]
    constants: Mapping[fx.Node, Any]
    training: bool = False

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The operations, in order of execution."""
        return tuple(self.module.graph.nodes)


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool = False) -> Trace:
    """Exports ``model(*args, **kwargs)``, in evaluation or training mode, to a graph of ATen operations.

    Raises:
        GraphError: If torch.export cannot follow the model's forward.
    """
    return replace(read(export(model, args, kwargs, training=training), model), training=training)


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
            uninterrupted(), in_mode(model, training), unfused_attention(), _exportable(model), users_device(),
            _silent(), noise.seeded(args),
        ):  # fmt: skip
            program = torch.export.export(model, args, dict(kwargs), strict=False, dynamic_shapes=dynamic_shapes)
            if any(_hides_something(node) for node in program.graph.nodes):
                program = program.run_decompositions({})  # inlines regions, replaces writes through views
    except Exception as raised:  # torch.export raises errors of many kinds
        error = raised.__cause__ if isinstance(raised, _InForwardError) and raised.__cause__ else raised
        if ran_out_of_memory(error):
            raise GraphError(
                f"{type(model).__name__} ran out of memory while it was traced: give smaller batches"
            ) from error
        raise GraphError(_explained(model, error)) from error
    return program


@contextmanager
def _exportable(model: nn.Module) -> Iterator[None]:
    """Lets the model's forward read numbers from its buffers, and return None for caches of keys and values."""
    forward, own, values = model.forward, vars(model).get("forward"), real_values(model)

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with RealNumbers(model, values):
                return without_caches(forward(*args, **kwargs))  # torch.export does not know the types of caches
        except Exception as error:  # a forward may raise anything
            raise _InForwardError from error

    model.forward = wrapped
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


class _InForwardError(Exception):
    """An error in the forward. It takes no attributes: torch.export would hang its graph on it, and print that."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):
            super().__setattr__(name, value)


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps torch's own warnings and logs, which may hold whole graphs, from the user."""
    top = logging.getLogger("torch")
    found = [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if name.startswith("torch.") and isinstance(logger, logging.Logger)
    ]
    before = [(logger, logger.disabled) for logger in found]
    handlers, propagates = top.handlers, top.propagate
    top.handlers, top.propagate = [logging.NullHandler()], False  # of loggers that are made meanwhile, too
    for logger in found:
        logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        top.handlers, top.propagate = handlers, propagates
        for logger, disabled in before:
            logger.disabled = disabled


def _explained(model: nn.Module, error: BaseException) -> str:
    """Why torch.export cannot trace a model: where in the user's code, and what to do."""
    lines = [
        f" at {Path(frame.filename).name}:{frame.lineno}, `{frame.line}`"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((OURS, TORCH)) and frame.line
    ]
    where = f"{type(model).__name__} {failing_layer(model, error)}{lines[-1] if lines else ''}"
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    if any(isinstance(value, PackedSequence) for frame in frames for value in frame.f_locals.values()):
        return (
            f"torch.export could not trace {where}: a recurrent layer gets a packed sequence there. Give it padded "
            "sequences (without pack_padded_sequence), or prune the parts around it"
        )
    if "data-dependent" in str(error):
        return (
            f"torch.export could not trace {where}: a number or a decision there depends on the values of a tensor. "
            "Keep constants as Python numbers (self.scale = 8.0 in place of float(buffer)), decide with torch.where, "
            "or prune the submodule that holds the layers"
        )
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    return (
        f"torch.export could not trace {where}: {reason}. Make the forward traceable "
        "(torch.export.export(model, args, strict=False) must pass), or prune the traceable submodule that holds the "
        "layers"
    )


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
    """The graph with the traced call's ints in place of symbols; its nodes keep their names.

    Where ints depend on the data, ``node.meta["unknown"]`` says so: the axes of the result that are as long as that.
    """

    def known(value: Any) -> Any:
        if isinstance(value, SYMBOLS):
            return _number(value)
        if isinstance(value, Tensor) and any(isinstance(size, SYMBOLS) for size in value.shape):
            return value.new_empty(known(tuple(value.shape)), device="meta")
        if isinstance(value, tuple | list):
            return type(value)(known(part) for part in value)
        return value

    if not any(_symbols(node.meta.get("val")) for node in module.graph.nodes):
        return module
    graph, copies = fx.Graph(), {}
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, SYMBOLS):
            copies[node] = known(value)
        elif not str(node.target).startswith(("aten._assert_", "aten.sym_constrain")):
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {**node.meta, "val": known(value)}
            read = [each.meta.get("val") for each in node.all_input_nodes]
            if not all(_is_known(each) for each in (*_symbols(value), *(n for n in read if isinstance(n, SYMBOLS)))):
                sizes = getattr(value, "shape", ())
                copies[node].meta["unknown"] = tuple(i for i, size in enumerate(sizes) if not _is_known(size))
    return fx.GraphModule(module, graph)


def _symbols(value: Any) -> list[Any]:
    """The symbols in a node's value, sizes of tensors among them."""
    parts = value if isinstance(value, tuple | list) else getattr(value, "shape", (value,))
    return [part for part in parts if isinstance(part, SYMBOLS)]


def _is_known(size: Any) -> bool:
    return not isinstance(size, SYMBOLS) or bool(size.node.has_hint())


def _number(symbol: Any) -> int | float | bool:
    """What a symbol is in the traced call; if it depends on the data, every such symbol in it is `SOME`."""
    if _is_known(symbol):
        number: int | float | bool = symbol.node.hint
        return number
    environment, expression = symbol.node.shape_env, symbol.node.expr
    renamed = hasattr(environment, "backed_var_to_val")  # in newer versions of torch
    values = environment.backed_var_to_val if renamed else environment.var_to_val
    value = expression.subs({each: values.get(each, SOME) for each in expression.free_symbols})
    kinds: dict[type, type[int] | type[float]] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
    return kinds[type(symbol)](value)


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
