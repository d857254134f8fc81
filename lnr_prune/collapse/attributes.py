"""Ints that a submodule holds: which of them a plan changes, and how they are read and written.

An attribute is named by a dotted path from its submodule: ``num_heads``, ``sizes.1`` (an entry of a tuple or
list), ``config.num_heads`` (of a settings object that the submodule holds).
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice
from typing import Any

from torch import Tensor, nn

from lnr_prune.graph.groups import ChannelGroup
from lnr_prune.graph.sizes import HeldInt

Role = tuple[str, type[nn.Module], str]
"""A line of code, a class of submodules, and its attribute that may be an int in that line."""
LONGEST = 64  # tuples and lists with more entries are data, not settings
ATTEMPTS = 40
"""So many choices of attributes are tried for groups whose ints are in the same lines; most fail early."""


def ints(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Every int that a submodule holds, with the attribute's path, also in tuples, lists and settings objects."""
    for name, value in vars(module).items():
        yield from _ints(name, value, depth=2)


def _ints(path: str, value: Any, depth: int) -> Iterator[tuple[str, int]]:
    if type(value) is int:
        yield path, value
    elif depth and isinstance(value, tuple | list) and len(value) <= LONGEST:
        for index, entry in enumerate(value):
            yield from _ints(f"{path}.{index}", entry, depth - 1)
    elif depth and _is_settings(value):
        for name, entry in vars(value).items():
            yield from _ints(f"{path}.{name}", entry, depth - 1)


def _is_settings(value: Any) -> bool:
    """Whether a value holds attributes, and can be replaced by a copy of itself."""
    if not hasattr(value, "__dict__") or isinstance(value, nn.Module | Tensor | type) or callable(value):
        return False
    try:
        return copy.copy(value) is not value  # an Enum, for one, has no copies
    except Exception:  # a copy may fail in any way
        return False


def assign(module: nn.Module, path: str, value: int) -> None:
    """Sets an int that a submodule holds. Its tuple or object is replaced by a changed copy, as others may share it."""
    name, *rest = path.split(".")
    vars(module)[name] = _changed(vars(module)[name], rest, value)


def _changed(holder: Any, path: Sequence[str], value: int) -> Any:
    if not path:
        return value
    name, *rest = path
    if isinstance(holder, tuple | list):
        entries = list(holder)
        entries[int(name)] = _changed(entries[int(name)], rest, value)
        return type(holder)(*entries) if hasattr(holder, "_fields") else type(holder)(entries)
    changed = copy.copy(holder)
    object.__setattr__(changed, name, _changed(vars(holder)[name], rest, value))  # frozen dataclasses too
    return changed


def choices(model: nn.Module, group: ChannelGroup) -> Iterator[frozenset[Role]]:
    """Sets of attributes that may count a group's channels, in the order to try them; at most ``ATTEMPTS``.

    First none; then all attributes of the submodules whose forwards have the ints (the inner ones); all inner ones
    except one, which may be equal by coincidence; one inner one; all, including those of the enclosing submodules; one
    of all; two inner ones.
    """
    distance = {role: distance for role, _, _, distance in reversed(list(_holders(model, group)))}
    every = sorted(distance, key=distance.__getitem__)
    inner = [role for role in every if distance[role] == 0]
    sizes = (
        (inner, 0),
        (inner, len(inner)),
        (inner, len(inner) - 1),
        (inner, 1),
        (every, len(every)),
        (every, 1),
        (inner, 2),
    )
    sets = (frozenset(some) for roles, size in sizes if size >= 0 for some in combinations(roles, size))
    yield from islice(dict.fromkeys(sets), ATTEMPTS)


def with_attributes(model: nn.Module, group: ChannelGroup, chosen: frozenset[Role]) -> ChannelGroup:
    """The group, with these attributes added to what changes when its channels leave."""
    attributes: dict[tuple[str, str], tuple[int, Tensor]] = {}
    for role, name, held, _ in _holders(model, group):
        if role in chosen:
            attributes.setdefault((name, role[2]), (held.value, held.per_channel))
    return replace(group, attributes=attributes)


def _holders(model: nn.Module, group: ChannelGroup) -> Iterator[tuple[Role, str, HeldInt, int]]:
    """Attributes equal to one of the group's ints, from its own submodule outwards; the last entry is how far out."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for held in group.held:
        parts = held.module.split(".") if held.module else []
        for distance in range(len(parts) + 1):
            name = ".".join(parts[: len(parts) - distance])
            for path, value in ints(modules[name]) if name in modules else ():
                if value == held.value:
                    yield (held.line, type(modules[name]), path), name, held, distance
