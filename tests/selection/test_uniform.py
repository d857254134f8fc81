"""A uniform budget: all groups of a kind keep the same number of channels, the best one."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.graph.groups import find_groups
from lnr_prune.selection.allocation import allocate
from lnr_prune.selection.budget import Budget, Grid
from lnr_prune.selection.costs.cost_model import cost_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 5)
        self.back = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu()) + self.back(self.gate(x).tanh())


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return Blocks()


def test_groups_of_a_kind_differ_in_the_numbers_of_their_blocks_only() -> None:
    kinds: dict[object, list[str]] = {}
    for group in find_groups(model(), (X,), {}).groups:
        kinds.setdefault(group.kind, []).append(group.name)
    assert list(kinds.values()) == [[f"blocks.{i}.{name}" for i in range(3)] for name in ("up", "gate")]


@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_one_size_for_all_of_a_kind_is_chosen_by_what_all_of_them_suffer(share: float) -> None:
    net = model()
    graph = find_groups(net, (X,), {})
    cost = {"params": cost_of(net, graph, "params")}
    curves = {
        group: (1 + index % 3) * (1 - torch.arange(group.size + 1) / group.size).square() * (1 + len(group.name))
        for index, group in enumerate(graph.groups)
    }
    found = allocate(curves, cost, Budget(params=share, uniform=True))
    kinds = {group.kind for group in graph.groups}
    chosen = {kind: {found.sizes[group] for group in graph.groups if group.kind == kind} for kind in kinds}
    assert all(len(sizes) == 1 for sizes in chosen.values())
    assert len({found.sizes[group] for group in graph.groups}) == 2
    limit = share * cost["params"]({group: group.size for group in graph.groups})
    assert cost["params"](found.sizes) <= limit
    best = min(
        sum(float(curves[group][sizes[group.size]]) for group in graph.groups)
        for sizes in ({12: wide, 5: narrow} for wide, narrow in product(range(1, 13), range(1, 6)))
        if cost["params"]({group: sizes[group.size] for group in graph.groups}) <= limit
    )
    assert found.error <= 1.05 * best + 1e-9
    assert found.error == pytest.approx(sum(float(curves[group][size]) for group, size in found.sizes.items()))
    assert allocate(curves, cost, Budget(params=share)).error < found.error


def test_a_latency_is_that_of_all_groups() -> None:
    net = model()
    graph = find_groups(net, (X,), {})
    curves = {group: torch.arange(group.size + 1.0).flip(0) for group in graph.groups}
    asked = []

    def latency(sizes: object) -> float:
        assert isinstance(sizes, dict)
        asked.append(sizes)
        return sum(sizes.values()) / 51

    found = allocate(curves, {"macs": cost_of(net, graph, "macs")}, Budget(latency=0.5, uniform=True), latency)
    assert latency(found.sizes) <= 0.5
    assert all(sizes.keys() == set(graph.groups) for sizes in asked)


def test_a_prune_with_a_uniform_budget_and_a_grid() -> None:
    budget = Budget(params=0.6, uniform=True, grid=Grid(round_to=4, leave=("blocks.0.gate",)))
    pruned = lnr.prune(model(), [X], budget)
    kept = {row.name: row.kept for row in pruned.report.groups}
    assert len({kept[f"blocks.{i}.up"] for i in range(3)}) == 1
    assert kept["blocks.1.up"] in (4, 8)
    assert kept["blocks.0.gate"] == 5
    assert kept["blocks.1.gate"] == kept["blocks.2.gate"]
    with pytest.raises(TypeError, match="uniform must be True or False, got 'yes'"):
        Budget(params=0.6, uniform="yes")  # type: ignore[arg-type]
