"""How many channels every group keeps under a budget: the cheapest errors first."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lnr_prune.graph import ChannelGroup, Graph, named_tensors

LEVELS = 64  # sizes of a group that are considered

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

    Raises:
        ValueError: If no limit is given, or a value is out of range.
    """

    params: float | None = None
    macs: float | None = None
    size: float | None = None
    latency: float | None = None
    error: float | None = None
    round_to: int = 1
    minimum: int = 1
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "leave", (self.leave,) if isinstance(self.leave, str) else tuple(self.leave))
        limits = {name: getattr(self, name) for name in ("params", "macs", "size", "latency", "error")}
        given = {name: value for name, value in limits.items() if value is not None}
        if not given:
            raise ValueError(f"a budget needs a limit: one or more of {', '.join(limits)}")
        for name, value in given.items():
            if not (0 < value <= 1):
                raise ValueError(f"budget {name} must be a fraction in (0, 1], got {value}")
        for name in ("round_to", "minimum"):
            if getattr(self, name) < 1:
                raise ValueError(f"budget {name} must be at least 1, got {getattr(self, name)}")


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


def cost_of(model: nn.Module, graph: Graph, kind: str, samples: int = 1) -> Cost:
    """The cost model of "params", "macs" or "size" (bytes).

    Args:
        model: The model.
        graph: Its channel groups.
        kind: What is counted.
        samples: Samples in the call that was traced; only "macs" depends on it.
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
    terms = []
    for name, cost in full.items():
        dims = []
        for dim, size in enumerate(tensors[name].shape):
            shares = {g.name: _indices(g, name, dim) / g.size / size for g in graph.groups if (name, dim) in g.slots}
            if shares:
                stays = 1 - sum(shares[g.name] * g.size for g in graph.groups if g.name in shares)
                dims.append((stays, shares))
        terms.append((float(cost), tuple(dims)))
    return Cost(tuple(terms))


def _indices(group: ChannelGroup, name: str, dim: int) -> int:
    return int((group.slots[name, dim] >= 0).sum())


@dataclass(frozen=True, eq=False)
class Allocation:
    """Sizes of the groups, and what is predicted of them.

    Attributes:
        sizes: Name of a group -> channels kept.
        error: Sum of the groups' errors on the curves.
    """

    sizes: Sizes
    error: float


def descend(curves: Mapping[str, Tensor], cost: Cost, levels: Mapping[str, tuple[int, ...]]) -> Iterator[Allocation]:
    """Allocations of falling cost, each the least increase of error for the cost saved: a Lagrangian's path.

    Args:
        curves: Group -> error when it keeps 0, 1, ... n channels, (n + 1,).
        cost: The cost model.
        levels: Group -> sizes that it may take, ascending, the last one its size now.
    """
    sizes = {name: of_group[-1] for name, of_group in levels.items()}
    error = sum(float(curves[name][size]) for name, size in sizes.items())
    near, steps, stale = cost.neighbours, {}, set(sizes)
    yield Allocation(dict(sizes), error)
    while True:
        for name in stale & sizes.keys():
            steps[name] = _best_step(name, sizes, curves[name], cost.of(name), levels[name])
        name = min(steps, key=lambda each: steps[each][0])
        slope, size = steps[name]
        if math.isinf(slope):
            return
        error += float(curves[name][size] - curves[name][sizes[name]])
        sizes[name], stale = size, near[name]
        yield Allocation(dict(sizes), error)


def _best_step(name: str, sizes: Sizes, curve: Tensor, cost: Cost, levels: tuple[int, ...]) -> tuple[float, int]:
    """Least error per cost saved, and the size that it leads to."""
    now, size = cost(sizes), sizes[name]
    best = (math.inf, size)
    for level in levels:
        if level < size and (saved := now - cost({**sizes, name: level})) > 0:
            best = min(best, (max(0.0, float(curve[level] - curve[size])) / saved, level))
    return best
