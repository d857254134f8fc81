"""How many channels every group keeps under a budget: the cheapest errors first."""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor

from lnr_prune.graph.groups import ChannelGroup
from lnr_prune.selection.budget import Budget, Grid
from lnr_prune.selection.costs.cost_model import Cost, Group, Sizes

RESOLUTION = 32  # neighbouring sizes of a group that are considered differ by a 32nd, or by one channel


@dataclass(frozen=True, eq=False)
class Allocation(Generic[Group]):
    """Sizes of the groups, and what is predicted of them.

    Attributes:
        sizes: Group -> channels kept.
        errors: Group -> its error at that size.
    """

    sizes: Sizes[Group]
    errors: Mapping[Group, float]

    @property
    def error(self) -> float:
        """The sum of the groups' errors."""
        return sum(self.errors.values())


def check_reach(costs: Mapping[str, Cost[ChannelGroup]], groups: Iterable[ChannelGroup], budget: Budget) -> None:
    """Refuses a budget that no sizes of the groups can meet, before anything is measured.

    Raises:
        ValueError: The message says what the smallest model costs.
    """
    whole = {group: group.size for group in groups}
    if not whole:
        raise ValueError("leave names every channel group: nothing is left to prune; take one out")
    smallest = smallest_sizes(whole, budget.grid)
    limits = {kind: getattr(budget, kind) * cost(whole) for kind, cost in costs.items() if getattr(budget, kind)}
    if any(costs[kind](smallest) > limit for kind, limit in limits.items()):
        raise _out_of_reach(costs, limits, smallest, whole)


def smallest_sizes(whole: Sizes[Group], grid: Grid) -> dict[Group, int]:
    """The least that every group may keep."""
    return {group: _levels(group, size, grid)[0] for group, size in whole.items()}


def _out_of_reach(
    costs: Mapping[str, Cost[Group]], limits: Mapping[str, float], smallest: Sizes[Group], whole: Sizes[Group]
) -> ValueError:
    of_whole = {kind: costs[kind](whole) for kind in limits}
    least = ", ".join(
        f"{kind} {costs[kind](smallest) / of_whole[kind]:.1%} of the original's, asked for {limit / of_whole[kind]:.3g}"
        for kind, limit in limits.items()
    )
    return ValueError(
        f"the budget is out of reach: the smallest model that it allows has {least}. Raise the limit, "
        "or lower minimum and round_to, or shorten leave"
    )


def allocate(
    curves: Mapping[Group, Tensor],
    costs: Mapping[str, Cost[Group]],
    budget: Budget,
    latency: Callable[[Sizes[Group]], float] | None = None,
) -> Allocation[Group]:
    """``argmin_sizes sum_g curves_g[sizes_g]`` within the budget, nearly: along a Lagrangian's path.

    Args:
        curves: Group -> error when it keeps 0, 1, ... n channels, (n + 1,).
        costs: Cost model of "params", "macs" and "size".
        budget: The limits.
        latency: Sizes -> measured fraction of the original's latency, for a latency budget.

    Raises:
        ValueError: If even the smallest sizes are over the budget; the message says by how much.
    """
    if budget.uniform:
        return _uniform(curves, costs, replace(budget, uniform=False), latency)
    levels = {group: _levels(group, len(curve) - 1, budget.grid) for group, curve in curves.items()}
    whole = {group: of_group[-1] for group, of_group in levels.items()}
    limits = {kind: getattr(budget, kind) * cost(whole) for kind, cost in costs.items() if getattr(budget, kind)}
    primary = next((kind for kind in ("macs", "params", "size") if kind in limits), "macs")
    path = list(descend(curves, costs[primary], levels))

    def fits(sizes: Sizes[Group]) -> bool:
        return all(costs[kind](sizes) <= limit for kind, limit in limits.items())

    if budget.error is not None:
        path = [point for point in path if point.error <= budget.error]
    first = next((index for index, point in enumerate(path) if fits(point.sizes)), None)
    if first is None:
        raise _out_of_reach(costs, limits, path[-1].sizes, whole)
    if budget.error is not None:
        first = len(path) - 1
    if budget.latency is not None and latency is not None:
        first = _first_below(path, first, budget.latency, latency)
        return path[first]
    return path[first] if budget.error is not None else _filled(path[first], curves, levels, fits)


def _uniform(
    curves: Mapping[Group, Tensor],
    costs: Mapping[str, Cost[Group]],
    budget: Budget,
    latency: Callable[[Sizes[Group]], float] | None,
) -> Allocation[Group]:
    """The same, with one size for all groups of a kind: the first one stands for all of them."""
    first = dict[Hashable, Group]()
    stand = {g: first.setdefault(g.kind if isinstance(g, ChannelGroup) else g, g) for g in curves}
    together = {g: torch.stack([curves[each] for each in curves if stand[each] is g]).sum(0) for g in first.values()}

    def spread(sizes: Sizes[Group]) -> dict[Group, int]:
        return {group: sizes[stand[group]] for group in curves}

    def merged(shares: Mapping[Group, float]) -> dict[Group, float]:
        of_first = dict[Group, float]()
        for group, share in shares.items():
            of_first[stand[group]] = of_first.get(stand[group], 0.0) + share
        return of_first

    merged_costs = {
        kind: Cost(tuple((c, tuple((stays, merged(shares)) for stays, shares in dims)) for c, dims in cost.terms))
        for kind, cost in costs.items()
    }
    found = allocate(together, merged_costs, budget, latency and (lambda sizes: latency(spread(sizes))))
    return _allocation(curves, spread(found.sizes))


def _levels(group: Hashable, size: int, grid: Grid) -> tuple[int, ...]:
    """Sizes that a group of this size may take, ascending."""
    step = math.lcm(grid.round_to, group.multiple if isinstance(group, ChannelGroup) else 1)
    levels, level = list[int](), _up(min(grid.minimum, size), step)
    while level < size:
        levels.append(level)
        level += _up(max(1, level // RESOLUTION), step)
    return (*levels, size)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _first_below(
    path: Sequence[Allocation[Group]], first: int, limit: float, latency: Callable[[Sizes[Group]], float]
) -> int:
    """Index of the first allocation on the path, from ``first`` on, whose latency is within the limit, by bisection."""
    low, high = first, len(path) - 1
    fastest = latency(path[high].sizes)
    if fastest > limit:
        raise ValueError(
            f"the budget is out of reach: the smallest model that it allows takes {fastest:.1%} of the original's time"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if latency(path[middle].sizes) <= limit else (middle + 1, high)
    return low


def _filled(
    point: Allocation[Group],
    curves: Mapping[Group, Tensor],
    levels: Mapping[Group, tuple[int, ...]],
    fits: Callable[[Sizes[Group]], bool],
) -> Allocation[Group]:
    """Gives what the last step left of the budget back to the groups that gain most from it."""
    sizes = dict(point.sizes)
    while True:
        gains = {}
        for group, of_group in levels.items():
            for level in of_group:
                if level > sizes[group] and fits({**sizes, group: level}):
                    gains[group, level] = float(curves[group][sizes[group]] - curves[group][level])
        best = max(gains, key=lambda each: gains[each], default=None)
        if best is None or gains[best] <= 0:
            break
        sizes[best[0]] = best[1]
    return _allocation(curves, sizes)


def _allocation(curves: Mapping[Group, Tensor], sizes: Sizes[Group]) -> Allocation[Group]:
    return Allocation(dict(sizes), {group: float(curves[group][size]) for group, size in sizes.items()})


def descend(
    curves: Mapping[Group, Tensor], cost: Cost[Group], levels: Mapping[Group, tuple[int, ...]]
) -> Iterator[Allocation[Group]]:
    """Allocations of falling cost; each step adds the least error per cost saved: a Lagrangian's path.

    Args:
        curves: Group -> error when it keeps 0, 1, ... n channels, (n + 1,).
        cost: The cost model.
        levels: Group -> sizes that it may take, ascending; the last one is its current size.
    """
    sizes = {group: of_group[-1] for group, of_group in levels.items()}
    near, steps, stale = cost.neighbours, dict[Group, tuple[float, int]](), set(sizes)
    yield _allocation(curves, sizes)
    while True:
        for group in [group for group in sizes if group in stale]:  # in order, which breaks ties
            steps[group] = _best_step(group, sizes, curves[group], cost.of(group), levels[group])
        best = min(steps, key=lambda each: steps[each][0])
        slope, size = steps[best]
        if math.isinf(slope):
            return
        sizes[best], stale = size, near[best]
        yield _allocation(curves, sizes)


def _best_step(
    group: Group, sizes: Sizes[Group], curve: Tensor, cost: Cost[Group], levels: tuple[int, ...]
) -> tuple[float, int]:
    """The least error per cost saved, and the size that has it."""
    size, errors = sizes[group], curve.tolist()
    smaller = [level for level in reversed(levels) if level < size]  # among equally good steps, the smallest
    now, *costs = cost.along(group, [size, *smaller], sizes)
    least, best = math.inf, size
    for level, left in zip(smaller, costs, strict=True):
        if now > left:
            slope = max(0.0, errors[level] - errors[size]) / (now - left)
            if slope < (1 - 1e-9) * least:
                least, best = slope, level
    return least, best
