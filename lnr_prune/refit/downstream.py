"""What becomes of a layer's output: scaled and shifted, added to a shortcut, activated, and read by the next layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lnr_prune.refit.recording import Recorded

Step = Callable[[Tensor, Tensor | None], Tensor]
"""One function on the path: its input, and the shortcut if it takes one -> its output."""


@dataclass(frozen=True, eq=False)
class Shortcut:
    """What is added to a layer's output. It is computed from results that are there before the layer is called.

    Attributes:
        needed: Numbers of the calls that give these results.
        ids: The results' ids in the recorded calls.
        calls: The calls that compute the shortcut from them, in order; the last result is the shortcut.
    """

    needed: tuple[int, ...]
    ids: tuple[int, ...]
    calls: tuple[Recorded, ...]

    def of(self, results: Mapping[int, Tensor], like: Tensor) -> Tensor | None:
        """The shortcut, of this tensor's shape, or None if it is not known."""
        if any(number not in results for number in self.needed):
            return None
        known = {of: results[number] for of, number in zip(self.ids, self.needed, strict=True)}
        result: Any = next(iter(known.values()), None)  # none if it is made of parameters only
        try:
            for call in self.calls:
                known[id(call.result)] = result = call.again(known)
        except (RuntimeError, TypeError, ValueError, IndexError):  # it fixes the recorded batch's size
            return None
        return result if isinstance(result, Tensor) and result.shape == like.shape else None


@dataclass(frozen=True, eq=False)
class Steps:
    """Functions, one after the other: ``f_n(... f_1(y, s_1) ..., s_n)``.

    Attributes:
        functions: The functions.
        shortcuts: The shortcut that each of them takes as well; None = it takes none.
    """

    functions: tuple[Step, ...] = ()
    shortcuts: tuple[Shortcut | None, ...] = ()

    def __call__(self, y: Tensor, added: Sequence[Tensor]) -> Tensor:
        """The result for y, with these values of the shortcuts."""
        rest = iter(added)
        for function, shortcut in zip(self.functions, self.shortcuts, strict=True):
            y = function(y, None if shortcut is None else next(rest))
        return y

    def then(self, function: Step, shortcut: Shortcut | None) -> "Steps":
        """These steps, and one more."""
        return Steps((*self.functions, function), (*self.shortcuts, shortcut))

    def added(self, results: Mapping[int, Tensor], like: Tensor) -> list[Tensor] | None:
        """The values of the shortcuts, of this tensor's shape; None if one is not known."""
        values = [shortcut.of(results, like) for shortcut in self.shortcuts if shortcut]
        known = [value for value in values if value is not None]
        return known if len(known) == len(values) else None


@dataclass(frozen=True, eq=False)
class Downstream:
    """``z = phi(alpha y + c + beta_1 s_1 + ...)``, elementwise: what the network computes from a layer's output y.

    Attributes:
        affine: The functions that compute the argument of phi.
        activation: phi, None = the identity.
        mean: Name of the running mean that the first of them subtracts from y, if it is a batch norm.
        into: Name of the weight of the next layer, if nothing else reads y or what is computed from it on the path;
            else None.
        way: The path: the functions, of any kind, that compute that layer's input from y.
    """

    affine: Steps = Steps()
    activation: Callable[[Tensor], Tensor] | None = None
    mean: str | None = None
    into: str | None = None
    way: Steps = Steps()


@dataclass(frozen=True, eq=False)
class Wiring:
    """What a network does with its layers' outputs.

    Attributes:
        functions: Every function that the forward pass calls, in order.
        layers: Weight's name -> what becomes of that layer's output.
        last: Name of the weight of the layer whose output is the network's; None = there is no such layer.
    """

    functions: tuple[Any, ...]
    layers: Mapping[str, Downstream]
    last: str | None = None


class Replay(TorchFunctionMode):
    """Keeps results for the shortcuts, as long as a forward pass calls the same functions as the recorded one."""

    def __init__(self, recorded: Wiring) -> None:
        super().__init__()
        self._results: dict[int, Any] = {}
        self._recorded, self._number, self._alike = recorded, 0, True
        self._needed_by = {  # number of a call -> the last layer that needs its result
            number: name
            for name, downstream in recorded.layers.items()
            for shortcut in (*downstream.affine.shortcuts, *downstream.way.shortcuts)
            for number in (shortcut.needed if shortcut else ())
        }

    def added(self, name: str, like: Tensor) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """The shortcuts that this layer's output meets: up to its activation, and on the path to the next layer.

        Results that no later layer needs are freed.
        """
        downstream = self._recorded.layers[name]
        values = downstream.affine.added(self._results, like), downstream.way.added(self._results, like)
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
