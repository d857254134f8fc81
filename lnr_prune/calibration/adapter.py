"""The registry of adapters. Only an adapter knows how a layer's columns form groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Protocol

import torch
from torch import Tensor

from lnr_prune.calibration.watch import LayerCall
from lnr_prune.errors import AdapterError
from lnr_prune.graph.groups import Consumer
from lnr_prune.graph.weights import tensor_named

ENTRY_POINTS = "lnr_prune.adapters"


class Adapter(Protocol):
    """Turns a consumer into the matrix form ``y = M x`` of the group lasso, and back.

    An adapter decides which consumers it fits, how to read x and y from a call of the layer, which columns
    of x belong to which channel, and how a matrix becomes weights. `lnr_prune.testing.check_adapter`
    tests all that it must do.

    An adapter may also have a method ``second_moments(consumer, calls)``. It returns ``sum x x^T`` over all rows of the
    calls, (d, d), if it can compute that faster than by reading x, else None.
    """

    name: str

    def matches(self, consumer: Consumer) -> bool:
        """Whether this adapter is the right one for the consumer; it must be the only one."""
        ...

    def inputs(self, consumer: Consumer, call: LayerCall, rows: Tensor | None = None) -> Tensor:
        """x, one row per sample, (n, d). With ``rows``, (m,) indices, only these, so that no others are copied."""
        ...

    def outputs(self, consumer: Consumer, call: LayerCall, rows: Tensor | None = None) -> Tensor:
        """y, one row per sample, (n, h), with ``y = x M^T`` for the layer's own matrix M; or only some rows."""
        ...

    def groups(self, consumer: Consumer, weight: Tensor) -> Tensor:
        """Channel of every column of x, (d,) int64; -1 = not penalised."""
        ...

    def matrix(self, consumer: Consumer, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own matrix M, (h, d)."""
        ...

    def write(self, consumer: Consumer, M: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight, of ``weight``'s shape, and the bias (None = leave it) that make ``y = M x``."""
        ...


_adapters: dict[str, Adapter] = {}


def register(adapter: Adapter, *, replace: bool = False) -> None:
    """Registers an adapter under its name.

    A package does this in the module that its entry point names::

        [project.entry-points."lnr_prune.adapters"]
        mine = "my_package.my_adapters"

    Raises:
        ValueError: If the name is taken and ``replace`` is not set.
    """
    if adapter.name in _adapters and not replace:
        raise ValueError(
            f"an adapter named {adapter.name!r} is already registered ({type(_adapters[adapter.name]).__name__}); "
            "choose another name, or pass replace=True"
        )
    _adapters[adapter.name] = adapter


def unregister(name: str) -> None:
    """Removes an adapter from the registry.

    Raises:
        ValueError: If no adapter has this name.
    """
    if name not in _adapters:
        raise ValueError(f"no adapter is named {name!r}; registered: {', '.join(_adapters) or 'none'}")
    del _adapters[name]


def adapters() -> Mapping[str, Adapter]:
    """All registered adapters by name, including those of installed packages."""
    _load_entry_points()
    return dict(_adapters)


def find(consumer: Consumer) -> Adapter:
    """The one adapter that fits a consumer.

    Raises:
        AdapterError: If none or several fit.
    """
    known = adapters()
    if not known:
        raise AdapterError("no adapters found: install the package (pip install -e .)")
    fitting = [adapter for adapter in known.values() if adapter.matches(consumer)]
    if len(fitting) != 1:
        found = "no adapter fits" if not fitting else f"{len(fitting)} adapters fit"
        candidates = ", ".join(adapter.name for adapter in fitting or known.values())
        raise AdapterError(
            f"{found} layer {consumer.name!r} ({consumer.op}), expected exactly one; candidates: {candidates}. "
            "Register an adapter for it, or unregister the one that should not apply"
        )
    return fitting[0]


@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """A consumer and the adapter that reads it."""

    consumer: Consumer
    adapter: Adapter

    def inputs(self, call: LayerCall, rows: Tensor | None = None) -> Tensor:
        """X of a call, (n, d), or some of its rows."""
        return self.adapter.inputs(self.consumer, call, rows)

    def outputs(self, call: LayerCall, rows: Tensor | None = None) -> Tensor:
        """Y of a call, (n, h), or some of its rows."""
        return self.adapter.outputs(self.consumer, call, rows)

    def second_moments(self, calls: Sequence[LayerCall]) -> Tensor | None:
        """``sum x x^T`` over all rows of the calls, (d, d), if the adapter can compute it without reading them."""
        faster = getattr(self.adapter, "second_moments", None)
        return None if faster is None or not calls else faster(self.consumer, calls)

    @property
    def names(self) -> dict[str, str]:
        """Full names of the consumer's "weight" and, if it is refitted, "bias"."""
        names = {"weight": self.consumer.weight, "bias": self.consumer.bias}
        return {key: name for key, name in names.items() if name is not None}

    def columns(self, weight: Tensor, bias: float) -> Tensor:
        """Columns of M that are not zero for this weight and a constant bias, (d,) bool."""
        values = {"weight": weight, "bias": weight.new_full((weight.shape[1 - self.consumer.dim],), bias)}
        return self.matrix({name: values[key] for key, name in self.names.items()}).bool().any(0)

    def groups(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Channel of every column, (d,), on the weight's device."""
        weight = tensor_named(tensors, self.consumer.weight)
        return self.adapter.groups(self.consumer, weight).to(weight.device)

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The layer's matrix under these parameters, (h, d), float64."""
        bias = tensors[self.consumer.bias] if self.consumer.bias else None
        return self.adapter.matrix(self.consumer, tensor_named(tensors, self.consumer.weight), bias).detach().double()

    def write(self, M: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that make M the layer's matrix, with the shapes, dtypes and devices of the current ones."""
        weight, bias = self.adapter.write(self.consumer, M, tensor_named(tensors, self.consumer.weight))
        new = {self.consumer.weight: weight}
        if self.consumer.bias and bias is not None:
            new[self.consumer.bias] = bias
        dense = torch.contiguous_format  # otherwise a view of one entry would keep its stride, and with it all of M
        return {name: value.to(tensor_named(tensors, name)).clone(memory_format=dense) for name, value in new.items()}


@cache
def _load_entry_points() -> None:
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()
