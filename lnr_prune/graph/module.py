"""What the graph core needs of a module: that it is a plain one, its tensors by name, forwards that can be traced."""

import copy
import functools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lnr_prune.errors import GraphError

WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


@contextmanager
def plain(model: object) -> Iterator[nn.Module]:
    """The module that is worked on: the given one, without torch.compile, once it is known that it can be pruned.

    Within, nothing is compiled: submodules that torch.compile wraps are replaced by what they wrap. Afterwards they
    are back in their places, around the same modules.

    Raises:
        TypeError: If it is not an nn.Module.
        GraphError: If it, or a part of it, is wrapped, sharded, scripted, traced or quantized; the message says what
            to give.
    """
    check_model(model)
    module = _uncompiled(model)
    wrapped = [
        (parent._modules, name, child)
        for parent in module.modules()
        for name, child in parent._modules.items()
        if _uncompiled(child) is not child
    ]
    for children, name, child in wrapped:
        children[name] = _uncompiled(child)
    calls = [(part, call) for part in module.modules() if (call := vars(part).get("_compiled_call_impl")) is not None]
    for part, _ in calls:  # of nn.Module.compile
        part._compiled_call_impl = None
    # functions that the forward calls may be compiled, too
    dynamo = "torch._dynamo" in sys.modules
    try:
        _check_unwrapped(module)
        with torch.compiler.set_stance("force_eager") if dynamo else nullcontext():
            yield module
    finally:
        for part, call in calls:
            part._compiled_call_impl = call
        for children, name, child in wrapped:
            children[name] = child


def check_model(model: object) -> None:
    """Refuses anything that is not a model.

    Raises:
        TypeError: If it is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        made = "a class: make an instance of it" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be a torch.nn.Module, got {made}")


def _uncompiled(module: Any) -> Any:
    """What torch.compile wraps."""
    while type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch."):
        module = module._orig_mod
    return module


def _check_unwrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind, path = type(module).__name__, f"model.{name}".rstrip(".")
        if kind in WRAPPERS and type(module).__module__.startswith("torch."):
            raise GraphError(
                f"{path} is wrapped in {kind}: prune the plain module inside, {path}.module (under FSDP: a plain copy "
                "with the full state dict), with all ranks in their process group, and wrap the pruned model again"
            )
        if isinstance(module, torch.jit.ScriptModule):
            made = "traced" if "Traced" in kind else "scripted"
            raise GraphError(
                f"{path} is {made} by torch.jit, which hides its operations: give the Python module that it was made "
                "from, and script or trace the pruned model again"
            )
        if isinstance(getattr(module, "weight_fake_quant", None), nn.Module):
            raise GraphError(
                f"{path} is in quantization-aware training, which rounds its weight in every forward pass: put "
                f"{path}.to_float() in its place, prune the float model, and prepare the pruned one for quantization"
            )
    sharded = next((name for name, tensor in model.named_parameters() if hasattr(tensor, "placements")), None)
    if sharded is not None:
        raise GraphError(
            f"the parameter {sharded!r} is sharded over processes (a DTensor): load the full state dict into a plain "
            "model, prune that on every rank, and shard the pruned one"
        )


def failing_layer(model: nn.Module, error: BaseException) -> str:
    """The innermost layer on the error's traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    path = [
        names[id(frame.f_locals["self"])]
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if id(frame.f_locals.get("self")) in names
    ]
    return f"in layer {path[-1]!r}" if path and path[-1] else "in its forward"


@dataclass(frozen=True, eq=False)
class Example:
    """A call of one of a model's methods, ``model.method(*args, **kwargs)``, that must stay valid.

    Attributes:
        call: Its positional and its keyword arguments.
        method: The method.
        calibrated: Whether the calibration data takes this path, so that its layers can be refitted.
        traced: Whether it takes a path that no earlier example takes. If not, it is only run.
    """

    call: tuple[tuple[Any, ...], dict[str, Any]]
    method: str = "forward"
    calibrated: bool = True
    traced: bool = True

    def __str__(self) -> str:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(self.call) if isinstance(leaf, Tensor)]
        return f"{self.method}() with inputs of shape {', '.join(map(str, shapes))}"


@contextmanager
def calling(model: nn.Module, method: str) -> Iterator[None]:
    """Within, calling the model calls this method of it instead of forward; the method itself may call the model."""
    if method == "forward":
        yield
        return
    own, bound = vars(model).get("forward"), getattr(model, method)

    def put_back() -> None:
        vars(model).pop("forward", None)
        if own is not None:
            model.forward = own

    @functools.wraps(bound)
    def once(*args: Any, **kwargs: Any) -> Any:
        put_back()
        try:
            return bound(*args, **kwargs)
        finally:
            model.forward = once

    model.forward = once
    try:
        yield
    finally:
        put_back()


def without_caches(outputs: Any) -> Any:
    """A forward pass's outputs, with None for key-value caches, which shrink with the layers that fill them."""

    def is_cache(value: Any) -> bool:
        return callable(getattr(value, "get_seq_length", None)) and callable(getattr(value, "update", None))

    return tree_map(lambda value: None if is_cache(value) else value, outputs, is_leaf=is_cache)


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


def remembered(model: nn.Module) -> Callable[[], bool]:
    """Remembers what forwards may change in a model.

    The returned function puts it back, says whether anything had changed, and may be called again.

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

    def put_back() -> bool:
        changed = False
        for holder, before in saved:
            changed |= _put_back(holder, before)
        for module, kind in classes:
            if type(module) is not kind:
                module.__class__, changed = kind, True
        for tensor, value in values:  # compared, as a version does not count what is written through .data
            if tensor.shape != value.shape:
                tensor.data, changed = value.clone(), True
            elif not torch.equal(tensor, value):
                with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(value)
                changed = True
        return changed

    return put_back


def _can_be_written(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _put_back(holder: Any, before: Any) -> bool:
    """Restores a dict or list; if it has not changed, it is not touched, as someone may be iterating over it."""
    if isinstance(holder, list):
        changed = len(holder) != len(before) or any(a is not b for a, b in zip(holder, before, strict=True))
        holder[:] = before if changed else holder
        return changed
    if holder.keys() == before.keys() and all(holder[name] is value for name, value in before.items()):
        return False
    for name in holder.keys() - before.keys():
        del holder[name]
    holder.update(before)
    return True


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
