"""What becomes of a layer's output before it is mixed: scaled and shifted, added to a shortcut, activated."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lnr_prune.calibration import Call, run
from lnr_prune.graph import named_tensors
from lnr_prune.multihead import visible_attention

Step = Callable[[Tensor, Tensor | None], Tensor]
"""One function on the way: what arrives, and the shortcut if it adds one -> what goes on."""
Value = TypeVar("Value")
LONGEST = 8  # calls between a result and the shortcut that is made of it


@dataclass(frozen=True, eq=False)
class Shortcut:
    """What is added to a layer's output: made of results that are there before the layer is called.

    Attributes:
        needed: Numbers of the calls with these results.
        ids: Under which the recorded calls know them.
        calls: What is done to them, in order; the last result is the shortcut.
    """

    needed: tuple[int, ...]
    ids: tuple[int, ...]
    calls: tuple["_Recorded", ...]

    def of(self, results: Mapping[int, Tensor], like: Tensor) -> Tensor | None:
        """The shortcut, of this tensor's shape, or None if it cannot be had."""
        if any(number not in results for number in self.needed):
            return None
        known = {of: results[number] for of, number in zip(self.ids, self.needed, strict=True)}
        result: Any = next(iter(known.values()), None)  # none where it is made of parameters alone
        try:
            for call in self.calls:
                known[id(call.result)] = result = call.again(known)
        except (RuntimeError, TypeError, ValueError, IndexError):  # it holds the recorded batch's size
            return None
        return result if isinstance(result, Tensor) and result.shape == like.shape else None


@dataclass(frozen=True, eq=False)
class Onward:
    """``z = phi(alpha y + c + beta_1 s_1 + ...)``, elementwise: what the network makes of a layer's output y.

    Attributes:
        steps: The functions that make the argument of phi, one after the other.
        shortcuts: For every step, what it adds; None = nothing.
        activation: phi, None = the identity.
        mean: Name of the running mean that the first step subtracts from y, if it is a batch norm.
    """

    steps: tuple[Step, ...] = ()
    shortcuts: tuple[Shortcut | None, ...] = ()
    activation: Callable[[Tensor], Tensor] | None = None
    mean: str | None = None

    def affine(self, y: Tensor, added: Sequence[Tensor]) -> Tensor:
        """``alpha y + c + beta_1 s_1 + ...``, with the values of the shortcuts."""
        rest = iter(added)
        for step, shortcut in zip(self.steps, self.shortcuts, strict=True):
            y = step(y, None if shortcut is None else next(rest))
        return y

    def scale(self, y: Tensor) -> Tensor:
        """``alpha``, of y's shape."""
        nothing = [torch.zeros_like(y) for shortcut in self.shortcuts if shortcut]
        return self.affine(torch.ones_like(y), nothing) - self.affine(torch.zeros_like(y), nothing)

    def added(self, results: Mapping[int, Tensor], like: Tensor) -> list[Tensor] | None:
        """The values of the shortcuts, of this tensor's shape; None if one is not known."""
        values = [shortcut.of(results, like) for shortcut in self.shortcuts if shortcut]
        known = [value for value in values if value is not None]
        return known if len(known) == len(values) else None


@dataclass(frozen=True, eq=False)
class Outlook:
    """What a network makes of its layers' outputs.

    Attributes:
        functions: Every function that the forward pass calls, in order.
        layers: Weight's name -> what becomes of that layer's output.
        last: Name of the weight whose layer's output is the network's; None = there is no such layer.
    """

    functions: tuple[Any, ...]
    layers: Mapping[str, Onward]
    last: str | None = None


def outlook(model: nn.Module, names: Iterable[str], example: Call) -> Outlook:
    """Follows every layer's output through one forward pass, as far as functions are elementwise.

    What a function does is found out by trying: whether it is affine in what arrives and what it adds, or else
    elementwise. A shortcut must have been computed before the layer is called, so that its error is known then.

    Args:
        model: The model.
        names: Names of the layers' weights.
        example: Arguments of a forward pass.
    """
    record = _Record()
    with visible_attention(model), record:
        outputs = run(model, example)
    names = list(names)
    trail = _Trail(record.calls, named_tensors(model), names)
    given = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    last = next((name for name in names if len(given) == 1 and trail.makes_alone(name, given[0])), None)
    return Outlook(tuple(call.function for call in record.calls), {name: trail.follow(name) for name in names}, last)


class Following(TorchFunctionMode):
    """Keeps results of a forward pass for the shortcuts, while it calls the same functions as the recorded one."""

    def __init__(self, recorded: Outlook) -> None:
        super().__init__()
        self._results: dict[int, Any] = {}
        self._recorded, self._number, self._alike = recorded, 0, True
        self._needed_by = {  # number of a call -> the last layer that its result is needed by
            number: name
            for name, onward in recorded.layers.items()
            for shortcut in onward.shortcuts
            for number in (shortcut.needed if shortcut else ())
        }

    def added(self, name: str, like: Tensor) -> list[Tensor] | None:
        """What is added to the output of the layer that is reached; results that no later one needs are let go."""
        values = self._recorded.layers[name].added(self._results, like)
        for number in [number for number in self._results if self._needed_by[number] == name]:
            del self._results[number]
        return values

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        number, self._number = self._number, self._number + 1
        functions = self._recorded.functions
        self._alike = self._alike and number < len(functions) and functions[number] == func
        result = func(*args, **(kwargs or {}))
        if self._alike and number in self._needed_by:
            self._results[number] = result
        return result


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A call; ``writes``: whether it writes to its inputs."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any
    writes: bool

    @property
    def inputs(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def again(self, replaced: Mapping[int, Tensor]) -> Any:
        """The result for other inputs (id of the one in its place -> tensor), which are left as they are."""

        def other(leaf: Value) -> Value | Tensor:
            if not isinstance(leaf, Tensor) or id(leaf) not in replaced:
                return leaf
            given = replaced[id(leaf)]
            return given.clone() if self.writes else given

        args, kwargs = tree_map(other, (self.args, dict(self.kwargs)))
        with torch.no_grad():
            return self.function(*args, **kwargs)


class _Record(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Recorded] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before = _versions(given)
        result = func(*args, **(kwargs or {}))
        writes = before is None or before != _versions(given)
        self.calls.append(_Recorded(func, args, kwargs or {}, result, writes))
        return result


def _versions(tensors: Iterable[Tensor]) -> list[int] | None:
    """How often each was written to; None = not known."""
    tensors = list(tensors)
    return None if any(tensor.is_inference() for tensor in tensors) else [tensor._version for tensor in tensors]


class _Trail:
    """A recorded forward pass: who uses what."""

    def __init__(self, calls: Sequence[_Recorded], tensors: Mapping[str, Tensor], layers: Iterable[str]) -> None:
        self.calls, self.names = calls, {id(tensor): name for name, tensor in tensors.items()}
        self.weights = {id(tensors[name]) for name in layers}
        self.uses: dict[int, list[int]] = defaultdict(list)  # of a tensor, by id: the calls keep all of them alive
        self.makes: dict[int, list[int]] = defaultdict(list)
        for number, call in enumerate(calls):
            results = [leaf for leaf in tree_leaves(call.result) if isinstance(leaf, Tensor)]
            for of in dict.fromkeys(map(id, call.inputs)) if results else ():
                self.uses[of].append(number)
            for of in dict.fromkeys(map(id, results)):
                self.makes[of].append(number)
        self.applied = {name: self.uses[id(tensors[name])] for name in layers}

    def follow(self, name: str) -> Onward:
        """What becomes of the output of the layer with this weight."""
        onward = Onward()
        if len(self.applied[name]) != 1:
            return onward
        (layer,) = self.applied[name]
        for number, value in self._path(layer):
            call = self.calls[number]
            others = {id(leaf) for leaf in call.inputs if leaf is not value and id(leaf) not in self.names}
            if len(others) > 1 or not _suits(call, value):
                break
            other = next(iter(others), None)
            shortcut = None if other is None else self._shortcut(other, number, layer)
            if other is not None and shortcut is None:
                break
            step = _step(call, value, other)
            if _is_affine(step, value, other is not None):
                mean = onward.mean if onward.steps else self._mean(call, value)
                onward = Onward((*onward.steps, step), (*onward.shortcuts, shortcut), None, mean)
            else:
                if other is None and _is_activation(step, value):
                    onward = Onward(onward.steps, onward.shortcuts, partial(_alone, step), onward.mean)
                break
        return onward

    def makes_alone(self, name: str, output: Tensor) -> bool:
        """Whether a tensor is what the layer with this weight returned, in its one call."""
        applied = self.applied[name]
        return len(applied) == 1 and self.makes[id(output)] == applied

    def _path(self, layer: int) -> Iterator[tuple[int, Tensor]]:
        """The calls that use a layer's output, then their result, and so on, while each is the only one."""
        number, value = layer, self.calls[layer].result
        while isinstance(value, Tensor):
            later = [use for use in self.uses[id(value)] if use > number]
            if not later or (len(later) > 1 and self.calls[later[0]].result is not value):
                return
            number = later[0]
            yield number, value
            value = self.calls[number].result

    def _shortcut(self, of: int, before: int, layer: int) -> Shortcut | None:
        """How a tensor that a call reads is made of results that are there before the layer is called."""
        leaves: dict[int, int] = {}
        replayed: set[int] = set()
        wanted = [(of, before)]
        while wanted:
            of, before = wanted.pop()
            made = max((number for number in self.makes[of] if number < before), default=None)
            if made is None:
                return None
            if made < layer:
                if leaves.setdefault(of, made) != made:
                    return None
                continue
            call = self.calls[made]
            if len(replayed) >= LONGEST or any(id(leaf) in self.weights for leaf in call.inputs):
                return None
            replayed.add(made)
            wanted += [(id(leaf), made) for leaf in call.inputs if id(leaf) not in self.names]
        return Shortcut(tuple(leaves.values()), tuple(leaves), tuple(self.calls[number] for number in sorted(replayed)))

    def _mean(self, call: _Recorded, value: Tensor) -> str | None:
        """Name of the running mean of a batch norm."""
        if call.function is not F.batch_norm or call.args[:1] == () or call.args[0] is not value:
            return None
        mean = call.args[1] if len(call.args) > 1 else call.kwargs.get("running_mean")
        name = self.names.get(id(mean))
        return name if name is not None and len(self.uses[id(mean)]) == 1 else None


def _suits(call: _Recorded, value: Tensor) -> bool:
    """Whether all of a call's tensors but its constants have the shape of what arrives."""
    return isinstance(call.result, Tensor) and call.result.shape == value.shape and call.result.is_floating_point()


def _step(call: _Recorded, value: Tensor, shortcut: int | None) -> Step:
    def step(y: Tensor, s: Tensor | None) -> Tensor:
        result: Tensor = call.again({id(value): y} | ({} if shortcut is None or s is None else {shortcut: s}))
        return result

    return step


def _alone(step: Step, z: Tensor) -> Tensor:
    return step(z, None)


def _is_affine(step: Step, value: Tensor, adds: bool) -> bool:
    """Whether ``step(y, s) = alpha y + beta s + c``, alpha, beta and c of y's shape."""
    zero, one = torch.zeros_like(value), torch.ones_like(value)
    try:
        c = step(zero, zero)
        alpha, beta = step(one, zero) - c, (step(zero, one) - c if adds else zero)
        return all(_close(step(y, s), alpha * y + beta * s + c) for y, s in (_drawn(value, 2), _drawn(value, 2, 3.0)))
    except (RuntimeError, TypeError):
        return False


def _is_activation(step: Step, value: Tensor) -> bool:
    """Whether a step is one function of each entry, with slopes that a fixed-point iteration can follow."""
    (y,) = _drawn(value, 1, 3.0)
    flipped = y.flatten().flip(0).view_as(y)
    try:
        if not _close(step(flipped, None), step(y, None).flatten().flip(0).view_as(y)):
            return False
        grid = torch.linspace(-8, 8, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
        slopes = step(grid, None).flatten().diff() / grid.flatten().diff()
        return bool((slopes > -0.5).all() and (slopes < 1.6).all())
    except (RuntimeError, TypeError):
        return False


def _drawn(like: Tensor, count: int, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(like.shape, generator=generator) * scale for _ in range(count))
    return tuple(each.to(like) for each in drawn)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    tolerance = min(1e3 * torch.finfo(a.dtype).eps, 0.05) * max(1.0, float(b.abs().max()) if b.numel() else 1.0)
    return bool(((a - b).abs() <= tolerance).all())
