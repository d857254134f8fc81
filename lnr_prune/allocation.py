"""How many channels every group keeps under a budget: the cheapest errors first."""

import math
import numbers
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lnr_prune.graph import ChannelGroup, Graph, named_tensors

RESOLUTION = 32  # neighbouring sizes of a group that are considered differ by a 32nd, or by one channel

Sizes = Mapping[str, int]
"""Name of a group -> channels kept."""


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost, as fractions of the original's; all that are given must hold.

    Attributes:
        params: Fraction of the parameters, in (0, 1].
        macs: Fraction of the multiply-accumulates, in (0, 1].
        size: Fraction of the bytes of parameters and buffers, in (0, 1].
        latency: Fraction of the time of a forward pass of the first calibration batch, measured on the
            model's device, in (0, 1].
        error: Instead of a cost: as small as possible while the predicted relative squared error of the
            outputs, ``E||f(x) - f'(x)||^2 / E||f(x) - E f(x)||^2``, stays below this.
        round_to: Groups keep a multiple of so many channels (8 suits most accelerators).
        minimum: Channels that every group keeps at least.
        leave: Producers whose channels all stay.
        samples: Calibration samples on which the outputs are measured, three times for every group. With few of
            them the sizes depend on which they are.
        refits: Groups, evenly along the depth, whose errors are measured again when all layers are refitted, to as many
            other samples: what this leaves of an error is what counts. The best is as many as there are groups; 0
            takes the errors as they are, as does ``debias=False``.
        search: Trials of a local search, which refits the whole network at other sizes within the budget and
            keeps them if the outputs suffer less; 0 = none. A trial costs as much as a refit to ``samples``.

    Raises:
        ValueError, TypeError: If no limit is given, or a value is out of range or no number.
    """

    params: float | None = None
    macs: float | None = None
    size: float | None = None
    latency: float | None = None
    error: float | None = None
    round_to: int = 1
    minimum: int = 1
    leave: tuple[str, ...] = ()
    samples: int = 256
    refits: int = 16
    search: int = 0

    def __post_init__(self) -> None:
        leave = (self.leave,) if isinstance(self.leave, str) or not isinstance(self.leave, Iterable) else self.leave
        object.__setattr__(self, "leave", tuple(leave))
        if wrong := [name for name in self.leave if not isinstance(name, str)]:
            raise TypeError(f"budget leave must be names of layers, got {wrong[0]!r}")
        limits = {name: getattr(self, name) for name in ("params", "macs", "size", "latency", "error")}
        given = {name: value for name, value in limits.items() if value is not None}
        if not given:
            raise ValueError(f"a budget needs a limit: one or more of {', '.join(limits)}")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"budget {name} must be a number, a fraction in (0, 1], got {value!r}")
            if not (0 < float(value) <= 1):
                raise ValueError(f"budget {name} must be a fraction in (0, 1], got {value}")
        for name, least in (("round_to", 1), ("minimum", 1), ("samples", 1), ("refits", 0), ("search", 0)):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, numbers.Integral):
                raise TypeError(f"budget {name} must be an int, got {number!r}")
            if number < least:
                raise ValueError(f"budget {name} must be at least {least}, got {number}")


@dataclass(frozen=True, eq=False)
class Cost:
    """``sum_w c_w prod_dims (kept indices / all indices)``: what a model costs at any sizes of its groups.

    Attributes:
        terms: For each parameter its cost c_w at full size, and for each of its dimensions that shrinks the share
            of indices that always stay, and per group the share that one of its channels owns.
    """

    terms: tuple[tuple[float, tuple[tuple[float, Mapping[str, float]], ...]], ...]

    def __call__(self, sizes: Sizes) -> float:
        """The cost when the groups keep so many channels."""
        return sum(
            cost
            * math.prod(stays + sum(share * sizes[name] for name, share in shares.items()) for stays, shares in dims)
            for cost, dims in self.terms
        )

    def of(self, name: str) -> "Cost":
        """The terms that a group takes part in."""
        return Cost(tuple(term for term in self.terms if any(name in shares for _, shares in term[1])))

    @property
    def neighbours(self) -> Mapping[str, set[str]]:
        """Group -> the groups whose cost changes with its size."""
        near: dict[str, set[str]] = {}
        for _, dims in self.terms:
            together = {name for _, shares in dims for name in shares}
            for name in together:
                near.setdefault(name, set()).update(together)
        return near


def cost_of(model: nn.Module, graph: Graph, kind: str, samples: int = 1, groups: Container[str] | None = None) -> Cost:
    """The cost model of "params", "macs" or "size" (bytes).

    Args:
        model: The model.
        graph: Its channel groups.
        kind: What is counted.
        samples: Samples in the call that was traced; only "macs" depends on it.
        groups: Names of the groups whose size may change; default: all.
    """
    tensors = named_tensors(model)
    unique = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    full: dict[str, float]
    if kind == "macs":
        full = {name: count / samples for name, count in graph.macs.items()}
    elif kind == "size":
        full = {name: tensor.numel() * tensor.element_size() for name, tensor in unique.items()}
    else:
        full = {name: parameter.numel() for name, parameter in model.named_parameters()}
    changing = [group for group in graph.groups if groups is None or group.name in groups]

    def shrinking(shares: Mapping[str, float]) -> tuple[float, Mapping[str, float]]:
        return 1 - sum(shares[group.name] * group.size for group in changing if group.name in shares), shares

    terms = []
    for name, cost in full.items():
        dims = []
        for dim, size in enumerate(tensors[name].shape):
            shares = {g.name: _indices(g, name, dim) / g.size / size for g in changing if (name, dim) in g.slots}
            if shares:
                dims.append(shrinking(shares))
        terms.append((float(cost), tuple(dims)))
    for count, of_all in graph.products if kind == "macs" else ():
        shares = {group.name: of_all[group.name] for group in changing if group.name in of_all}
        terms.append((count / samples, (shrinking(shares),)))
    return Cost(tuple(terms))


def _indices(group: ChannelGroup, name: str, dim: int) -> int:
    return int((group.slots[name, dim] >= 0).sum())


@dataclass(frozen=True, eq=False)
class Allocation:
    """Sizes of the groups, and what is predicted of them.

    Attributes:
        sizes: Name of a group -> channels kept.
        errors: Name of a group -> its error at that size.
    """

    sizes: Sizes
    errors: Mapping[str, float]

    @property
    def error(self) -> float:
        """The sum of the groups' errors."""
        return sum(self.errors.values())


def check_reach(costs: Mapping[str, Cost], groups: Iterable[ChannelGroup], budget: Budget) -> None:
    """Refuses a budget that no sizes of the groups keep, before anything is measured.

    Raises:
        ValueError: It says what the smallest model costs.
    """
    whole = {group.name: group.size for group in groups}
    if not whole:
        raise ValueError("budget.leave names every channel group: nothing is left to prune; take one out")
    smallest = {name: _levels(size, budget)[0] for name, size in whole.items()}
    limits = {kind: getattr(budget, kind) * cost(whole) for kind, cost in costs.items() if getattr(budget, kind)}
    if any(costs[kind](smallest) > limit for kind, limit in limits.items()):
        raise _out_of_reach(costs, limits, smallest, whole)


def _out_of_reach(costs: Mapping[str, Cost], limits: Mapping[str, float], smallest: Sizes, whole: Sizes) -> ValueError:
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
    curves: Mapping[str, Tensor],
    costs: Mapping[str, Cost],
    budget: Budget,
    latency: Callable[[Sizes], float] | None = None,
) -> Allocation:
    """``argmin_sizes sum_g curves_g[sizes_g]`` within the budget, nearly: down a Lagrangian's path.

    Args:
        curves: Group -> error when it keeps 0, 1, ... n channels, (n + 1,).
        costs: Cost model of "params", "macs" and "size".
        budget: The limits.
        latency: Sizes -> measured fraction of the original's latency, for a budget of that.

    Raises:
        ValueError: If even the smallest sizes are over the budget; the message says by how much.
    """
    levels = {name: _levels(len(curve) - 1, budget) for name, curve in curves.items()}
    whole = {name: of_group[-1] for name, of_group in levels.items()}
    limits = {kind: getattr(budget, kind) * cost(whole) for kind, cost in costs.items() if getattr(budget, kind)}
    primary = next((kind for kind in ("macs", "params", "size") if kind in limits), "macs")
    path = list(descend(curves, costs[primary], levels))

    def fits(sizes: Sizes) -> bool:
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


def _levels(size: int, budget: Budget) -> tuple[int, ...]:
    """Sizes that a group of this size may take, ascending."""
    levels, level = list[int](), _up(min(budget.minimum, size), budget.round_to)
    while level < size:
        levels.append(level)
        level += _up(max(1, level // RESOLUTION), budget.round_to)
    return (*levels, size)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _first_below(path: Sequence[Allocation], first: int, limit: float, latency: Callable[[Sizes], float]) -> int:
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
    point: Allocation,
    curves: Mapping[str, Tensor],
    levels: Mapping[str, tuple[int, ...]],
    fits: Callable[[Sizes], bool],
) -> Allocation:
    """What the last step left of the budget goes back to the groups that gain most from it."""
    sizes = dict(point.sizes)
    while True:
        gains = {}
        for name, of_group in levels.items():
            for level in of_group:
                if level > sizes[name] and fits({**sizes, name: level}):
                    gains[name, level] = float(curves[name][sizes[name]] - curves[name][level])
        best = max(gains, key=lambda each: gains[each], default=None)
        if best is None or gains[best] <= 0:
            break
        sizes[best[0]] = best[1]
    return _allocation(curves, sizes)


def _allocation(curves: Mapping[str, Tensor], sizes: Sizes) -> Allocation:
    return Allocation(dict(sizes), {name: float(curves[name][size]) for name, size in sizes.items()})


def descend(curves: Mapping[str, Tensor], cost: Cost, levels: Mapping[str, tuple[int, ...]]) -> Iterator[Allocation]:
    """Allocations of falling cost, each the least increase of error for the cost saved: a Lagrangian's path.

    Args:
        curves: Group -> error when it keeps 0, 1, ... n channels, (n + 1,).
        cost: The cost model.
        levels: Group -> sizes that it may take, ascending, the last one its size now.
    """
    sizes = {name: of_group[-1] for name, of_group in levels.items()}
    near, steps, stale = cost.neighbours, {}, set(sizes)
    yield _allocation(curves, sizes)
    while True:
        for name in stale & sizes.keys():
            steps[name] = _best_step(name, sizes, curves[name], cost.of(name), levels[name])
        name = min(steps, key=lambda each: steps[each][0])
        slope, size = steps[name]
        if math.isinf(slope):
            return
        sizes[name], stale = size, near[name]
        yield _allocation(curves, sizes)


def _best_step(name: str, sizes: Sizes, curve: Tensor, cost: Cost, levels: tuple[int, ...]) -> tuple[float, int]:
    """Least error per cost saved, and the size that it leads to."""
    now, size = cost(sizes), sizes[name]
    least, best = math.inf, size
    for level in reversed(levels):  # of equally good steps the smallest
        if level < size and (saved := now - cost({**sizes, name: level})) > 0:
            slope = max(0.0, float(curve[level] - curve[size])) / saved
            if slope < (1 - 1e-9) * least:
                least, best = slope, level
    return least, best
