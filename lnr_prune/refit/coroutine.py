"""A function that calls back, turned into a generator: it waits in the middle of its work until it gets an answer."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import torch

from lnr_prune.runtime import noise

Question = TypeVar("Question")
Answer = TypeVar("Answer")
_DONE, _STOP = object(), object()


def suspended(function: Callable[[Callable[[Question], Answer]], None]) -> Generator[Question, Answer, None]:
    """Runs ``function(ask)``; yields every question that it asks, and ``ask`` returns what is sent back.

    The function runs in its own thread, with its caller's autocast, but never at the same time as the caller. While it
    waits, torch's generators of random numbers are as the caller left them. An exception in the function is raised
    here. When the generator is closed, the function ends with GeneratorExit where it waits.

    Example:
        >>> answers = []
        >>> generator = suspended(lambda ask: answers.append(ask("who?")))
        >>> next(generator)
        'who?'
        >>> next(generator, "the end"), answers  # next() sends None
        ('the end', [None])
    """
    questions: SimpleQueue[Any] = SimpleQueue()
    answers: SimpleQueue[Any] = SimpleQueue()
    settings = _settings()

    outside = noise.states()

    def ask(question: Question) -> Answer:
        nonlocal outside
        mine = noise.states()
        noise.restore(outside)
        questions.put(question)
        answer: Answer = answers.get()
        outside = noise.states()
        noise.restore(mine)
        if answer is _STOP:
            raise GeneratorExit
        return answer

    def target() -> None:
        try:
            if not answers.empty():  # stopped before it has begun
                return
            with ExitStack() as stack:
                for setting in settings:
                    stack.enter_context(setting)
                function(ask)
            end: Any = _DONE
        except BaseException as error:  # handed over, whatever it is
            end = _Raised(error)
        noise.restore(outside)
        questions.put(end)

    thread = Thread(target=target, daemon=True)
    try:
        thread.start()
        while (question := questions.get()) is not _DONE:
            if isinstance(question, _Raised):
                raise question.error
            answers.put((yield question))
    finally:
        answers.put(_STOP)  # first: a thread that is not waited for, after an interrupt, ends all the same
        if thread.is_alive():
            thread.join()


def _settings() -> list[AbstractContextManager[Any]]:
    """What torch keeps for each thread: autocast; for the default device, see `users_device`."""
    accelerator = torch.accelerator.current_accelerator()
    return [
        torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=torch.is_autocast_cache_enabled())
        for device in ("cpu", *([accelerator.type] if accelerator else []))
        if torch.is_autocast_enabled(device)
    ]


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error
