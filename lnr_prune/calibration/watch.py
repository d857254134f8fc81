"""Watch the layers' calls in a forward pass, whoever makes them, and give them other weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lnr_prune.calibration.calls import Call, forward, fresh
from lnr_prune.calibration.functions.application import Application, applied
from lnr_prune.calibration.functions.views import Views
from lnr_prune.calibration.visible.attention import visible_attention
from lnr_prune.calibration.visible.recurrent import VisibleRecurrence
from lnr_prune.graph.module import evaluating, named_tensors, unfused_attention
from lnr_prune.graph.weights import part_name, with_whole_stacks


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One application of a layer's weight: what an adapter reads x and y from.

    Attributes:
        input: The layer's input, batched, with its channels on the last axis (of a convolution: on the second).
        output: Its output, likewise.
        weight: The weight it used, as the model stores it; if it is a part of a stack, this part.
        bias: The bias it used, or None.
        options: The call's other arguments (stride, padding, dilation, groups).
        function: Input, weight and bias -> output.
        counts: What counts, bool, one entry for each index of the first axes of input and output; None = everything.
    """

    input: Tensor
    output: Tensor
    weight: Tensor
    bias: Tensor | None
    options: Mapping[str, Any]
    function: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    counts: Tensor | None = None

    def again(self, **arguments: Tensor) -> Tensor:
        """The output for another "input", "weight" or "bias"; what is not given stays as it was."""
        x, weight = arguments.get("input", self.input), arguments.get("weight", self.weight)
        return self.function(x, weight, arguments.get("bias", self.bias))

    def at(self, index: Tensor) -> "LayerCall":
        """The call of some of its samples."""
        if len(index) == len(self.input):
            return self
        index = index.to(self.input.device)
        counts = None if self.counts is None else self.counts[index.to(self.counts.device)]
        return replace(self, input=self.input[index], output=self.output[index], counts=counts)

    def split(self, samples: int) -> Iterator["LayerCall"]:
        """The call in pieces of ``samples`` samples each, as torch.split cuts them."""
        for start in range(0, max(1, len(self.input)), samples):
            some = slice(start, start + samples)
            counts = None if self.counts is None else self.counts[some]
            yield replace(self, input=self.input[some], output=self.output[some], counts=counts)

    def counting(self, mask: Tensor | None) -> "LayerCall":
        """The call with a mask of what counts, (samples, positions), if these are the first axes of its activations.

        They may be one axis, too. Of other activations, such as those behind a pooling or of a convolution, everything
        counts.
        """
        return self if self.weight.dim() != 2 else replace(self, counts=on_axes(mask, self.input.shape[:-1]))


def on_axes(mask: Tensor | None, axes: Sequence[int]) -> Tensor | None:
    """A mask of what counts, if a tensor's axes begin with those of the mask, each by itself or all in one."""
    if mask is None or tuple(axes[: mask.dim()]) == mask.shape:
        return mask
    return mask.flatten() if tuple(axes[:1]) == (mask.numel(),) else None


def without(values: Tensor, left_out: Tensor, value: float) -> Tensor:
    """The values with another one wherever the mask says so, which is that of their first axes."""
    shape = (*left_out.shape, *[1] * (values.dim() - left_out.dim()))
    return values.masked_fill(left_out.view(shape).to(values.device), value)


See = Callable[[str, LayerCall], None]
Swap = Callable[[str, Tensor], Mapping[str, Tensor]]


class Watch(TorchFunctionMode):
    """Sees every call that uses a watched weight, modules and functional calls alike; see `watch`.

    Attributes:
        views: The tensors that the forward has made of the weights.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        names: Iterable[str],
        see: See | None = None,
        swap: Swap | None = None,
    ) -> None:
        """Takes the model's tensors, the names of the weights, and what is told of their calls."""
        super().__init__()
        self.tensors, self.names, self.see, self.swap = tensors, set(names), see, swap
        self.views = Views(tensors, self.names)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = applied(func, args, kwargs or {}, self.views)
        if found is None:
            result = func(*args, **(kwargs or {}))
            self.views.follow(func, args, kwargs or {}, result)
            return result
        if found.used.name in self.names:
            return self._layer(found, partial(func, *args, **(kwargs or {})))
        return self._stack(found, partial(func, *args, **(kwargs or {})))

    def _layer(self, found: Application, call: Callable[[], Any]) -> Any:
        """A call of a layer."""
        name, weight = found.used.name, self.tensors[found.used.name]
        x = _batched(found.inward(found.x), weight)
        new = self.swap(name, x) if self.swap else {}
        if new:
            other = found.back(new["input"]) if "input" in new else found.x
            result = found.call(other, found.used.make(new.get("weight", weight)), new.get("bias", found.bias))
        else:
            result = call()
        if self.see and found.repeats:
            x = result[0]
            self.see(name, LayerCall(x, F.linear(x, weight, found.bias), weight, found.bias, {}, F.linear))
        elif self.see:
            y = _batched(found.outward(result), weight)
            self.see(name, LayerCall(x, y, weight, found.bias, found.options, found.again))
        return result

    def _stack(self, found: Application, call: Callable[[], Tensor]) -> Tensor:
        """A call of several layers, whose weights are parts of a stack: each sees the rows that it is applied to."""
        stack, x = self.tensors[found.used.name], found.inward(found.x)
        parts = [(part_name(found.used.name, part), part, rows) for part, rows in found.parts()]
        parts = [entry for entry in parts if entry[0] in self.names]
        new = {part: self.swap(name, x[rows]) for name, part, rows in parts} if self.swap else {}
        if any(new.values()):
            changed = {part_name(found.used.name, part): of["weight"] for part, of in new.items() if "weight" in of}
            weight = with_whole_stacks(changed, self.tensors).get(found.used.name, stack)
            result = found.call(found.x, found.used.make(weight), found.bias)
        else:
            result = call()
        if self.see:
            y = found.outward(result)
            for name, part, rows in parts:
                self.see(name, LayerCall(x[rows], y[rows], stack[part], found.bias, {}, found.again_part))
        return result


def _batched(value: Tensor, weight: Tensor) -> Tensor:
    """The tensor with a batch axis, even if the layer was called without one."""
    return value[None] if value.dim() == 1 or value.dim() < weight.dim() else value


def watch(model: nn.Module, call: Call, names: Iterable[str], see: See | None = None, swap: Swap | None = None) -> None:
    """Runs the model once and reports every application of the named weights.

    Args:
        model: The model.
        call: Arguments of the forward pass.
        names: Names of the weights.
        see: Called after each call of a layer, with the weight's name and the call.
        swap: Called before it, with the name and the layer's input; returns the "weight" and "bias" to use
            instead (what it leaves out stays).
    """
    watching, own = Watch(named_tensors(model), names, see, swap), fresh(call)  # copied where nobody watches
    with evaluating(model), unfused_attention(), visible_attention(model), watching, VisibleRecurrence():
        forward(model, own)
