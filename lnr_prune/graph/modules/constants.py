"""Numbers that a forward reads from its buffers, such as ``float(self.stride[0])``, while it is traced.

torch.export traces with tensors that have no values, so a buffer cannot become a number. Here it can: what is computed
from small buffers alone is computed with their real values, too, and a number that is read from it is the real one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

LARGEST = 4096  # elements of a buffer that may become numbers
# Beginnings of the names of functions that may write into a tensor, besides those that end in one underscore.
WRITES = ("__i", "__set", "batch_norm", "instance_norm")
# Functions that write only if an argument says so, which is the sixth: they then take statistics of the batch.
STATISTICS = {"batch_norm": "training", "instance_norm": "use_input_stats"}
READS = {"__bool__", "__float__", "__index__", "__int__", "item", "tolist"}
FOLLOWED = {
    "__add__", "__eq__", "__floordiv__", "__ge__", "__getitem__", "__gt__", "__le__", "__lt__", "__mod__", "__mul__",
    "__ne__", "__neg__", "__pow__", "__radd__", "__rmul__", "__rsub__", "__rtruediv__", "__sub__", "__truediv__",
    "abs", "add", "all", "amax", "amin", "any", "argmax", "argmin", "bool", "ceil", "clamp", "clone", "cpu", "cumsum",
    "detach", "diff", "div", "double", "eq", "exp", "flatten", "float", "floor", "ge", "gt", "int", "le", "log", "long",
    "lt", "max", "mean", "min", "mul", "narrow", "ne", "neg", "pow", "prod", "reshape", "round", "rsub", "select",
    "sqrt", "squeeze", "sub", "sum", "to", "true_divide", "type", "unbind", "unsqueeze", "view",
}  # fmt: skip
"""Functions of tensors that always give the same, and write to none of them."""


def real_values(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """(Submodule, name) -> a small buffer, or a tensor that is a plain attribute."""
    return {
        (path, name): tensor
        for path, module in model.named_modules()
        for name, tensor in (*module._buffers.items(), *vars(module).items())
        if isinstance(tensor, Tensor) and tensor.numel() <= LARGEST and not tensor.is_meta
    }


class RealNumbers(TorchFunctionMode):
    """Within this, numbers that are read from small buffers are the real ones."""

    def __init__(self, model: nn.Module, values: Mapping[tuple[str, str], Tensor]) -> None:
        """Starts a forward pass.

        Args:
            model: The model, whose buffers are without values now.
            values: Its `real_values` before.
        """
        super().__init__()
        # id of a traced tensor -> itself, which keeps the id its own, and its value
        self.known = {id(tensor): (tensor, values[key]) for key, tensor in real_values(model).items() if key in values}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__iter__":  # over a buffer's rows
            return iter(self.__torch_function__(Tensor.unbind, types, args))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = [leaf for leaf in tensors if id(leaf) in self.known]
        if known and name not in READS and _may_write(name, args, kwargs):
            self.known.clear()  # it may write into one of them, or into a view
            known = []
        if not known or name not in READS | FOLLOWED or len(known) < len(tensors):
            return func(*args, **kwargs)
        real_args, real_kwargs = tree_map(self._value, (args, kwargs))
        with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
            value = func(*real_args, **real_kwargs)
        if name in READS:
            return value
        traced = func(*args, **kwargs)
        for each, real in zip(tree_leaves(traced), tree_leaves(value), strict=True):
            if isinstance(each, Tensor):
                self.known[id(each)] = each, real
        return traced

    def _value(self, leaf: Any) -> Any:
        return self.known[id(leaf)][1] if isinstance(leaf, Tensor) else leaf


def _may_write(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function may write into one of its arguments."""
    if name in STATISTICS:
        return bool(args[5] if len(args) > 5 else kwargs.get(STATISTICS[name], True))
    return name.startswith(WRITES) or name[-1:] == "_" != name[-2:-1] or bool({"out", "inplace"} & kwargs.keys())
