"""The tensors that a forward pass makes of its weights: transposed views, and parts that are picked from a stack."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lnr_prune.graph.weights import REORDERED, whole_name

_VIEWS = {*REORDERED, "T", "H", "mH", "data"}

Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Used:
    """A tensor made of a parameter: a view of it, or the parts of a stack that the rows of a batch pick.

    Attributes:
        name: Name of the parameter.
        make: Makes it of the parameter.
        parts: Number of parts, if it is a stack of weights, else 0.
        picked: The part, or the part of every row; None = it is the whole parameter.
        turned: Whether its last two axes are exchanged.
    """

    name: str
    make: Move
    parts: int = 0
    picked: Tensor | int | None = None
    turned: bool = False


class Views:
    """The tensors that a forward pass makes of the parameters of some weights."""

    def __init__(self, tensors: Mapping[str, Tensor], weights: Iterable[str]) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Used]] = {}
        for name in {name if name in tensors else whole_name(name)[0] for name in weights}:
            tensor = tensors[name]
            used = Used(name, _same, len(tensor) if tensor.dim() == 3 else 0)
            self._known[id(tensor)] = weakref.ref(tensor), used

    def of(self, value: Any) -> Used | None:
        """How a tensor is made of a parameter; None if it is not."""
        made, used = self._known.get(id(value), (lambda: None, None))
        return used if made() is value else None

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Takes note of what a function has made, if it is a view of a parameter or picks parts of it."""
        used = self.of(args[0]) if args else None
        if used is None or not isinstance(result, Tensor) or result is args[0]:
            return
        name, source, picked, turned = name_of(func), used, used.picked, used.turned
        if name in _VIEWS:
            sizes = range(2, 2 + args[0].dim())  # sizes that tell the axes apart
            *_, first, last = func(torch.empty(*sizes), *args[1:], **kwargs).shape
            turned = turned != (first > last)
        elif used.parts and used.picked is None and name in ("__getitem__", "select", "index_select"):
            index = args[-1] if len(args) > 1 else None
            if name != "__getitem__" and (len(args) != 3 or args[1] not in (0, -3)):
                return
            if not isinstance(index, int) and not (isinstance(index, Tensor) and _counts(index)):
                return
            picked = index if isinstance(index, Tensor) and index.dim() == 1 else int(index) % used.parts
        else:
            return

        def make(weight: Tensor) -> Tensor:
            made: Tensor = func(source.make(weight), *args[1:], **kwargs)
            return made

        self._known[id(result)] = weakref.ref(result), replace(used, make=make, picked=picked, turned=turned)


def _same(weight: Tensor) -> Tensor:
    return weight


def _counts(index: Tensor) -> bool:
    return index.dim() < 2 and index.dtype not in (torch.bool, torch.uint8)


def name_of(func: Any) -> str:
    """Name of a torch function; of a property, its own."""
    name = getattr(func, "__name__", "")
    return str(func.__self__.__name__ if name == "__get__" else name).removesuffix(".default")
