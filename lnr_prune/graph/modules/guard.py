"""One verb at a time: whatever happens in it, the model and the process are afterwards what they were before.

torch.export is not thread-safe, and forwards run with flags of torch that belong to the whole process. So the verbs
wait for each other. If one ends with an error, even with a KeyboardInterrupt in the middle of a step that puts
something back, `guarded` puts everything back once more.
"""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FrameType

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode

from lnr_prune.graph.module import remembered
from lnr_prune.graph.modules.twins import ordinary

_alone = threading.RLock()
_default: list[torch.device] = []  # the user's default device, for forwards; it belongs to whoever holds the lock


@contextmanager
def guarded(model: object) -> Iterator[None]:
    """Within this no other thread is; if it fails, the model, flags and random numbers are put back.

    Our own tensors are ordinary ones on the CPU, whatever the user has set: inference mode is off, and the default
    device is the CPU. Forwards run on the user's default device, see `users_device`.

    Args:
        model: The model that may be changed; anything else has nothing to put back.
    """
    with _alone, ExitStack() as stack:
        undo = [_flags(), *([remembered(model)] if isinstance(model, nn.Module) else ())]
        default = torch.get_default_device()
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if default.type != "cpu":
            stack.enter_context(torch.device("cpu"))
            if default.type != "meta":
                _default.append(default)
                stack.callback(_default.pop)
        try:
            with ordinary(model) if isinstance(model, nn.Module) else nullcontext():
                yield
        except BaseException:
            with uninterrupted():
                for each in undo:
                    each()
            raise


def users_device() -> AbstractContextManager[object]:
    """The default device that the user has set, for forwards that create tensors; meta ones would have no values."""
    return _default[-1] if _default else nullcontext()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end of this; pressed twice, it does not wait.

    torch.export patches torch itself, and is not made for interrupts: what they leave behind breaks later traces.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # interrupts are raised in the main thread only
        return
    handler, waiting = before, list[tuple[int, FrameType | None]]()

    def wait(number: int, frame: FrameType | None) -> None:
        if waiting:
            handler(number, frame)
        waiting.append((number, frame))

    try:
        signal.signal(signal.SIGINT, wait)
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            handler(*waiting[0])


def _flags() -> Callable[[], None]:
    """A function that puts back what forwards, traces and comparisons change in the process."""
    fast_path, precision = torch.backends.mha.get_fastpath_enabled(), torch.get_float32_matmul_precision()
    filters, entries, numbers = warnings.filters, list(warnings.filters), torch.get_rng_state()
    gradients, modes = torch.is_grad_enabled(), len(_get_current_function_mode_stack())

    def put_back() -> None:
        while len(_get_current_function_mode_stack()) > modes:
            _pop_mode()
        torch.set_grad_enabled(gradients)
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.set_float32_matmul_precision(precision)
        torch.set_rng_state(numbers)
        if warnings.filters is not filters or list(filters) != entries:
            filters[:] = entries  # type: ignore[index]
            warnings.filters = filters
            warnings.simplefilter("default", append=True)  # tells Python that the filters have changed
            filters[:] = entries  # type: ignore[index]

    return put_back
