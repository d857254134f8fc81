"""From an nn.Module to a torch.fx graph of ATen operations whose parameters have names."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lnr_prune.errors import GraphError


@dataclass(frozen=True, eq=False)
class Trace:
    """What a forward pass of the model does.

    Attributes:
        nodes: The ATen graph, in order of execution.
        names: Placeholder node -> name of its parameter or buffer; tied tensors share one name.
        tensors: Name -> parameter or buffer.
    """

    nodes: tuple[fx.Node, ...]
    names: Mapping[fx.Node, str]
    tensors: Mapping[str, Tensor]


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    """Exports ``model(*args, **kwargs)``, in evaluation mode, to a graph of ATen operations.

    Raises:
        GraphError: If torch.export cannot follow the model's forward.
    """
    try:
        with evaluating(model):
            program = torch.export.export(model, args, dict(kwargs), strict=False)
    except Exception as error:  # torch.export raises errors of many kinds
        raise GraphError(
            f"torch.export could not trace {type(model).__name__}: {str(error).strip().splitlines()[0]}. "
            "Make the forward traceable (torch.export.export(model, args, strict=False) must pass), "
            "or prune the traceable submodule that holds the layers"
        ) from error
    signature = program.graph_signature
    placeholders = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    state = named_tensors(model)
    first: dict[int, str] = {}
    canonical = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}
    names = {
        node: canonical[placeholders[node.name]]
        for node in program.graph.nodes
        if node.op == "placeholder" and placeholders.get(node.name) in canonical
    }
    return Trace(tuple(program.graph.nodes), names, {name: state[name] for name in names.values()})


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every one of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every submodule into evaluation mode, and back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
