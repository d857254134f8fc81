"""Budgets: what a model costs at any sizes, and how a budget is shared out among the groups."""

import copy
from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.calibration.calls import Call
from lnr_prune.calibration.data import calibrate, first_of_each_half
from lnr_prune.calibration.divergence import divergence, output_error, outputs
from lnr_prune.calibration.reading import read
from lnr_prune.collapse.collapse import collapse
from lnr_prune.collapse.plan import make_plan
from lnr_prune.graph.groups import find_groups
from lnr_prune.selection.allocation import RESOLUTION, Allocation, allocate, descend
from lnr_prune.selection.budget import Budget, Grid
from lnr_prune.selection.costs import cost
from lnr_prune.selection.costs.cost_model import Cost, cost_of
from lnr_prune.selection.curves import error_curves, through
from lnr_prune.selection.search import attenuated, search
from tests.helpers.models import Residual, cnn, mlp, randomised
from tests.helpers.patterns import TorchAttention

IMAGES = torch.randn(40, 2, 12, 12, generator=torch.Generator().manual_seed(0))


def unit_cost(*names: str) -> Cost[str]:
    """One for every channel."""
    return Cost(tuple((1.0, ((0.0, {name: 1.0}),)) for name in names))


@pytest.mark.parametrize(("model", "shape"), [(cnn(), (2, 2, 12, 12)), (Residual(), (2, 3, 8, 8))])
@pytest.mark.parametrize("seed", range(3))
def test_the_cost_model_is_the_cost_of_the_smaller_model(model: nn.Module, shape: tuple[int, ...], seed: int) -> None:
    call: Call = ((torch.randn(*shape),), {})
    model = randomised(model)
    graph = find_groups(model, *call)
    generator = torch.Generator().manual_seed(seed)
    sizes = {g: int(torch.randint(1, g.size + 1, (1,), generator=generator)) for g in graph.groups}
    predicted = {kind: cost_of(model, graph, kind, samples=2)(sizes) for kind in ("params", "macs", "size")}
    smaller = copy.deepcopy(model)
    collapse(smaller, make_plan({g: torch.arange(g.size) < sizes[g] for g in graph.groups}))
    assert predicted["params"] == pytest.approx(cost.parameters(smaller))
    assert predicted["macs"] == pytest.approx(cost.macs(smaller, call))
    assert predicted["size"] == pytest.approx(cost.size(smaller))


@given(
    drops=st.lists(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=5), min_size=2, max_size=3),
    share=st.floats(0.3, 1.0),
)
def test_convex_curves_and_equal_costs_are_shared_out_best(drops: list[list[float]], share: float) -> None:
    curves = {
        str(i): torch.tensor([sum(sorted(of_group)[: len(of_group) - k]) for k in range(len(of_group) + 1)])
        for i, of_group in enumerate(drops)
    }
    total = unit_cost(*curves)
    whole = sum(map(len, drops))
    if int(share * whole + 1e-9) < len(drops):
        return
    found = allocate(curves, {"params": total}, Budget(params=share))
    assert total(found.sizes) <= share * whole
    best = min(
        sum(float(curves[name][k]) for name, k in zip(curves, sizes, strict=True))
        for sizes in product(*(range(1, len(of_group) + 1) for of_group in drops))
        if sum(sizes) <= share * whole
    )
    assert found.error == pytest.approx(best, abs=1e-5)


def test_the_path_gets_cheaper_and_looks_beyond_a_plateau() -> None:
    curves = {"a": torch.tensor([9.0, 3.0, 2.9, 2.8, 0.0]), "b": torch.tensor([9.0, 2.0, 1.0, 0.5, 0.0])}
    levels = dict.fromkeys("ab", (1, 2, 3, 4))
    path = list(descend(curves, unit_cost("a", "b"), levels))
    costs = [unit_cost("a", "b")(point.sizes) for point in path]
    assert costs == sorted(costs, reverse=True)
    assert {point.sizes["a"] for point in path} == {4, 1}  # at once
    assert [point.error for point in path] == pytest.approx(
        [sum(float(curves[name][k]) for name, k in point.sizes.items()) for point in path]
    )


@pytest.mark.parametrize("limit", [0.9, 0.5, 0.35])
def test_a_latency_is_reached_by_bisection(limit: float) -> None:
    curves = {"a": torch.arange(9.0).flip(0), "b": torch.arange(9.0).flip(0) * 2}
    asked = []

    def latency(sizes: Any) -> float:
        asked.append(dict(sizes))
        return (sizes["a"] + sizes["b"]) / 16

    found = allocate(curves, {"macs": unit_cost("a", "b")}, Budget(latency=limit), latency)
    assert latency(found.sizes) <= limit
    assert (sum(found.sizes.values()) + 1) / 16 > limit
    assert len(asked) < 8
    with pytest.raises(ValueError, match=r"out of reach: .* takes 12.5% of the original's time"):
        allocate(curves, {"macs": unit_cost("a", "b")}, Budget(latency=0.1), latency)


def test_an_error_is_not_exceeded() -> None:
    curves = {"a": torch.tensor([9.0, 3.0, 1.0, 0.5, 0.0]), "b": torch.tensor([9.0, 2.0, 1.0, 0.5, 0.0]) / 10}
    found = allocate(curves, {"macs": unit_cost("a", "b")}, Budget(error=0.71))
    assert found.sizes == {"a": 3, "b": 1}
    assert found.error == pytest.approx(0.7)


@pytest.mark.parametrize("kind", ["params", "macs", "size"])
def test_prune_keeps_to_its_budget(kind: str) -> None:
    model = randomised(cnn())
    limits: Any = {kind: 0.5}
    budget = lnr.Budget(**limits)
    pruned = lnr.prune(model, IMAGES.split(16), budget)
    call: Call = ((IMAGES[:2],), {})
    measure = {"params": cost.parameters, "macs": lambda m: cost.macs(m, call), "size": cost.size}[kind]
    assert 0.4 < measure(pruned.model) / measure(model) <= 0.5


@pytest.mark.parametrize("share", [0.7, 0.5])
def test_the_products_of_an_attention_are_within_its_budget(share: float) -> None:
    torch.manual_seed(0)
    model, x = TorchAttention(), torch.randn(8, 80, 12)
    call: Call = ((x[:2],), {})
    of_weights = sum(find_groups(model, *call).macs.values()) / 2
    assert of_weights < 0.7 * cost.macs(model, call)  # the rest is theirs, and falls with the heads
    report = lnr.prune(model, x.split(4), lnr.Budget(macs=share, effort=lnr.Effort(refits=0)), selector="norm").report
    assert report.macs_after <= share * report.macs_before


def test_a_budget_of_latency_or_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(cnn())
    pruned = lnr.prune(model, IMAGES.split(16), lnr.Budget(error=0.05))
    assert pruned.report.params_after < pruned.report.params_before
    assert divergence([outputs(model, ((IMAGES,), {}))], [outputs(pruned.model, ((IMAGES,), {}))]) < 0.1
    assert cost.latency(model, ((IMAGES,), {}), seconds=0.01) > 0
    monkeypatch.setattr(cost, "latency", lambda model, example: cost.macs(model, example))  # without the noise
    pruned = lnr.prune(model, IMAGES.split(16), lnr.Budget(latency=0.5))
    assert 0.4 < pruned.report.macs_after / pruned.report.macs_before <= 0.5


def test_rounding_minimum_and_layers_that_stay() -> None:
    model = randomised(cnn())
    budget = lnr.Budget(macs=0.6, grid=lnr.Grid(round_to=2, minimum=3, leave=("10",)))
    kept = {group.name: group.kept for group in lnr.prune(model, IMAGES.split(16), budget).report.groups}
    assert kept["10"] == 10
    assert all(count % 2 == 0 and count >= 4 for count in kept.values())
    with pytest.raises(ValueError, match=r"leave names 'nobody', which is not a prunable producer"):
        lnr.prune(model, IMAGES, lnr.Budget(macs=0.5, grid=lnr.Grid(leave=("nobody",))))
    with pytest.raises(ValueError, match=r"out of reach: the smallest model that it allows has macs 38.9%"):
        lnr.prune(model, IMAGES.split(16), lnr.Budget(macs=0.05, grid=lnr.Grid(leave=("10",), minimum=4)))


def test_a_group_that_matters_to_the_outputs_keeps_more() -> None:
    class Unequal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(8, 20), nn.Linear(20, 8), nn.Linear(8, 20), nn.Linear(20, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh()) + 0.01 * self.d(self.c(x).tanh())

    torch.manual_seed(0)
    pruned = lnr.prune(Unequal(), torch.randn(300, 8), lnr.Budget(params=0.6))
    kept = {group.name: group.kept for group in pruned.report.groups}
    assert kept["a"] > 2 * kept["c"]


def test_the_curves_are_the_measured_divergence() -> None:
    torch.manual_seed(0)
    model, x = mlp(8, 20, 4).double().requires_grad_(False), torch.randn(4000, 8, dtype=torch.float64)
    data = calibrate(model, [x])
    readings = read(model, find_groups(model, (x,), {}).groups, data, bias=True)
    fit, judging = first_of_each_half(data, None)
    error = output_error(model, judging)
    (curve,) = error_curves(dict(model.named_parameters()), [readings], error)[0].values()
    assert float(curve[20]) == 0.0
    assert bool((curve.diff() <= 1e-12).all())
    original = outputs(model, ((x,), {}))
    for size in (10, 5, 2):
        seen = torch.cat([batch for (batch,), _ in fit])
        pruned = lnr.prune(
            model, [seen], lnr.Keep(size), selector="backward", refit=lnr.Refit(ridge=1e-4), logits=False
        )
        whole, small = ([outputs(net, call) for call in judging] for net in (model, pruned.model))
        assert divergence(whole, small) == pytest.approx(float(curve[size]), rel=0.05)
    spread = (original - original.mean(0)).square().sum()
    assert divergence([original], [original + 1]) == pytest.approx(float(original.numel() / spread))


def test_a_curve_goes_through_what_was_measured() -> None:
    shape = torch.tensor([1.0, 0.6, 0.3, 0.2, 0.1, 0.05, 0.0]).double()
    curve = through(shape, {3: 0.5, 1: 0.9})
    assert curve[[3, 1]].tolist() == pytest.approx([0.5, 0.9])
    assert curve[[0, 4, 6]].tolist() == pytest.approx([1.5, 0.25, 0.0])  # beyond: in proportion
    assert 0.5 < float(curve[2]) < 0.9
    assert through(shape, {3: 0.5, 1: 0.0})[:4].tolist() == pytest.approx([0.5] * 4)  # never rises with the size


def test_outputs_that_are_not_real_or_not_finite_do_not_count() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"index": x.argmax(1), "scores": x.where(x > 0, -torch.inf), "loss": x.sum()}

    x = torch.randn(6, 3)
    first, second = (outputs(Masked(), ((value,), {})) for value in (x, 2 * x))
    assert first.shape == (1, 19)
    assert 0 < divergence([first], [second]) < float("inf")
    assert outputs(nn.Flatten(), ((torch.arange(4)[:, None],), {})).shape == (1, 0)
    assert divergence([torch.zeros(1, 0)], [torch.zeros(1, 0)]) == 0.0


def test_a_local_search_keeps_what_lowers_the_measured_error() -> None:
    curves = {name: torch.tensor([1.0, 0.6, 0.3, 0.1, 0.0]) for name in "abc"}

    def shared_out(changed: Mapping[str, Tensor]) -> Allocation[str]:
        return allocate(changed, {"params": unit_cost(*"abc")}, Budget(params=0.6))

    asked: list[dict[str, int]] = []

    def error(sizes: Mapping[str, int]) -> float:
        asked.append(dict(sizes))
        return 10.0 - sizes["c"]  # in truth all depends on c

    found = search(curves, shared_out, error, trials=20)
    assert found.sizes["c"] == max(sizes["c"] for sizes in asked) > shared_out(curves).sizes["c"]
    assert len(asked) <= 21
    assert len({tuple(sizes.values()) for sizes in asked}) == len(asked)  # nothing is measured twice
    assert search(curves, shared_out, error, trials=0).sizes == shared_out(curves).sizes


def test_an_error_counts_by_what_the_refit_leaves_of_it() -> None:
    curve, left = torch.tensor([1.0, 0.6, 0.3, 0.1, 0.0]), {"a": 0.1, "b": 0.2, "c": 0.8, "d": 0.4}
    curves, sizes = dict.fromkeys("abcd", curve), {"a": 1, "b": 2, "c": 3, "d": 1}

    def error(asked: Mapping[str, int]) -> float:
        (alone,) = (name for name in asked if asked[name] < 4)
        assert asked[alone] == sizes[alone]
        return float(left[alone] * curve[sizes[alone]])

    counted = attenuated(curves, sizes, error, 10)
    assert list(counted) == list("abcd")
    for name in "abcd":
        torch.testing.assert_close(counted[name], left[name] * curve)
    assert attenuated({"a": curve}, {"a": 1}, lambda _: 5.0, 8)["a"].equal(curve)  # the refit does no harm
    assert 0 < attenuated({"a": curve}, {"a": 1}, lambda _: 0.0, 8)["a"].sum() < 0.1
    assert attenuated({"a": 0 * curve}, {"a": 1}, error, 8)["a"].equal(0 * curve)  # nothing to measure
    assert attenuated({"a": curve}, {"a": 4}, error, 8)["a"].equal(curve)


def test_what_the_refit_leaves_is_interpolated_along_the_depth() -> None:
    curves = {f"layer {i}": torch.tensor([1.0, 0.5, 0.0]) for i in range(15)}
    sizes = dict.fromkeys(curves, 1) | {"layer 0": 2}
    asked: list[int] = []

    def error(sizes: Mapping[str, int]) -> float:
        (alone,) = (name for name in sizes if sizes[name] < 2)
        asked.append(int(alone.split()[1]))
        return float(0.5 * 1.2 ** (asked[-1] - 14))

    counted = attenuated(curves, sizes, error, 4)
    assert asked == [1, 5, 10, 14]  # nearly evenly, and those that lose channels alone
    for i, curve in enumerate(counted.values()):
        torch.testing.assert_close(curve, 1.2 ** (max(1, i) - 14) * curves["layer 0"])


def test_what_the_refit_leaves_is_that_of_a_network_with_one_pruned_group(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batches = mlp(8, 20, 20, 4).requires_grad_(False), torch.randn(400, 8).split(100)
    found: dict[str, float] = {}

    def measured(curves: Any, sizes: Any, error: Any, refits: int) -> Any:
        found.update({group.name: error({**dict.fromkeys(curves, 20), group: 5}) for group in curves})
        assert refits == 3
        return curves

    monkeypatch.setattr("lnr_prune.selection.search.attenuated", measured)
    lnr.prune(model, batches, lnr.Budget(params=0.5, effort=lnr.Effort(refits=3)), selector="backward", refit=None)
    lnr.prune(model, batches, lnr.Budget(params=0.5, effort=lnr.Effort(refits=0)), selector="backward")
    assert not found  # nothing is refitted
    with pytest.raises(ValueError, match="a search refits the network in every trial"):
        lnr.prune(model, batches, lnr.Budget(params=0.5, effort=lnr.Effort(search=1)), selector="backward", refit=None)
    lnr.prune(model, batches, lnr.Budget(params=0.5, effort=lnr.Effort(samples=200, refits=3)), selector="backward")
    assert set(found) == {"0", "2"}
    judged: list[Call] = [((batch,), {}) for batch in batches[1::2]]
    for name, error in found.items():  # the channels are chosen on all batches there, on half of them here
        pruned = lnr.prune(model, batches[::2], lnr.Keep({name: 5}), selector="backward").model
        alike = divergence([outputs(model, call) for call in judged], [outputs(pruned, call) for call in judged])
        assert error == pytest.approx(alike, rel=0.2)


@given(st.integers(1, 5000), st.integers(1, 16), st.integers(1, 40), st.floats(0.0, 1.0, exclude_min=True))
def test_sizes_that_are_considered_lie_close(size: int, round_to: int, minimum: int, share: float) -> None:
    """So little of a budget is left over."""
    curves, grid = {"a": torch.arange(size + 1.0).flip(0).sqrt()}, Grid(round_to, minimum)
    least = min(size, -(-min(minimum, size) // round_to) * round_to)
    if share * size < least:
        with pytest.raises(ValueError, match="out of reach"):
            allocate(curves, {"params": unit_cost("a")}, Budget(params=share, grid=grid))
        return
    kept = allocate(curves, {"params": unit_cost("a")}, Budget(params=share, grid=grid)).sizes["a"]
    assert least <= kept <= share * size
    assert kept == size or kept % round_to == 0
    assert share * size - kept < max(1, kept / RESOLUTION) + round_to


def test_a_searched_budget_still_holds() -> None:
    model = randomised(cnn())
    pruned = lnr.prune(model, IMAGES.split(8), lnr.Budget(params=0.5, effort=lnr.Effort(search=3)), selector="backward")
    assert pruned.report.params_after <= 0.5 * pruned.report.params_before


def test_logits_are_compared_by_their_probabilities() -> None:
    z = torch.randn(50, 4, dtype=torch.float64)
    p = z.softmax(1)
    assert divergence([z], [z + 3], logits=True) == pytest.approx(0, abs=1e-12)
    assert divergence([z], [p.mean(0).log().expand(50, 4)], logits=True) == pytest.approx(1)
    other = torch.randn(50, 4, dtype=torch.float64)
    kl, spread = ((p * (p / q).log()).sum(1).mean() for q in (other.softmax(1), p.mean(0)))
    assert divergence([z[:20], z[20:]], [other[:20], other[20:]], logits=True) == pytest.approx(float(kl / spread))
