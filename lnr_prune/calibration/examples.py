"""Calls that stand for all others: one of every kind in the calibration data, and those that the user adds.

A kind is what a forward can branch on without looking at values: which arguments there are, their dtypes, sizes beside
the number of samples, flags. Everything that is done to the model is tried on one small call of every kind.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from lnr_prune.calibration.calls import Call, run, samples_in, shortened
from lnr_prune.calibration.data import Batches, Calibration, calibrate
from lnr_prune.errors import CalibrationError
from lnr_prune.graph.module import Example, calling

VALUES = (bool, int, float, str, type(None))  # types of arguments that a forward may branch on


def examples_of(model: nn.Module, calls: Sequence[Call], also: Sequence[Example] = ()) -> list[Example]:
    """Small calls of every kind, the first one first.

    Args:
        model: The model.
        calls: One call of every kind in the calibration data, see `kinds`.
        also: Further calls.

    Raises:
        CalibrationError: If the model does not accept one of them.
    """
    found: list[Example] = []
    paths: set[Hashable] = set()
    for example in (*map(Example, calls), *also):
        seen = _Functions(model)
        with calling(model, example.method), seen:
            small = short_call(model, example.call)
        path = (example.method, frozenset(seen.called))
        found.append(replace(example, call=small, traced=path not in paths))
        paths.add(path)
    return found


def kinds(data: Iterable[Call]) -> dict[Hashable, Call]:
    """Kind -> the first call of this kind, in order.

    Raises:
        CalibrationError: If there is no call.
    """
    found: dict[Hashable, Call] = {}
    for call in data:
        found.setdefault(_kind(call), call)
    if not found:
        raise CalibrationError("the calibration data holds no batch; give at least one batch of inputs")
    return found


def short_call(model: nn.Module, call: Call) -> Call:
    """A small forward pass: the call, cut to two samples if the model then gives finite outputs."""
    short = shortened(call)
    try:
        outputs = [leaf for leaf in tree_leaves(run(model, short)) if isinstance(leaf, Tensor)]
    except CalibrationError:
        run(model, call)
        return call
    if not all(out.numel() and bool(torch.isfinite(out).all()) for out in outputs):  # a mask may select no sample
        return call
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, short)  # type: ignore[no-any-return]


def short_example(model: nn.Module, data: Calibration) -> Call:
    """The first batch, see `short_call`."""
    return short_call(model, data.example())


def further(model: nn.Module, also: Any) -> list[Example]:
    """What the user gives as ``also``: batches of forward, or name of a method -> batches of it.

    Raises:
        TypeError, ValueError: If it is something else, or the model has no such method.
    """
    named = also if isinstance(also, Mapping) else {"forward": () if also is None else also}
    found = []
    for method, batches in named.items():
        if not isinstance(method, str) or not callable(getattr(model, method, None)):
            raise ValueError(
                f"also names {method!r}, which is no method of {type(model).__name__}; expected a list of batches, or "
                "a dict from names of methods to lists of batches, such as {'embed': [x]}"
            )
        if not isinstance(batches, list | tuple | Batches):
            raise TypeError(
                f"also must hold a list of batches for {method}(), got {type(batches).__name__}; wrap a batch in a list"
            )
        with calling(model, method):
            calls = list(kinds(calibrate(model, batches)).values()) if batches else []
        found += [Example(call, method, calibrated=False) for call in calls]
    return found


def _kind(call: Call) -> Hashable:
    """What a forward can branch on."""
    leaves, structure = tree_flatten(call)
    samples = samples_in(call)

    def facts(leaf: Any) -> Hashable:
        if isinstance(leaf, Tensor):
            first = ("samples" if leaf.shape[0] == samples else leaf.shape[0],) if leaf.dim() else ()
            return leaf.dtype, leaf.device.type, (*first, *leaf.shape[1:])
        return type(leaf), leaf if isinstance(leaf, VALUES) else None

    return str(structure), tuple(map(facts, leaves))


class _Functions(TorchFunctionMode):
    """Remembers which functions were called, and with which of the model's tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.called: set[Hashable] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        read = (id(leaf) for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.own)
        self.called.add((getattr(func, "__name__", str(func)), *read))
        return func(*args, **(kwargs or {}))
