"""How much of every group is kept: the keep, lam and lam_ratio arguments."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from lnr_prune.allocation import Budget
from lnr_prune.graph import Graph
from lnr_prune.selection import SELECTORS, Candidates, Selection, at_lam

Choice = Callable[[Candidates], Selection]
Amount = float | Mapping[str, float] | None


def choose_channels(
    graph: Graph, *, keep: Amount = None, lam: Amount = None, lam_ratio: Amount = None, selector: str
) -> dict[str, Choice]:
    """Name of a group -> how its channels are chosen; arguments as for `lnr_prune.prune`.

    Raises:
        ValueError, TypeError: If not exactly one amount is given, or one is out of range or names no
            prunable producer.
    """
    kind, wanted = the_one_given(keep=keep, lam=lam, lam_ratio=lam_ratio)
    if isinstance(wanted, Mapping):
        values = {name: value for layer, value in wanted.items() for name in groups_of(graph, layer, kind)}
    else:
        values = {group.name: wanted for group in graph.groups}
    sizes = {group.name: group.size for group in graph.groups}
    return {name: _choice(kind, value, sizes[name], selector) for name, value in values.items()}


def check_amounts(*, budget: Budget | None = None, selector: str = "group_lasso", **amounts: Amount) -> None:
    """Refuses what is wrong with keep, lam, lam_ratio or budget for any model, before there is a graph.

    Raises:
        ValueError, TypeError: As `choose_channels`.
    """
    if not isinstance(selector, str) or selector not in SELECTORS:
        raise ValueError(f"unknown selector {selector!r}; known selectors: {', '.join(SELECTORS)}")
    kind, wanted = the_one_given(**amounts, budget=budget)
    if kind == "budget":
        if not isinstance(wanted, Budget):
            raise TypeError(f"budget must be a Budget, such as Budget(macs=0.5), got {wanted!r}")
        return
    if kind != "keep" and selector != "group_lasso":
        raise ValueError(f"{kind} is a penalty of the group lasso; the selector {selector!r} takes keep=")
    for value in wanted.values() if isinstance(wanted, Mapping) else (wanted,):
        _choice(kind, value, 1, selector)


def the_one_given(**amounts: Any) -> tuple[str, Any]:
    """Name and value of the one amount that is not None.

    Raises:
        ValueError: If there is none, or more than one.
    """
    given = [(name, value) for name, value in amounts.items() if value is not None]
    if len(given) != 1:
        names = ", ".join(name for name, _ in given)
        raise ValueError(f"give exactly one of {', '.join(amounts)}, got {names or 'none'}")
    return given[0]


def groups_of(graph: Graph, producer: str, kind: str) -> list[str]:
    """Names of the groups that a layer produces: one, unless its channels go different ways.

    Raises:
        ValueError: If there is none; the message says why, and what the argument ``kind`` may name.
    """
    found = [group.name for group in graph.groups if producer in (group.name, *group.producers)]
    if not found:
        why = f" ({graph.frozen[producer]})" if producer in graph.frozen else ""
        prunable = dict.fromkeys(name for group in graph.groups for name in group.producers)
        raise ValueError(
            f"{kind} names {producer!r}, which is no prunable producer{why}; prunable: {', '.join(prunable) or 'none'}"
        )
    return found


def _choice(kind: str, value: float, size: int, selector: str) -> Choice:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{kind} must be a number or a mapping of numbers, got {value!r}")
    if kind == "keep":
        count = keep_count(value, size)
        return lambda candidates: SELECTORS[selector](candidates, count)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{kind} must be finite and >= 0, got {value}")
    if kind == "lam":
        return lambda candidates: at_lam(candidates, value)
    return lambda candidates: at_lam(candidates, value * candidates.problem.lambda_max())


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
