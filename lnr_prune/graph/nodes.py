"""Reading the nodes of an ATen graph."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import fx

TORCH = f"{Path(torch.__file__).parent}{os.sep}"  # ends in a separator, so torchvision is not inside
DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
# Their result has the shape of their first operand, channel by channel.
SAME = {
    *DROPOUTS, "alias", "clone", "contiguous", "detach", "fill", "lift", "lift_fresh", "lift_fresh_copy",
    "resolve_conj", "resolve_neg", "to", "_to_copy", "type_as", "zero",
}  # fmt: skip
# Pointwise operations that lack PyTorch's tag for it.
POINTWISE = {
    "__and__", "__or__", "_conj", "_neg_view", "absolute", "arccos", "arccosh", "arcsin", "arcsinh", "arctan",
    "arctan2", "arctanh", "celu", "clip", "complex", "conj", "copy", "copysign", "divide", "elu", "fix",
    "floor_divide", "gelu", "greater", "greater_equal", "hardsigmoid", "hardswish", "imag", "isclose", "isreal",
    "less", "less_equal", "log_sigmoid", "masked_fill", "multiply", "negative", "not_equal", "polar", "real", "relu6",
    "rsub", "selu", "softplus", "special_digamma", "special_erf", "special_erfc", "special_erfinv", "special_exp2",
    "special_expit", "special_expm1", "special_gammainc", "special_gammaincc", "special_gammaln", "special_i0",
    "special_log1p", "special_logit", "special_ndtr", "special_polygamma", "special_psi", "special_round",
    "special_sinc", "special_xlogy", "subtract", "true_divide", "where",
}  # fmt: skip
# Their result has the same value everywhere, or values that no model can depend on.
UNIFORM = {form.format(kind) for kind in ("zeros", "ones", "full", "empty") for form in ("{}", "new_{}", "{}_like")}


def describe(node: fx.Node) -> str:
    """Which operation a node is, in which module, and the line of code that calls it."""
    line = re.sub(r'File "(?:.*[/\\\\])?(.+)", line (\d+), in .*', r"\1:\2", code_line(node))
    where = ", ".join(part for part in (module_path(node), line) if part)
    return f"{op_name(node)} ({where})" if where else op_name(node)


def module_path(node: fx.Node) -> str:
    """Name of the submodule whose forward a node is in; "" for the model itself."""
    return _innermost(node)[0]


def module_kind(node: fx.Node) -> str:
    """Full name of that submodule's class, such as "torch.nn.modules.conv.Conv2d"; "" if unknown."""
    return _innermost(node)[1]


def _innermost(node: fx.Node) -> tuple[str, str]:
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = modules[-1] if modules else ("", "")
    return str(path), str(getattr(kind, "__qualname__", kind))


def code_line(node: fx.Node) -> str:
    """File and line of the code outside torch that calls a node; "" if unknown."""
    lines = [
        line.strip()
        for line in (node.meta.get("stack_trace") or "").splitlines()
        if line.strip().startswith("File") and TORCH not in line
    ]
    return lines[-1] if lines else ""


def op_name(node: fx.Node) -> str:
    """ATen name of a node's operation, without overload and namespace; the same for in-place variants."""
    schema = getattr(node.target, "_schema", None)
    name = str(schema.name.split("::")[1] if schema else getattr(node.target, "__name__", str(node.target)))
    name = name.removeprefix("_unsafe_")
    return name if name.startswith("__") else name.rstrip("_")


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's value; () where it is not a tensor."""
    return tuple(int(size) for size in getattr(node.meta.get("val"), "shape", ()))


def spatial_axes(node: fx.Node) -> int:
    """2 for "conv2d", 1 for "max_pool1d", ..."""
    return next(int(letter) for letter in reversed(op_name(node)) if letter.isdigit())


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a node, by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result depends on one element of every operand, broadcasting aside."""
    return op_name(node) in SAME | POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())


def draws(node: fx.Node) -> bool:
    """Whether an operation makes a value of random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and op_name(node) not in DROPOUTS


def named_argument(node: fx.Node, name: str) -> Any:
    """An argument of an ATen operation by its schema's name; its default if it is not given; None if there is none."""
    for position, each in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if each.name == name:
            return argument(node, position, name, each.default_value)
    return None


def axes_argument(node: fx.Node, rank: int) -> list[int]:
    """The axes that an operation on a value of this rank is told to work along; all of them if it is not told."""
    dims = named_argument(node, "dim")
    if dims is None or dims == []:
        return list(range(rank))
    return sorted({dim % rank for dim in ([dims] if isinstance(dims, int) else dims)})
