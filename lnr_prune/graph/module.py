"""What the graph core needs of a module: its tensors by name, and forwards that can be traced."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lnr_prune.errors import GraphError


def without_caches(outputs: Any) -> Any:
    """A forward pass's outputs, with None for key-value caches, which shrink with the layers that fill them."""

    def is_cache(value: Any) -> bool:
        return callable(getattr(value, "get_seq_length", None)) and callable(getattr(value, "update", None))

    return tree_map(lambda value: None if is_cache(value) else value, outputs, is_leaf=is_cache)


@contextmanager
def _returning_no_caches(model: nn.Module) -> Iterator[None]:
    """Lets the model's forward return None for key-value caches: torch.export does not know their type."""
    forward, own = model.forward, vars(model).get("forward")

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return without_caches(forward(*args, **kwargs))

    model.forward = wrapped
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Turns off the fused path of nn.MultiheadAttention, in which no layer can be seen."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every one of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Puts every submodule into training or evaluation mode, and back into its own mode afterwards.

    What forwards change in the model meanwhile is put back, see `remembered`: caches and counters.
    """
    put_back = remembered(model)
    for module in model.modules():
        module.training = training
    try:
        yield
    finally:
        put_back()


def remembered(model: nn.Module) -> Callable[[], None]:
    """Remembers what forwards may change in a model; the returned function puts it back, and may be called again.

    That is the submodules' classes and attributes, dicts and lists in them, and the values of buffers and of other
    tensors that are not parameters. Caches depend on the weights, sizes and dtypes that they were computed with.
    """
    classes = [(module, type(module)) for module in model.modules()]
    attributes = [vars(module) for module in model.modules()]
    holders: list[Any] = [value for each in attributes for value in each.values() if type(value) in (dict, list)]
    saved = [(holder, copy.copy(holder)) for holder in (*attributes, *holders)]
    entries = (entry for _, held in saved for entry in (held.values() if isinstance(held, dict) else held))
    tensors = {id(entry): entry for entry in entries if type(entry) is Tensor and _can_be_written(entry)}
    values = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]

    def put_back() -> None:
        for module, kind in classes:
            if type(module) is not kind:
                module.__class__ = kind
        for holder, before in saved:
            _put_back(holder, before)
        for tensor, value in values:  # compared, as a version does not count what is written through .data
            if tensor.shape != value.shape:
                tensor.data = value.clone()
            elif not torch.equal(tensor, value):
                with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(value)

    return put_back


def _can_be_written(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _put_back(holder: Any, before: Any) -> None:
    """Restores a dict or list; if it has not changed, it is not touched, as someone may be iterating over it."""
    if isinstance(holder, list):
        if len(holder) != len(before) or any(a is not b for a, b in zip(holder, before, strict=True)):
            holder[:] = before
        return
    for name in holder.keys() - before.keys():
        del holder[name]
    holder.update({name: value for name, value in before.items() if name not in holder or holder[name] is not value})


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Puts every submodule into evaluation mode, and back into its own mode afterwards."""
    return in_mode(model, False)


def check_values(model: nn.Module) -> None:
    """Refuses a model whose parameters have no values, or values that are not finite.

    Raises:
        GraphError: If it is such a model; the message names the parameter.
    """
    for name, tensor in named_tensors(model).items():
        if tensor.is_meta:
            raise GraphError(
                f"{name!r} is on the meta device, where tensors have no values: load the model's weights first"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise GraphError(
                f"{bad:,} of the {parameter.numel():,} values of parameter {name!r} are NaN or Inf: "
                "load a checkpoint whose values are finite"
            )
