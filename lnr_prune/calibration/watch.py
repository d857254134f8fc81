"""Watch the layers' calls in a forward pass, whoever makes them, and give them other weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lnr_prune.calibration.calls import Call, forward, fresh
from lnr_prune.calibration.visible.attention import visible_attention
from lnr_prune.calibration.visible.recurrent import VisibleRecurrence, recurrence
from lnr_prune.graph.module import evaluating, named_tensors, unfused_attention

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_PRODUCT = ("input", "weight")
_SIGNATURES: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    torch.addmm: ("bias", "input", "weight"),
    **dict.fromkeys((torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__), _PRODUCT),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONV),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED),
    recurrence: ("input", "weight", "bias", "state", "step", "projection", "reverse"),
}


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One application of a layer's weight: what an adapter reads x and y from.

    Attributes:
        input: The layer's input, batched.
        output: Its output.
        weight: The weight it used.
        bias: The bias it used, or None.
        options: The call's other arguments (stride, padding, dilation, groups).
        function: What was called.
    """

    input: Tensor
    output: Tensor
    weight: Tensor
    bias: Tensor | None
    options: Mapping[str, Any]
    function: Callable[..., Tensor]

    def again(self, **arguments: Tensor) -> Tensor:
        """The output for another "input", "weight" or "bias"; what is not given stays as it was."""
        given = {"input": self.input, "weight": self.weight, "bias": self.bias, **arguments}
        return self.function(*(given[key] for key in _SIGNATURES[self.function] if key in given), **self.options)

    def split(self, samples: int | list[int]) -> Iterator["LayerCall"]:
        """The call in pieces of ``samples`` samples each, as torch.split cuts them."""
        for x, y in zip(torch.split(self.input, samples), torch.split(self.output, samples), strict=True):
            yield replace(self, input=x, output=y)


See = Callable[[str, LayerCall], None]
Swap = Callable[[str, Tensor], Mapping[str, Tensor]]


class _Watch(TorchFunctionMode):
    """Sees every call that uses a watched weight, modules and functional calls alike."""

    def __init__(self, watched: Mapping[int, str], see: See | None, swap: Swap | None) -> None:
        super().__init__()
        self.watched, self.see, self.swap = watched, see, swap

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        signature = _SIGNATURES.get(func, ())
        named = {**dict(zip(signature, args, strict=False)), **kwargs}
        name = self.watched.get(id(named["weight"])) if "weight" in named else None
        if name is None:
            return func(*args, **kwargs)
        x, weight, bias = named.pop("input"), named.pop("weight"), named.pop("bias", None)
        if self.swap:
            new = self.swap(name, _batched(x, weight))
            args = tuple(new.get(key, value) for key, value in zip(signature, args, strict=False))
            late = {key: value for key, value in new.items() if key in signature[len(args) :]}
            kwargs = {**kwargs, **late}
        result = func(*args, **kwargs)
        if self.see and func is recurrence:  # what the weight is applied to are the states
            x = result[0]
            self.see(name, LayerCall(x, F.linear(x, weight, bias), weight, bias, {}, F.linear))
        elif self.see:
            self.see(name, LayerCall(_batched(x, weight), _batched(result, weight), weight, bias, named, func))
        return result


def _batched(value: Tensor, weight: Tensor) -> Tensor:
    """The tensor with a batch axis, even if the layer was called without one."""
    return value[None] if value.dim() == 1 or value.dim() < weight.dim() else value


def watch(
    model: nn.Module,
    call: Call,
    names: Iterable[str],
    see: See | None = None,
    swap: Swap | None = None,
    within: AbstractContextManager[Any] | None = None,
    *,
    among_others: bool = False,
) -> None:
    """Runs the model once and reports every application of the named weights.

    Args:
        model: The model.
        call: Arguments of the forward pass.
        names: Names of the weights.
        see: Called after each call of a layer, with the weight's name and the call.
        swap: Called before it, with the name and the layer's input; returns the "weight" and "bias" to use
            instead (what it leaves out stays).
        within: A context that is entered around the forward pass, inside the one that watches it.
        among_others: Whether other passes are on their way at the same time. The caller has then put the model into
            evaluation mode, and puts it back once all have ended.
    """
    tensors = named_tensors(model)
    watching = _Watch({id(tensors[name]): name for name in names}, see, swap)
    own = fresh(call)  # not seen by what watches
    with ExitStack() as stack:
        if not among_others:
            stack.enter_context(evaluating(model))
            stack.enter_context(unfused_attention())
        for context in (visible_attention(model), watching, within or nullcontext(), VisibleRecurrence()):
            stack.enter_context(context)
        forward(model, own)
