"""A function that calls back, turned into a generator: it waits, as it stands, until it is answered."""

from collections.abc import Callable, Generator
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")

_DONE, _STOP = object(), object()


def suspended(function: Callable[[Callable[[Question], Answer]], None]) -> Generator[Question, Answer, None]:
    """Runs ``function(ask)``; yields every question that it asks, and ``ask`` returns what is sent back.

    The function runs in a thread of its own, but never at the same time as its caller. An exception in it is
    raised here; when the generator is closed, the function ends with GeneratorExit where it waits.

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

    def ask(question: Question) -> Answer:
        questions.put(question)
        answer: Answer = answers.get()
        if answer is _STOP:
            raise GeneratorExit
        return answer

    def target() -> None:
        try:
            function(ask)
            end: Any = _DONE
        except BaseException as error:  # handed over, whatever it is
            end = _Raised(error)
        questions.put(end)

    thread = Thread(target=target, daemon=True)
    thread.start()
    try:
        while (question := questions.get()) is not _DONE:
            if isinstance(question, _Raised):
                raise question.error
            answers.put((yield question))
    finally:
        answers.put(_STOP)
        thread.join()


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error
