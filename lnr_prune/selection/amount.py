"""How much of every group is kept: `Keep` and `Penalty`. The others, `Budget` and `Tolerance`, need measurements."""

import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from lnr_prune.graph.groups import ChannelGroup, Graph
from lnr_prune.runtime.checks import nearest
from lnr_prune.selection.selectors import Candidates, Lasso, Selection, Selector, at_lam

Choice = Callable[[Candidates], Selection]
"""Chooses the channels of one group."""
Value = float | Mapping[str, float]


@dataclass(frozen=True)
class Keep:
    """Keeps a number or a share of the channels of every group.

    Attributes:
        channels: A count (int) or a fraction in (0, 1] (float) for every group; or a mapping from producers' names to
            counts or fractions for their groups, which leaves all other groups whole.

    Raises:
        ValueError, TypeError: If a value is out of range or not a number.

    Example:
        >>> half, some = Keep(0.5), Keep({"conv1": 8, "fc1": 0.2})
    """

    channels: Value

    def __post_init__(self) -> None:
        for value in _values("keep", self.channels):
            keep_count(value, 1)

    def choices(self, graph: Graph, selector: Selector) -> dict[ChannelGroup, Choice]:
        """How the channels of every group that may lose some are chosen.

        Raises:
            ValueError: If a name is not that of a prunable producer.
        """
        wanted = per_group(graph, self.channels, "keep")
        return at_sizes({group: keep_count(value, group.size) for group, value in wanted.items()}, selector)


@dataclass(frozen=True)
class Penalty:
    """Keeps as many channels as the group lasso does at a penalty; give either ``lam`` or ``ratio``.

    Attributes:
        lam: The penalty, >= 0; or a mapping from producers' names, which leaves all others whole.
        ratio: Instead, the penalty as a fraction of each group's lambda_max, at which nothing is kept; or a mapping.

    Raises:
        ValueError, TypeError: If not exactly one is given, or a value is out of range or not a number.

    Example:
        >>> Penalty(ratio=0.05)
        Penalty(lam=None, ratio=0.05)
    """

    lam: Value | None = None
    ratio: Value | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in (("lam", self.lam), ("ratio", self.ratio)) if value is not None}
        if len(given) != 1:
            got = " and ".join(given) or "neither"
            raise ValueError(f"a penalty is given by one of lam and ratio, got {got}; such as Penalty(ratio=0.05)")
        for name, of in given.items():
            for value in _values(f"the penalty's {name}", of):
                if not (math.isfinite(value) and value >= 0):
                    raise ValueError(f"the penalty's {name} must be finite and >= 0, got {value}")

    def choices(self, graph: Graph, selector: Selector) -> dict[ChannelGroup, Choice]:
        """How the channels of every group that may lose some are chosen.

        Raises:
            ValueError: If a name is not that of a prunable producer, or the selector is not the lasso.
        """
        solver = lasso_of(selector).solver
        if self.lam is not None:
            penalties = per_group(graph, self.lam, "lam")
            return {group: partial(at_lam, lam=lam, solver=solver) for group, lam in penalties.items()}

        def at_ratio(candidates: Candidates, ratio: float) -> Selection:
            return at_lam(candidates, ratio * candidates.problem.lambda_max(), solver)

        ratios = per_group(graph, 0.0 if self.ratio is None else self.ratio, "ratio")
        return {group: partial(at_ratio, ratio=ratio) for group, ratio in ratios.items()}


def lasso_of(selector: Selector) -> Lasso:
    """The selector, if it is the group lasso.

    Raises:
        ValueError: If it is another one.
    """
    if not isinstance(selector, Lasso):
        raise ValueError(f"a penalty needs the group lasso as selector; with {selector!r}, give Keep or Budget")
    return selector


def at_sizes(sizes: Mapping[ChannelGroup, int], selector: Selector) -> dict[ChannelGroup, Choice]:
    """How the selector chooses the channels of every group, for these sizes."""
    return {group: partial(selector.choose, count=size) for group, size in sizes.items()}


def per_group(graph: Graph, value: Value, kind: str) -> dict[ChannelGroup, float]:
    """The value of every group, or of those whose producers are named; ``kind`` is what an error calls it."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(graph.groups, value)
    named = {group: number for name, number in value.items() for group in groups_named(graph, name, kind)}
    return {group: named[group] for group in graph.groups if group in named}


def groups_named(graph: Graph, producer: str, kind: str) -> list[ChannelGroup]:
    """The groups that a layer produces: one, unless its channels go different ways.

    Raises:
        ValueError: If there is none; the message says why, and what the argument ``kind`` may name.
    """
    found = [group for group in graph.groups if producer in (group.name, *group.producers)]
    if not found:
        why = f" ({graph.frozen[producer]})" if producer in graph.frozen else ""
        prunable = dict.fromkeys(name for group in graph.groups for name in group.producers)
        raise ValueError(
            f"{kind} names {producer!r}, which is not a prunable producer{why}; {nearest(producer, prunable)}"
        )
    return found


def keep_count(keep: float, size: int) -> int:
    """Number of channels that a count (int) or a fraction (float) keeps of ``size``; at least one.

    Raises:
        ValueError: If keep is an int below 1 or a float outside (0, 1].
    """
    if isinstance(keep, numbers.Integral):
        if keep < 1:
            raise ValueError(f"keep must leave at least one channel, got keep={keep}")
        return min(int(keep), size)
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a count (int >= 1) or a fraction in (0, 1], got {keep}")
    return max(1, round(keep * size))


def _values(name: str, value: Value) -> Iterator[float]:
    """The numbers in a value; anything else is refused, with the argument's name."""
    for number in value.values() if isinstance(value, Mapping) else (value,):
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            raise TypeError(f"{name} must be a number or a mapping of numbers, got {number!r}")
        yield float(number) if not isinstance(number, numbers.Integral) else int(number)
