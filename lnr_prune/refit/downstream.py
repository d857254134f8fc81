"""What becomes of a layer's output: scaled and shifted, added to a shortcut, activated, and read by the next layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lnr_prune.calibration.functions.pause import GONE, Pause
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


def added_at(wiring: Wiring, name: str, pause: Pause, like: Tensor) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """The shortcuts that a layer's output meets: up to its activation, and on the path to the next layer.

    Args:
        wiring: What the network does with its layers' outputs.
        name: Name of the layer's weight.
        pause: A pass that waits at the layer.
        like: A tensor of the output's shape.

    Returns:
        Their values; None if one is not known, as when the pass has called other functions than the recorded one.
    """
    downstream, done = wiring.layers[name], len(pause.functions)
    if pause.functions != list(wiring.functions[:done]):
        return (downstream.affine.added({}, like), downstream.way.added({}, like))
    shortcuts = (each for each in (*downstream.affine.shortcuts, *downstream.way.shortcuts) if each is not None)
    needed = {number for shortcut in shortcuts for number in shortcut.needed if number < done}
    results = {number: pause.results[number] for number in needed if pause.results[number] is not GONE}
    return downstream.affine.added(results, like), downstream.way.added(results, like)
