"""Whether a copy of a model is one: whether it still reaches a part of the original."""

import functools
from collections.abc import Mapping
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn


def reaches(target: nn.Module, original: nn.Module) -> bool:
    """Whether a copy still reaches a part of the original, for example through a function's closure."""
    parts = {id(part) for part in (*original.modules(), *original.parameters(), *original.buffers())}
    seen: set[int] = set()
    waiting: list[Any] = list(target.modules())
    while waiting:
        value = waiting.pop()
        if id(value) in parts:
            return True
        if id(value) not in seen:
            seen.add(id(value))
            waiting += _held(value)
    return False


def _held(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, type | Tensor | ModuleType):
        return []
    own = list(vars(value).values()) if hasattr(value, "__dict__") else []
    if isinstance(value, MethodType):
        own.append(value.__self__)
    elif isinstance(value, functools.partial):
        own += [value.func, value.args, value.keywords]
    elif isinstance(value, FunctionType):
        cells = (cell.cell_contents for cell in value.__closure__ or () if cell != CellType())
        own += [*cells, value.__defaults__, value.__kwdefaults__]
    return own
