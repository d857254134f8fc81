"""Forward passes that stop in the middle and go on later.

The forward is the user's code, and we cannot write pauses into it. But all its work is done in torch functions, and a
TorchFunctionMode sees every one of them. A pass that stops keeps what its functions have returned, and an exception
ends the forward. To go on, the forward is called again from the start. Functions that were called before the stop
return what they returned then, and compute nothing::

    until the stop      conv1 . relu . conv2 . |          a dot is computed, a bar is a stop,
    from there on       conv1 - relu - conv2 - relu . fc  a dash is returned as it was

What must be kept is what the forward's own variables hold when it stops. Python knows: all other tensors are gone by
then, and `GONE` stands in for them. So a pass that waits is plain data, as small as the activations at one place.

Functions that torch.jit has compiled are not seen, so they run on what stands in. Whoever pauses a forward finds that
out by trying, and then keeps everything.
"""

import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lnr_prune.calibration.calls import Call, around_leaves, forward, fresh
from lnr_prune.calibration.functions.views import name_of
from lnr_prune.calibration.visible.recurrent import VisibleRecurrence
from lnr_prune.errors import CalibrationError
from lnr_prune.runtime import noise

GONE = torch.tensor(float("nan"))  # stands in for a tensor that the forward no longer holds

Before = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], bool]
"""A function that is about to be called, and its arguments -> whether to stop there."""
Follow = Callable[[Any, tuple[Any, ...], Mapping[str, Any], Any], None]
"""Takes note of a function, its arguments, and what it has returned."""


@dataclass(frozen=True, eq=False)
class Pause:
    """A forward pass that waits between two functions.

    Attributes:
        call: Its own copy of the model's arguments, as they are now.
        functions: The functions that it has called, in order.
        results: What they have returned; tensors that it no longer holds are `GONE`.
        random: The states of the random number generators; None = as when the pass begins.
    """

    call: Call
    functions: list[Any] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    random: noise.States | None = None

    def before_last(self) -> "Pause":
        """The same, before its last function."""
        return Pause(self.call, self.functions[:-1], self.results[:-1], self.random)

    def copied(self, model_tensors: Iterable[Tensor]) -> "Pause":
        """The same with tensors of its own; those that share memory share it in the copy, too.

        Args:
            model_tensors: Tensors that stay the same ones, with all their views.
        """
        storages = {_storage(tensor): None for tensor in model_tensors}
        copies: dict[int, Tensor] = {id(GONE): GONE}
        held: dict[int, Any] = {}

        def other(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) not in copies:
                copies[id(leaf)] = _copy(leaf, storages, held)
            return copies[id(leaf)]

        results = [tree_map(other, each) if _holds_tensors(each) else each for each in self.results]
        return Pause(tree_map(other, self.call), list(self.functions), results, self.random)


def begin(call: Call) -> Pause:
    """A pass that has not begun, on a copy of the call."""
    return Pause(fresh(call))


class Replay(TorchFunctionMode):
    """Returns what functions have returned before; from there on, they are computed, until someone says `halt`.

    Attributes:
        functions: The functions called so far.
        results: What they have returned, held weakly once the forward has got it.
        random: The states of the random number generators where it has halted.
        halted: Whether it has.
    """

    def __init__(self, pause: Pause, *, before: Before | None = None, follow: Follow | None = None, keep: bool = False):
        """Takes a pause, and lets go of its results as soon as the forward has got them.

        Args:
            pause: Where the pass waits.
            before: Told of every function that is about to be computed; if it returns True, the pass halts.
            follow: Told of every function that is not computed again.
            keep: Whether all tensors are kept, held by the forward or not.
        """
        super().__init__()
        self.functions, self.results, self.random = list(pause.functions), list(pause.results), pause.random
        self._given = pause.results
        self.halted, self._leaving, self._due = False, False, False
        self._known, self._number = len(self.functions), 0
        self._before, self._follow, self._keep = before, follow, keep
        self._mine = _tensors_in(pause.call)  # that belong to this pass

    def halt(self) -> None:
        """Ends the forward here, before the function that is about to be computed."""
        self.halted, self._leaving, self.random = True, True, noise.states()
        self.results = [_strong(each) for each in self.results]  # now, as long as the forward holds them
        raise _Halt

    def halt_after(self) -> None:
        """Ends the forward as soon as the function that is being computed has returned."""
        self._due = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._leaving:  # code that cleans up
            return func(*args, **kwargs)
        if self._number < self._known:
            return self._again(func, args, kwargs)
        if self._number == self._known:  # the forward has got all that it needs
            self._begin()
        if self._before is not None and self._before(func, args, kwargs):
            self.halt()
        self._number += 1
        result = func(*args, **kwargs)
        self.functions.append(func)
        self.results.append(result if self._keep else _weak(result))
        if self._due:
            self.halt()
        return result

    def _begin(self) -> None:
        """From here on, functions are computed."""
        if self.random is not None:
            noise.restore(self.random)
        self._given.clear()
        if not self._keep:
            self.results = [_weak(each) for each in self.results]

    def _again(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the next function has returned before."""
        if self.functions[self._number] != func:
            self._leaving, was = True, name_of(self.functions[self._number])
            if sys.exc_info()[0] is not None:  # an error, or Ctrl-C, is ending the forward
                return func(*args, **kwargs)
            raise _OtherPathError(f"function {self._number} is {name_of(func)} now, and was {was} before")
        result, first = self.results[self._number], args[0] if args else None
        self._number += 1
        if self._follow is not None:
            self._follow(func, args, kwargs, result)
        written = result is None or (result is first and result is not GONE)
        if written and id(first) not in self._mine:  # a setting of torch's, or a tensor of the model
            return func(*args, **kwargs)
        self._mine |= _tensors_in(result)
        return result


@dataclass(frozen=True, eq=False)
class Manner:
    """How a model's passes are paused, found out by trying.

    Attributes:
        keep: Whether all tensors are kept, as some functions are not seen.
        put_back: Puts the model back before every run, if its forward changes it (caches, counters); else None.
    """

    keep: bool = False
    put_back: Callable[[], bool] | None = None


def go_on(
    model: nn.Module,
    pause: Pause,
    replay: Replay,
    manner: Manner,
    weights: Mapping[str, Tensor] | None = None,
    around: Collection[AbstractContextManager[Any]] = (),
) -> tuple[Pause | None, Any]:
    """Goes on with a pass, until it halts or ends.

    The caller has put the model into evaluation mode.

    Args:
        model: The model.
        pause: Where the pass waits.
        replay: Made of this pause.
        manner: How passes of this model are paused.
        weights: Tensors to use instead of the model's own; no function before the pause may have read them.
        around: Contexts around the forward; they see only what is computed.

    Returns:
        Where it waits now, None if it has ended; and the outputs, None if it has not.

    Raises:
        CalibrationError: If the forward fails, or does not call the same functions again.
    """
    leaves = {id(leaf): leaf for leaf in tree_leaves(pause.call) if isinstance(leaf, Tensor | nn.Module)}
    if manner.put_back is not None:
        manner.put_back()
    random, gradients = noise.states(), torch.is_grad_enabled()
    try:
        with ExitStack() as stack:
            for context in (*around, replay, VisibleRecurrence()):
                stack.enter_context(context)
            outputs = forward(model, around_leaves(pause.call, leaves), weights)
    except _Halt:
        outputs = None
    except CalibrationError:
        if not replay.halted:  # what fails while the forward is left does not matter
            raise
    finally:  # contexts that an error has ended may have been replayed instead
        noise.restore(random)
        torch.set_grad_enabled(gradients)
    if not replay.halted:
        return None, outputs
    return Pause(pause.call, replay.functions, replay.results, replay.random), None


def same_values(expected: Any, outputs: Any) -> bool:
    """Whether two outputs of a model have the same values, up to rounding."""
    pairs = [tree_leaves(expected), tree_leaves(outputs)]
    return len(pairs[0]) == len(pairs[1]) and all(
        _close(a, b) for a, b in zip(*pairs, strict=True) if isinstance(a, Tensor)
    )


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    finite = a[a.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-4, atol=1e-6 * largest, equal_nan=True)


class _Halt(BaseException):
    """Ends a forward; not an Exception, which forwards may catch."""


class _OtherPathError(Exception):
    """The forward does not call the functions that it has called before."""


def _tensors_in(value: Any) -> set[int]:
    """Ids of tensors; there is only one True and one None, so those would say nothing."""
    leaves = [value] if isinstance(value, Tensor) else tree_leaves(value)
    return {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)}


def _weak(result: Any) -> Any:
    """A result that is not kept alive by us."""
    if isinstance(result, Tensor):
        return weakref.ref(result)
    return tree_map(_weak, result) if _holds_tensors(result) else result


def _strong(result: Any) -> Any:
    if isinstance(result, weakref.ref):
        tensor = result()
        return GONE if tensor is None else tensor
    return tree_map(_strong, result) if _holds_tensors(result) else result


def _holds_tensors(result: Any) -> bool:
    if isinstance(result, tuple | list):
        return any(isinstance(each, Tensor | weakref.ref | tuple | list) for each in result)
    return isinstance(result, Tensor | weakref.ref | dict)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _copy(tensor: Tensor, stay: Collection[int], held: dict[int, Any]) -> Tensor:
    """A copy of a tensor in the copy of its storage; one that lies in a storage that stays is returned as it is."""
    if tensor.layout != torch.strided or type(tensor) is not Tensor or tensor.is_conj() or tensor.is_neg():
        return tensor.clone()
    storage = _storage(tensor)
    if storage in stay and storage:
        return tensor
    if storage not in held:
        held[storage] = tensor.untyped_storage().clone()
    made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return made.set_(held[storage], tensor.storage_offset(), tensor.size(), tensor.stride())
