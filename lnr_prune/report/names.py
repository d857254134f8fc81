"""Many names in few words: ``layers.{0..29}.mlp`` are thirty layers, and tables never cut a name."""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Protocol, TypeVar

from rich.table import Table
from rich.text import Text

LEAST = 3  # rows of repeated blocks that become one


class Group(Protocol):
    """What a row of a table is about."""

    @property
    def producers(self) -> tuple[str, ...]:
        """Layers that make the channels."""
        ...

    @property
    def consumers(self) -> tuple[str, ...]:
        """Layers that read them."""
        ...

    @property
    def size(self) -> int:
        """Number of channels."""
        ...


Row = TypeVar("Row", bound=Group)


def joined(names: Iterable[str]) -> str:
    """The names, separated by commas; those that differ in the numbers of blocks only are written as one."""
    return ", ".join(in_parts(names))


def in_parts(names: Iterable[str]) -> list[str]:
    """The names; those that differ in the numbers of blocks only are written as one."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        kinds[_kind(name)].append(name)
    return [part for alike in kinds.values() for part in _as_one(alike)]


def repeated(groups: Sequence[Row]) -> list[list[Row]]:
    """Groups of repeated blocks together, all others by themselves, in order of the first ones."""
    kinds: dict[Hashable, list[Row]] = defaultdict(list)
    for group in groups:
        kinds[tuple(map(_kind, group.producers)), tuple(map(_kind, group.consumers)), group.size].append(group)
    parts = ([alike] if _folds(alike) else [[group] for group in alike] for alike in kinds.values())
    return [part for several in parts for part in several]


def span(values: Iterable[float | None], form: Callable[[float], str]) -> str:
    """The smallest and the largest value, "-" if none is known."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    ends = dict.fromkeys((form(min(known)), form(max(known))))
    return " .. ".join(ends)


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> the layers that it holds for, as `in_parts` writes them."""
    layers: dict[str, list[str]] = defaultdict(list)
    for layer, reason in reasons.items():
        layers[reason].append(layer)
    return {reason: in_parts(names) for reason, names in layers.items()}


def whole_names(table: Table, *columns: str) -> None:
    """Adds columns whose text is wrapped where it does not fit, and never cut."""
    for column in columns:
        table.add_column(column, overflow="fold", min_width=6)


def add(table: Table, *cells: str) -> None:
    """Adds a row of plain text: a model's names may look like markup."""
    table.add_row(*map(Text, cells))


def _folds(groups: Sequence[Group]) -> bool:
    return len(groups) >= LEAST and "{}" in "".join(map(_kind, groups[0].producers))


def _kind(name: str) -> str:
    """The name with {} for the numbers of blocks: those that something follows."""
    *blocks, last = name.split(".")
    return ".".join(["{}" if part.isdecimal() else part for part in blocks] + [last])


def _as_one(names: Sequence[str]) -> list[str]:
    """The names as one, if it stands for exactly these."""
    places = zip(*(name.split(".") for name in names), strict=True)
    parts = [dict.fromkeys(values) for values in places]
    if len(names) == 1 or math.prod(map(len, parts)) != len(names):
        return list(names)
    return [".".join(next(iter(part)) if len(part) == 1 else f"{{{_runs(part)}}}" for part in parts)]


def _runs(numbers: Iterable[str]) -> str:
    """0, 1, 2, 5 -> 0..2,5."""
    ordered = sorted(map(int, numbers))
    runs = [[n for _, n in run] for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
