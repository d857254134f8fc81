"""Networks that draw random numbers in evaluation: every network that is compared with another draws the same ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import lnr_prune as lnr

Function = Callable[["Noisy", Tensor], Tensor]


class Noisy(nn.Module):
    """Two hidden layers; a function computes what the second one reads."""

    def __init__(self, between: Function) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 32), nn.Linear(32, 24), nn.Linear(24, 5)
        self.gain = nn.Parameter(torch.rand(32))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.between(self, x)).relu())


def noise_at_the_input(net: Noisy, x: Tensor) -> Tensor:
    return net.a(x + 0.1 * torch.randn_like(x)).relu()


def one_number_a_row(net: Noisy, x: Tensor) -> Tensor:
    return (net.a(x) + torch.randn_like(x[:, :1]) * net.gain).relu()


def alike(net: Noisy, x: Tensor) -> Tensor:
    h = net.a(x).relu()
    return h + torch.randn_like(h)


def of_a_size(net: Noisy, x: Tensor) -> Tensor:
    h = net.a(x).relu()
    return h + torch.randn(h.shape, dtype=h.dtype) * 0.5


def dropout(net: Noisy, x: Tensor) -> Tensor:
    return F.dropout(net.a(x).relu(), 0.2, training=True)


def rows(seed: int = 0) -> list[Tensor]:
    return list(torch.randn(256, 10, generator=torch.Generator().manual_seed(seed)).split(64))


@pytest.mark.parametrize("between", [noise_at_the_input, one_number_a_row])
@pytest.mark.parametrize("into", ["copy", "graph"])
def test_noise_that_is_not_drawn_for_each_channel_takes_no_group_away(between: Function, into: str) -> None:
    model = Noisy(between).eval()
    pruned = lnr.prune(model, rows(), lnr.Keep(0.5), into=into)
    assert [group.kept for group in pruned.report.groups] == [16, 12]
    for seed in range(3):
        outputs = []
        for net, weights in ((pruned.model, {}), (model, dict(pruned.masked))):
            torch.manual_seed(seed)
            outputs.append(functional_call(net, weights, (torch.ones(7, 10),)))
        torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("between", [alike, of_a_size, dropout])
def test_channels_for_each_of_which_a_number_is_drawn_stay_and_the_report_says_so(between: Function) -> None:
    pruned = lnr.prune(Noisy(between).eval(), rows(), lnr.Keep(0.5))
    assert [group.producers for group in pruned.report.groups] == [("b",)]
    assert pruned.report.frozen["a"].startswith("random numbers are drawn for each of its channels in")


@pytest.mark.parametrize("between", [noise_at_the_input, one_number_a_row, dropout])
def test_both_networks_of_the_refit_see_the_same_noise(between: Function) -> None:
    """So a layer whose inputs are as they were is as it was; with other noise, all layers would have an error."""
    report = lnr.prune(Noisy(between).eval(), rows(), lnr.Keep({"b": 12})).report
    assert [layer.name for layer in report.layers] == ["c"]


def test_the_generator_is_not_touched() -> None:
    model, before = Noisy(noise_at_the_input).eval(), torch.get_rng_state()
    lnr.inspect(model, rows()[0])
    lnr.prune(model, rows(), lnr.Budget(macs=0.5, effort=lnr.Effort(samples=32, refits=1)))
    assert torch.equal(torch.get_rng_state(), before)


class Turned(nn.Module):
    """A map whose channels come last in memory, a convolution, and noise or dropout of what it gives."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.draw = nn.Linear(3, 4), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.draw(self.b(self.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).tanh())))


@pytest.mark.parametrize("into", ["copy", "graph"])
@pytest.mark.parametrize("draw", [lambda y: y + torch.randn_like(y), lambda y: F.dropout(y, 0.2, training=True)])
def test_numbers_are_compared_in_the_order_of_the_axes(draw: Callable[[Tensor], Tensor], into: str) -> None:
    """With a single channel, its place in memory is open, so the convolution gives another order in memory."""
    pruned = lnr.prune(Turned(draw).eval(), [torch.randn(8, 3, 5, 5)], lnr.Keep({"a": 1}), into=into)
    assert [group.kept for group in pruned.report.groups] == [1]
