"""What a model costs at any sizes of its groups."""

import math
from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from torch import nn

from lnr_prune.calibration.calls import Call, samples_in
from lnr_prune.graph.groups import ChannelGroup, Graph
from lnr_prune.graph.module import named_tensors
from lnr_prune.selection.costs.cost import counted

Group = TypeVar("Group", bound=Hashable)
"""Stands for a group: a `ChannelGroup`, or any name for one; the arithmetic is the same."""
Sizes = Mapping[Group, int]
"""Group -> channels kept."""


@dataclass(frozen=True, eq=False)
class Cost(Generic[Group]):
    """``sum_w c_w prod_dims (kept indices / all indices)``: what a model costs at any sizes of its groups.

    Attributes:
        terms: For each parameter, its cost c_w at full size, and its dimensions that shrink. For each such dimension,
            the share of indices that always stay, and per group, the share that one of its channels owns.
    """

    terms: tuple[tuple[float, tuple[tuple[float, Mapping[Group, float]], ...]], ...]

    def __call__(self, sizes: Sizes[Group]) -> float:
        """The cost when the groups have these sizes."""
        return sum(
            cost
            * math.prod(stays + sum(share * sizes[group] for group, share in shares.items()) for stays, shares in dims)
            for cost, dims in self.terms
        )

    def along(self, group: Group, levels: Sequence[int], sizes: Sizes[Group]) -> Sequence[float]:
        """The costs when one group has each of these sizes, and the others have theirs."""
        costs, of_group = np.zeros(len(levels)), np.asarray(levels, dtype=np.float64)
        for cost, dims in self.terms:
            of_term = np.full(len(levels), cost)
            for stays, shares in dims:
                others = sum(share * sizes[each] for each, share in shares.items() if each != group)
                of_term *= stays + others + shares.get(group, 0.0) * of_group
            costs += of_term
        found: list[float] = costs.tolist()
        return found

    def of(self, group: Group) -> "Cost[Group]":
        """The terms that a group takes part in."""
        return Cost(tuple(term for term in self.terms if any(group in shares for _, shares in term[1])))

    @property
    def neighbours(self) -> Mapping[Group, set[Group]]:
        """Group -> the groups whose cost changes with its size."""
        near: dict[Group, set[Group]] = {}
        for _, dims in self.terms:
            together = {group for _, shares in dims for group in shares}
            for group in together:
                near.setdefault(group, set()).update(together)
        return near


def cost_of(
    model: nn.Module, graph: Graph, kind: str, samples: int = 1, groups: Container[ChannelGroup] | None = None
) -> Cost[ChannelGroup]:
    """The cost model of "params", "macs" or "size" (bytes).

    Args:
        model: The model.
        graph: Its channel groups.
        kind: What is counted.
        samples: Samples in the call that was traced; only "macs" depends on it.
        groups: The groups whose size may change; default: all.
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
    changing = [group for group in graph.groups if groups is None or group in groups]

    def shrinking(shares: Mapping[ChannelGroup, float]) -> tuple[float, Mapping[ChannelGroup, float]]:
        return 1 - sum(shares[group] * group.size for group in changing if group in shares), shares

    terms = []
    for name, cost in full.items():
        dims = []
        for dim, size in enumerate(tensors[name].shape):
            shares = {g: _indices(g, name, dim) / g.size / size for g in changing if (name, dim) in g.slots}
            if shares:
                dims.append(shrinking(shares))
        terms.append((float(cost), tuple(dims)))
    for count, of_all in graph.products if kind == "macs" else ():
        shares = {group: of_all[group.name] for group in changing if group.name in of_all}
        terms.append((count / samples, (shrinking(shares),)))
    return Cost(tuple(terms))


def _indices(group: ChannelGroup, name: str, dim: int) -> int:
    return int((group.slots[name, dim] >= 0).sum())


def costs_of(
    model: nn.Module, graph: Graph, groups: Container[ChannelGroup], traced: Call
) -> dict[str, Cost[ChannelGroup]]:
    """The cost model of "params", "macs" and "size" when these groups may shrink."""
    graph = counted(model, graph, traced)
    return {kind: cost_of(model, graph, kind, samples_in(traced), groups) for kind in ("params", "macs", "size")}
