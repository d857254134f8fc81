"""Functions that fail when a test says so."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def failing(at: int, error: BaseException, real: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but its n-th call fails."""
    calls = []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise error
        return real(*args, **kwargs)

    return function


def owner_of(path: str) -> tuple[Any, str]:
    """The module or class, and the name in it."""
    owner, name = path.rsplit(".", 1)
    try:
        return import_module(owner), name
    except ImportError:
        return getattr(*owner_of(owner)), name
