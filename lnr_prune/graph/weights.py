"""Weights as layers use them: a parameter itself, a transposed view of it, or the parts of a stack of weights.

A mixture of experts keeps the weights of all its experts in one parameter, (experts, rows, columns). Every expert is
a layer of its own: ``experts.down[3]`` is the name of the fourth part of the stack.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from lnr_prune.graph.nodes import argument, op_name, shape_of
from lnr_prune.graph.trace import Trace

REORDERED = {
    "t", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "mT", "numpy_T", "matrix_H", "adjoint",
    "contiguous", "clone", "detach", "alias",
}  # fmt: skip
"""Operations that keep all entries of a tensor, and whole axes."""
# Position of the weight among the arguments of a layer's operation.
WEIGHTS = {"linear": 1, **{f"conv{n}d": 1 for n in (1, 2, 3)}}


@dataclass(frozen=True)
class View:
    """A parameter as an operation reads it.

    Attributes:
        name: Name of the parameter.
        dims: Dimension of the parameter that each axis is.
        parts: Numbers of the parts that are read, of a stack; () if it is none.
    """

    name: str
    dims: tuple[int, ...]
    parts: tuple[int, ...] = ()

    @property
    def stacked(self) -> bool:
        """Whether the first axis is that of the parts: all of them, or one for each row of a batch."""
        return len(self.dims) == 3 and self.dims[0] == 0


def views_in(trace: Trace) -> dict[Any, View]:
    """The views of the parameters that may be weights."""
    views: dict[Any, View] = {}
    for node in trace.nodes:
        if node in trace.names:
            name = trace.names[node]
            shape = trace.tensors[name].shape
            parts = tuple(range(shape[0])) if len(shape) == 3 else ()
            if len(shape) > 1 and trace.tensors[name].is_floating_point():
                views[node] = View(name, tuple(range(len(shape))), parts)
        elif node.op == "call_function" and node.args and node.args[0] in views:
            view = _onwards(views[node.args[0]], node)
            if view is not None:
                views[node] = view
    return views


def _onwards(view: View, node: fx.Node) -> View | None:
    """What an operation makes of a view; None if that is no view."""
    name, rank = op_name(node), len(view.dims)
    if rank > 3:
        return None
    if name in REORDERED and not any(isinstance(value, fx.Node) for value in node.args[1:]):
        sizes = range(2, 2 + rank)  # sizes that tell the axes apart
        target: Any = node.target
        moved = target(torch.empty(*sizes), *node.args[1:], **node.kwargs)
        return replace(view, dims=tuple(view.dims[size - 2] for size in moved.shape))
    if not view.stacked:
        return None
    if name == "select" and argument(node, 1, "dim") % rank == 0:
        return View(view.name, view.dims[1:], (argument(node, 2, "index") % len(view.parts),))
    if name == "index" and len(argument(node, 1, "indices")) == 1:
        (picked,) = argument(node, 1, "indices")
        return view if len(shape_of(picked)) == 1 and _counts(picked) else None
    if name == "index_select" and argument(node, 1, "dim") % rank == 0:
        return view
    return None


def _counts(index: fx.Node) -> bool:
    return index.meta["val"].dtype not in (torch.bool, torch.uint8)


def computed_weights(trace: Trace, views: Mapping[fx.Node, View], moving: set[fx.Node]) -> set[str]:
    """Parameters that a layer's weight is computed from, for example if weights are standardised."""
    found: set[str] = set()
    for node in trace.nodes:
        position = WEIGHTS.get(op_name(node))
        ahead = [node.args[position]] if position is not None and len(node.args) > position else []
        if not ahead or ahead[0] in trace.names or (op_name(node) == "linear" and ahead[0] in views):
            continue
        while ahead:
            value = ahead.pop()
            if isinstance(value, fx.Node) and value not in moving:
                name = trace.names.get(value)
                if name is not None and trace.tensors[name].dim() > 1:
                    found.add(name)
                ahead.extend(value.all_input_nodes)
    return found


def part_name(name: str, part: int) -> str:
    """Name of a part of a stack."""
    return f"{name}[{part}]"


def whole_name(name: str) -> tuple[str, int | None]:
    """Name of the parameter, and the number of the part, if it is the name of one."""
    stack, _, part = name.removesuffix("]").rpartition("[")
    return (stack, int(part)) if name.endswith("]") and part.isdecimal() else (name, None)


def tensor_named(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of this name, or the part of a stack."""
    if name in tensors:
        return tensors[name]
    stack, part = whole_name(name)
    return tensors[stack] if part is None else tensors[stack][part]


def with_whole_stacks(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with whole stacks in place of their parts; parts that are not given are those in ``tensors``."""
    whole: dict[str, Tensor] = {}
    for name, value in weights.items():
        stack, part = (name, None) if name in tensors else whole_name(name)
        if part is None:
            whole[name] = value
            continue
        if stack not in whole:
            whole[stack] = tensors[stack].detach().clone()
        whole[stack][part] = value
    return whole


@dataclass(frozen=True)
class Contraction:
    """An einsum of an activation and a weight: which axes they share.

    Attributes:
        x: Axes of the activation: those of the parts, of the rows of the batch, and of the channels that are read.
        y: The same axes of the result; the last are the channels that are made.
        weight: Axes of the weight: parts (if there are any), rows, columns.
    """

    x: tuple[int, ...]
    y: tuple[int, ...]
    weight: tuple[int, ...]


def spelled(equation: str, ranks: Iterable[int]) -> tuple[list[str], str] | None:
    """The labels of an einsum's operands and of its result, with letters for dots; None if it names no result."""
    sources, arrow, target = equation.replace(" ", "").partition("->")
    labels, free = sources.split(","), [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in equation]
    if not arrow:
        return None
    longest = ""
    for index, (part, rank) in enumerate(zip(labels, ranks, strict=True)):
        count = rank - len(part.replace("...", ""))
        dots = "".join(free[len(free) - count :]) if count and "..." in part else ""  # dots are aligned at their end
        labels[index], longest = part.replace("...", dots), max(longest, dots, key=len)
    return labels, target.replace("...", longest)


def contraction(equation: str, ranks: tuple[int, int], weight: int) -> Contraction | None:
    """How an einsum of two operands applies one of them, the weight; None if it is no linear layer."""
    found = spelled(equation, ranks)
    if found is None or any(len(set(part)) < len(part) for part in (*found[0], found[1])):
        return None
    (w, x), y = (found[0][weight], found[0][1 - weight]), found[1]
    read, made = ([label for label in w if label in a and label not in b] for a, b in ((x, y), (y, x)))
    stack = [label for label in w if label in x and label in y]
    rest = [label for label in x if label not in w]
    if len(read) != 1 or len(made) != 1 or len(stack) > 1 or len(w) != 2 + len(stack) or set(y) - {*rest, *w}:
        return None
    if not set(rest) <= set(y):
        return None
    return Contraction(
        tuple(map(x.index, (*stack, *rest, *read))),
        tuple(map(y.index, (*stack, *rest, *made))),
        tuple(map(w.index, (*stack, *made, *read))),
    )
