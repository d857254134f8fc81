"""How a torch function applies a weight, in whichever way a linear layer is written.

``F.linear(x, W)``, ``x @ W.T``, ``torch.addmm(b, x, W.t())``, ``W @ x``, ``einsum("bi,oi->bo", x, W)``, convolutions,
and products with a stack of weights, of which every row of x picks one, are told apart here. All others see
``y = W x``, with the channels of x and y on the last axis (of convolutions: on the second).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lnr_prune.calibration.functions.views import Move, Used, Views, name_of
from lnr_prune.calibration.visible.recurrent import recurrence
from lnr_prune.graph.weights import contraction

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_SIGNATURES: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    torch.addmm: ("bias", "input", "weight"),
    torch.Tensor.addmm: ("bias", "input", "weight"),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONV),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED),
    recurrence: ("input", "weight", "bias", "state", "step", "projection", "reverse"),
}
_PRODUCTS = {"matmul", "mm", "bmm", "__matmul__"}
_GROUPED = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback"}


@dataclass(frozen=True, eq=False)
class Application:
    """One application of a weight: ``y = W x + b``.

    Attributes:
        used: The weight.
        x: The layer's input, as the function is given it.
        bias: The bias that the function adds, or None.
        options: The function's other arguments.
        call: x, the weight as it was used, and the bias -> y, as the function returns it.
        inward: x -> x with its channels on the last axis, and those of a stack's parts on the first.
        back: The way back.
        outward: The same for y.
        rows: Number of a part -> the rows of x and y, so turned, that it is applied to.
        columns_first: Whether the weight as it was used is (columns, rows).
        repeats: Whether it is a `recurrence`: the weight is applied to the states, which the function returns first.
    """

    used: Used
    x: Tensor
    bias: Tensor | None
    options: Mapping[str, Any]
    call: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    inward: Move = field(default=lambda x: x)
    back: Move = field(default=lambda x: x)
    outward: Move = field(default=lambda y: y)
    rows: Callable[[int], Any] = field(default=lambda part: part)
    columns_first: bool = False
    repeats: bool = False

    def again(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Y for another x, weight or bias, as an adapter sees them."""
        return self.outward(self.call(self.back(x), self.used.make(weight), bias))

    def again_part(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same for one part of a stack, as the model stores it."""
        return F.linear(x, weight.T if self.columns_first != self.used.turned else weight, bias)

    def parts(self) -> Iterator[tuple[int, Any]]:
        """The parts of a stack that are applied, with the rows that they are applied to."""
        picked = self.used.picked
        if isinstance(picked, int):
            yield picked, slice(None)
            return
        for part in range(self.used.parts):
            yield part, picked == part if picked is not None else self.rows(part)


def applied(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], views: Views) -> Application | None:
    """The application of a weight that a call of a torch function is; None if it is none."""
    if func in _SIGNATURES:
        return _with_signature(func, args, kwargs, views)
    name = name_of(func)
    if name in _PRODUCTS and len(args) == 2:
        return _product(partial(func, **kwargs), args, views)
    if name in _GROUPED:
        return _grouped(func, args, kwargs, views)
    return _einsum(args, views) if func is torch.einsum else None


def _with_signature(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], views: Views) -> Application | None:
    names = {"input": "bias", "mat1": "input", "mat2": "weight"} if name_of(func) == "addmm" else {}
    named = {names.get(key, key): value for key, value in kwargs.items()}
    options = {**dict(zip(_SIGNATURES[func], args, strict=False)), **named}
    x, weight, bias = (options.pop(key, None) for key in ("input", "weight", "bias"))
    used = views.of(weight)
    if used is None or x is None:
        return None

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given = {"input": x, "weight": weight, "bias": bias}
        result: Tensor = func(*(given[key] for key in _SIGNATURES[func] if key in given), **options)
        return result

    return Application(used, x, bias, options, call, repeats=func is recurrence)


def _product(func: Any, args: tuple[Any, ...], views: Views) -> Application | None:
    of_left, of_right = map(views.of, args)
    used = of_left or of_right
    if used is None or (of_left and of_right):
        return None
    left, x = of_left is not None, args[1 if of_left else 0]
    matrix = args[0 if left else 1]
    direct = matrix.dim() == 3 and used.picked is None
    if matrix.dim() not in (2, 3) or (left and x.dim() < 2) or (matrix.dim() == 3 and x.dim() < 3):
        return None

    def turned(value: Tensor) -> Tensor:
        value = value.transpose(-1, -2) if left else value
        if not direct:
            return value
        value = value.movedim(-3, 0)
        return value.expand(len(matrix), *value.shape[1:])

    def back(value: Tensor) -> Tensor:
        value = value.movedim(0, -3) if direct else value
        return value.transpose(-1, -2) if left else value

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = func(weight, x) if left else func(x, weight)
        return y if bias is None else y + (bias[:, None] if left else bias)

    return Application(used, x, None, {}, call, turned, back, turned, columns_first=not left)


def _grouped(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], views: Views) -> Application | None:
    used, offsets = views.of(args[1] if len(args) > 1 else None), kwargs.get("offs", args[2] if len(args) > 2 else None)
    if used is None or not used.parts or used.picked is not None or offsets is None:
        return None
    ends = [0, *offsets.tolist()]

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = func(x, weight, *args[2:], **kwargs)
        return y if bias is None else y + bias

    rows: Callable[[int], Any] = lambda part: slice(ends[part], ends[part + 1])  # noqa: E731
    return Application(used, args[0], None, {}, call, rows=rows, columns_first=True)


def _einsum(args: tuple[Any, ...], views: Views) -> Application | None:
    values = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    found = [(index, used) for index, value in enumerate(values) if (used := views.of(value)) is not None]
    if len(found) != 1 or len(values) != 2:
        return None
    (index, used), equation = found[0], args[0]
    axes = contraction(equation, (values[0].dim(), values[1].dim()), index)
    if axes is None:
        return None

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.einsum(equation, *((weight, x) if index == 0 else (x, weight)))
        return y if bias is None else (y.permute(axes.y) + bias).permute(_inverse(axes.y))

    return Application(
        used, values[1 - index], None, {}, call,
        lambda x: x.permute(axes.x), lambda x: x.permute(_inverse(axes.x)), lambda y: y.permute(axes.y),
        columns_first=axes.weight[-1] < axes.weight[-2],
    )  # fmt: skip


def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))
