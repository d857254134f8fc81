"""A layer refitted together with the one that makes its inputs: as good as it gets, and never worse than alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import lnr_prune as lnr
from lnr_prune.calibration.data import calibrate
from lnr_prune.graph.module import named_tensors
from lnr_prune.refit.refit import Refit, Refitted, refit
from tests.helpers import references
from tests.helpers.layers import layers_of
from tests.helpers.models import cnn, randomised

ITERATIONS = 100


def settings(iterations: int, ridge: float | None = None) -> Refit:
    """Two layers together in so many iterations; 0 = each is by itself."""
    return Refit(ridge, window=2, iterations=iterations) if iterations else Refit(ridge)


def refitted(
    model: nn.Module,
    data: list[Tensor],
    kept: dict[str, Tensor],
    iterations: int,
    ridge: float | None = None,
    **options: Any,
) -> Refitted:
    how = settings(iterations, ridge)
    return refit(model, layers_of(model, data[0][:2]), kept, calibrate(model, data), settings=how, **options)


def error(model: nn.Module, x: Tensor, done: Refitted, last: nn.Module | None = None) -> float:
    """Mean squared error of the outputs, put through one more module."""
    wanted, got = model(x), functional_call(model, dict(done.weights), (x,))
    return float((wanted - got if last is None else last(wanted) - last(got)).square().sum(1).mean())


def first(count: int, d: int) -> Tensor:
    """The first columns, and the bias."""
    return torch.arange(d + 1).lt(count) | torch.arange(d + 1).eq(d)


def linear(seed: int) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6)).double().requires_grad_(False)
    return model, torch.randn(2000, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64) + 1


@pytest.mark.parametrize("count", [1, 3, 5])
def test_two_linear_layers_get_the_best_product_of_that_rank(count: int) -> None:
    model, x = linear(count)
    best = references.best_rank_error(model(x), count)
    alone, both = (refitted(model, list(x.split(300)), {"1.weight": first(count, 12)}, n) for n in (0, ITERATIONS))
    assert error(model, x, both) == pytest.approx(best, rel=0.02)
    assert error(model, x, alone) > 1.1 * best
    assert both.layers["1.weight"].error / both.layers["1.weight"].scale == pytest.approx(
        best / float(model(x).square().sum(1).mean()), rel=0.02
    )


def block(seed: int = 0) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 10, 3, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(10, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    return randomised(nn.Sequential(*layers)).double().requires_grad_(False), torch.randn(800, 2, 10, 10).double()


def columns(kept: Tensor) -> Tensor:
    return kept.repeat_interleave(9)


def test_behind_an_activation_it_is_as_good_as_a_long_descent() -> None:
    model, x = block()
    kept = {"4.weight": columns(torch.arange(10) < 4)}
    alone, both = (refitted(model, list(x.split(40)), kept, n) for n in (0, ITERATIONS))
    assert set(both.weights) == {"0.weight", "1.running_mean", "4.weight", "5.running_mean"}
    descended = references.descended(model, {**dict(model.named_parameters()), **both.weights, **alone.weights}, x)
    assert error(model, x, both) < 1.03 * descended
    assert error(model, x, both) < 0.95 * error(model, x, alone)


def test_the_batches_do_not_matter() -> None:
    model, x = block()
    kept = {"4.weight": columns(torch.arange(10) < 4)}
    whole, split = (refitted(model, list(data), kept, 3, ridge=1e-4) for data in ([x], x.split(37)))
    for name, weight in whole.weights.items():
        torch.testing.assert_close(weight, split.weights[name], rtol=1e-6, atol=1e-8)


def test_rows_that_nothing_comes_of_do_not_count() -> None:
    model, x = linear(0)
    alive = torch.arange(6) < 2  # two outputs need two channels
    done = refitted(model, [x], {"1.weight": first(2, 12)}, ITERATIONS, alive={"1.weight": alive})
    wanted, got = (y[:, alive] for y in (model(x), functional_call(model, dict(done.weights), (x,))))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_samples_that_are_held_out_decide() -> None:
    """Forty-six numbers are fitted to eleven samples: what fits those best is far off elsewhere."""
    unseen = {0: 0.0, 1000: 0.0}
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 2)).double().requires_grad_(False)
        named_tensors(model)["0.weight"].mul_(4)
        few, many = torch.randn(14, 8, dtype=torch.float64), torch.randn(4000, 8, dtype=torch.float64)
        for iterations in unseen:
            done = refitted(model, [few], {"2.weight": first(4, 12)}, iterations, ridge=1e-2)
            unseen[iterations] += error(model, many, done)
    assert unseen[1000] < 1.1 * unseen[0]


def test_logits_are_fitted_by_their_divergence() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 5)).double().requires_grad_(False)
    named_tensors(model)["2.weight"].mul_(4)
    x, kept = torch.randn(2000, 8, dtype=torch.float64), {"2.weight": first(5, 20)}

    def divergence(done: Refitted) -> float:
        p, q = (y.log_softmax(1) for y in (model(x), functional_call(model, dict(done.weights), (x,))))
        return float((p.exp() * (p - q)).sum(1).mean())

    alone, squares, both = (
        divergence(refitted(model, [x], kept, n, logits=logits))
        for n, logits in ((0, True), (ITERATIONS, False), (ITERATIONS, True))
    )
    assert both < 0.7 * alone
    assert both < squares


class Ways(nn.Module):
    """Two layers with something in between."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.gate, self.way = nn.Linear(6, 12), nn.Linear(12, 4), nn.Linear(6, 12), way
        self.norm, self.depthwise = nn.LayerNorm(12), nn.Conv1d(12, 12, 1, groups=12)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).sigmoid()
        y = self.a(x)
        if self.way == "gated":
            y = y * gate
        elif self.way == "normed":
            y = self.norm(y).relu()
        elif self.way == "depthwise":
            y = self.depthwise(y[..., None]).squeeze(-1).tanh()
        elif self.way == "holds the size":
            y = y.reshape(len(y), 3, 4).flatten(1)
        elif self.way == "read twice":
            return self.b(y) + y.sum(1, keepdim=True)
        elif self.way == "late":
            y = y * self.gate(x + 1).sigmoid()
        elif self.way == "underivable":
            y = (y > 0).to(y)
        elif self.way == "random":
            y = y + torch.rand_like(y)
        return self.b(y)


@pytest.mark.parametrize("way", ["gated", "normed", "depthwise"])
def test_whatever_lies_between(way: str) -> None:
    torch.manual_seed(0)
    model, x = Ways(way).double().requires_grad_(False), torch.randn(600, 6, dtype=torch.float64)
    kept = {"b.weight": first(4, 12)}
    alone, both = (refitted(model, list(x.split(200)), kept, n) for n in (0, 30))
    assert set(both.weights) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert error(model, x, both) < 0.9 * error(model, x, alone)


@pytest.mark.parametrize("way", ["holds the size", "read twice", "late", "underivable", "random"])
def test_a_way_that_cannot_be_gone_again_is_left(way: str) -> None:
    torch.manual_seed(0)
    model, x = Ways(way).double().requires_grad_(False), torch.randn(600, 6, dtype=torch.float64)
    results = []
    for iterations in (0, 30):
        torch.manual_seed(1)
        results.append(refitted(model, list(x.split(200)), {"b.weight": first(4, 12)}, iterations).weights)
    alone, both = results
    assert alone.keys() == both.keys()
    if way != "random":
        assert all(torch.equal(alone[name], both[name]) for name in alone)


def test_a_whole_network() -> None:
    torch.manual_seed(0)
    model, data = randomised(cnn()), [torch.randn(32, 2, 12, 12) for _ in range(4)]
    assert all(parameter.requires_grad for parameter in model.parameters())
    alone, both = (
        lnr.prune(model, data, lnr.Keep(0.4), refit=settings(n), run=lnr.Run(progress=False)) for n in (0, 10)
    )
    assert both.report.error < 0.95 * alone.report.error
    assert both.plan == alone.plan
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(value.requires_grad for value in both.masked.values())
    x = torch.cat(data)
    torch.testing.assert_close(both.model(x), functional_call(model, dict(both.masked), (x,)), rtol=1e-4, atol=1e-5)


def test_a_dead_layer_is_left() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2))
    model.requires_grad_(False).double()
    named_tensors(model)["2.bias"].fill_(-1e3)
    done = refitted(model, [torch.randn(50, 4, dtype=torch.float64)], {"2.weight": first(3, 6)}, 5)
    assert "0.weight" not in done.weights


def test_in_half_precision() -> None:
    torch.manual_seed(0)
    model = randomised(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))).bfloat16()
    data = [torch.randn(256, 8).bfloat16()]
    alone, both = (
        lnr.prune(model, data, lnr.Keep(0.3), refit=settings(n), run=lnr.Run(progress=False)).report.error
        for n in (0, 10)
    )
    assert both < alone


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"window": 2, "iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"window": 2, "iterations": 2.5}, TypeError, "iterations must be an int, got 2.5"),
        ({"window": 2, "iterations": True}, TypeError, "iterations must be an int, got True"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 3}, ValueError, r"window must be 1 \(each layer by itself\) or 2 \(with its maker\), got 3"),
        ({"window": 2.0}, TypeError, "window must be an int, got 2.0"),
    ],
)
def test_what_is_no_number_of_layers_or_iterations(given: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        lnr.Refit(**given)
