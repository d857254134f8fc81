"""Calibration data: any iterable of batches -> calls of the model."""

import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from lnr_prune.errors import CalibrationError, LnrPruneError, ran_out_of_memory
from lnr_prune.graph import evaluating, unfused_attention, without_caches

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one forward pass."""
Inputs = Callable[[Any], Call]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches that can be gone through again and again, as calls of one model.

    Attributes:
        batches: The data, re-iterable.
        as_call: Turns a batch into the model's arguments.
    """

    batches: Iterable[Any]
    as_call: Inputs

    def __iter__(self) -> Iterator[Call]:
        for batch in self.batches:
            call = self.as_call(batch)
            if samples_in(call):  # the last batch of a filtered data set may be empty
                yield call

    @cached_property
    def samples(self) -> int | None:
        """Number of samples, where that can be known without reading the data: lists and data loaders."""
        if isinstance(self.batches, Sequence):
            return sum(samples_in(batch) for batch in self.batches)
        sampler = getattr(self.batches, "sampler", None)
        return len(sampler) if isinstance(sampler, Sized) else None

    def example(self) -> Call:
        """The arguments of the first batch.

        Raises:
            CalibrationError: If there is none.
        """
        for call in self:
            return call
        raise CalibrationError("the calibration data holds no batch; give at least one batch of inputs")


def calibrate(model: nn.Module, data: Any, inputs: Inputs | None = None) -> Calibration:
    """Reads calibration data for a model.

    Args:
        model: The model; tensors are moved to the device of its parameters.
        data: An iterable of batches. A batch is a tensor; a tuple or list, of which as many leading entries
            are taken as the model's forward requires (so the label of a pair is ignored); or a dict of keyword
            arguments (entries called "label" or "labels" are left out unless forward names them). A single
            tensor or dict is one batch. What can be gone through only once is kept in memory. Batches without
            samples are passed over.
        inputs: Turns any other batch into ``(args, kwargs)``.

    Raises:
        TypeError: If model is no module, or inputs cannot be called.
        CalibrationError: If data is not iterable; while iterating, if a batch cannot be read.
    """
    check_model(model)
    if inputs is not None and not callable(inputs):
        raise TypeError(f"inputs must be a function of a batch that returns (args, kwargs), got {inputs!r}")
    if isinstance(data, Tensor | Mapping):
        data = [data]
    if not isinstance(data, Iterable):
        raise CalibrationError(
            f"calibration data must be an iterable of batches, got {type(data).__name__}; wrap a batch in a list"
        )
    once = isinstance(data, Iterator) or (not isinstance(data, Sized) and iter(data) is iter(data))
    batches = list(data) if once else data
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    read = inputs or _reader(model)

    def as_call(batch: Any) -> Call:
        moved: Call = tree_map(lambda leaf: _moved(leaf, device), _checked(read(batch)))
        return moved

    return Calibration(batches, as_call)


def check_model(model: object) -> None:
    """Refuses what is no model.

    Raises:
        TypeError: If it is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        made = "a class: make an instance of it" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be a torch.nn.Module, got {made}")


def _checked(call: Any) -> Call:
    """What ``inputs`` returned."""
    if isinstance(call, tuple | list) and len(call) == 2:
        args, kwargs = call
        if isinstance(args, tuple | list) and isinstance(kwargs, Mapping):
            return tuple(args), dict(kwargs)
    got = f"a tuple of {len(call)}" if isinstance(call, tuple) else type(call).__name__
    raise CalibrationError(
        f"inputs() returned {got}, expected (args, kwargs): a tuple of forward's positional arguments and a dict of "
        "its keyword arguments, such as (batch['x'],), {}"
    )


def _moved(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.layout != torch.strided or (leaf.is_meta and device.type != "meta"):
        kind = "a meta tensor, which has no values" if leaf.is_meta else f"a tensor of layout {leaf.layout}"
        raise CalibrationError(f"a batch holds {kind}, expected dense values: make it dense (x.to_dense()) or real")
    return leaf.to(device)


def samples_in(batch: Any) -> int:
    """Number of samples in a batch or call: length of the first tensor's first axis; 1 for a batch without one."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 1)


def shortened(call: Call, size: int = 2) -> Call:
    """The call with its batch cut to ``size`` samples, where all tensors share a longer first axis."""
    leading = {leaf.shape[:1] for leaf in tree_leaves(call) if isinstance(leaf, Tensor)}
    if len(leading) != 1 or next(iter(leading), ()) == () or next(iter(leading))[0] <= size:
        return call
    cut: Call = tree_map(lambda leaf: leaf[:size] if isinstance(leaf, Tensor) else leaf, call)
    return cut


def short_example(model: nn.Module, data: Calibration) -> Call:
    """Arguments of a small forward pass: the first batch, cut to two samples where the model allows."""
    example = data.example()
    short = shortened(example)
    try:
        run(model, short)
    except CalibrationError:
        run(model, example)
        return example
    return short


def run(model: nn.Module, call: Call, weights: Mapping[str, Tensor] | None = None) -> Any:
    """``model(*args, **kwargs)`` without gradients, with some of its tensors replaced for this call.

    Key-value caches among the outputs are left out: they follow the layers that fill them.

    Raises:
        CalibrationError: If the model does not accept the call; the message names the layer that failed.
    """
    args, kwargs = call
    try:
        with torch.no_grad(), evaluating(model), unfused_attention():
            return without_caches(functional_call(model, dict(weights or {}), args, kwargs))
    except LnrPruneError:
        raise
    except Exception as error:  # a forward raises what it likes
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(call) if isinstance(leaf, Tensor)]
        inputs = f"inputs of shape {', '.join(map(str, shapes))}" if shapes else "a call without tensors"
        if ran_out_of_memory(error):
            raise CalibrationError(
                f"{type(model).__name__} ran out of memory on {inputs}, {_failing_layer(model, error)}: "
                "give smaller batches"
            ) from error
        raise CalibrationError(
            f"{type(model).__name__} does not accept {inputs}: "
            f"{_failing_layer(model, error)}: {type(error).__name__}: {error}. Give batches as the model's forward "
            "takes them, or map them with inputs="
        ) from error


def _reader(model: nn.Module) -> Inputs:
    parameters = inspect.signature(model.forward).parameters
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [name for name, p in parameters.items() if p.kind in positional and p.default is p.empty]
    count = max(1, len(required))

    def read(batch: Any) -> Call:
        if isinstance(batch, Tensor):
            return (batch,), {}
        if isinstance(batch, Mapping):
            kept = {k: v for k, v in batch.items() if k in parameters or k not in ("label", "labels")}
            return (), kept
        if isinstance(batch, tuple | list) and len(batch) >= count:
            return tuple(batch[:count]), {}
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise CalibrationError(
            f"a batch is a {type(batch).__name__}{size}, expected a tensor, a dict of keyword arguments or a tuple "
            f"that starts with forward's {count} required arguments {tuple(required)}; map it with inputs="
        )

    return read


def _failing_layer(model: nn.Module, error: BaseException) -> str:
    """The innermost layer on the error's traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    path = [
        names[id(frame.f_locals["self"])]
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if id(frame.f_locals.get("self")) in names
    ]
    return f"in layer {path[-1]!r}" if path and path[-1] else "in its forward"
