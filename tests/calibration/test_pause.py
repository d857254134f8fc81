"""Forward passes that stop and go on: nothing is computed twice, and the outputs are those of a whole pass."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lnr_prune.calibration.calls import run
from lnr_prune.calibration.divergence import divergence, output_error, outputs
from lnr_prune.calibration.functions.pause import GONE, Manner, Pause, Replay, begin, go_on
from lnr_prune.calibration.functions.prefix import Prefix
from lnr_prune.errors import CalibrationError
from lnr_prune.graph.module import evaluating, named_tensors, remembered, unfused_attention
from lnr_prune.refit.downstream import Downstream, Wiring
from lnr_prune.refit.side_by_side import manner_of


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    scripted = torch.jit.script(_swish)


class Net(nn.Module):
    """Three layers, and a function of the second one's output and of what came before."""

    def __init__(self, between: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.between, self.known = between, dict[str, Tensor]()
        self.count: Tensor
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.third(self.between(self, self.second(h), h))


def cached(net: Any, y: Tensor, h: Tensor) -> Tensor:
    if "scale" not in net.known:
        net.known["scale"] = torch.ones(6).mul(2)
    return y * net.known["scale"]


def counted(net: Any, y: Tensor, h: Tensor) -> Tensor:
    net.count += 1
    return y + net.count


def in_place(net: Any, y: Tensor, h: Tensor) -> Tensor:
    left = h[:, :3]
    y += h
    left.zero_()
    return F.relu(y, inplace=True) + h


def derived(net: Any, y: Tensor, h: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = h.detach().requires_grad_()
        (slope,) = torch.autograd.grad(leaf.square().sum(), leaf)
    return y + slope.detach()


def through_numpy(net: Any, y: Tensor, h: Tensor) -> Tensor:
    return y + torch.from_numpy(h.numpy() * 2)


def parts(net: Any, y: Tensor, h: Tensor) -> Tensor:
    left, right = y.chunk(2, 1)
    value, index = torch.max(h, 1, keepdim=True)
    return torch.cat([left * value, right + index], 1) if float(h.sum()) < 1e9 else y


FORWARDS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "plain": lambda net, y, h: y + h,
    "in place, through views": in_place,
    "random": lambda net, y, h: y + torch.randn_like(h) * F.dropout(h, training=True) + torch.rand(6),
    "parts and numbers": parts,
    "with gradients": derived,
    "through numpy": through_numpy,
    "cached": cached,
    "counted": counted,
    "scripted": lambda net, y, h: scripted(y) + scripted(h),
}


def net(name: str) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(FORWARDS[name]).eval().requires_grad_(False), torch.randn(5, 4)


def in_parts(model: nn.Module, x: Tensor, stop: int, manner: Manner) -> Tensor:
    """The outputs of a pass that is stopped before its function number ``stop``."""
    count = [0]

    def here(*_: Any) -> bool:
        count[0] += 1
        return count[0] == stop + 1

    start = begin(((x,), {}))
    pause, found = go_on(model, start, Replay(start, before=here, keep=manner.keep), manner)
    if pause is not None:
        _, found = go_on(model, pause, Replay(pause, keep=manner.keep), manner)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("name", FORWARDS)
def test_wherever_a_pass_stops_its_outputs_are_the_same(name: str) -> None:
    model, x = net(name)
    whole, given, random = run(model, ((x,), {})), x.clone(), torch.get_rng_state()
    with evaluating(model), unfused_attention():
        manner = Manner(put_back=remembered(model))
        for stop in range(12):
            assert torch.equal(in_parts(model, x, stop, manner), whole), stop
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), random)
    assert float(model.count) == 0


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return scripted(x)


def test_what_torch_jit_hides_needs_all_that_came_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Scripted(), nn.Linear(4, 4), nn.Linear(4, 2)).eval().requires_grad_(False)
    x = torch.randn(3, 4)
    names = ["0.weight", "2.weight", "3.weight"]
    with evaluating(model):
        manner = manner_of(model, Wiring((), dict.fromkeys(names, Downstream())), ((x,), {}))
        assert manner.keep
        assert all(torch.equal(in_parts(model, x, stop, manner), model(x)) for stop in range(6))
        with pytest.raises(CalibrationError):
            [in_parts(model, x, stop, Manner()) for stop in range(6)]
    assert torch.is_grad_enabled()


def test_only_what_the_forward_still_holds_is_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(9))).requires_grad_(False)
    start = begin(((torch.randn(3, 8),), {}))
    count = iter(range(99))
    with evaluating(model):
        pause, _ = go_on(model, start, Replay(start, before=lambda *_: next(count) == 6), Manner())
    assert pause is not None
    assert not start.results  # let go
    kept = [result for result in pause.results if isinstance(result, Tensor) and result is not GONE]
    assert len(kept) == 1


def test_copies_share_memory_as_the_originals_do() -> None:
    x, weight = torch.arange(6.0), torch.ones(2)
    pause = Pause(((x,), {}), [], [x[:3], (x[2:], 7), weight[:1], GONE])
    copied = pause.copied([weight])
    (y,), left, (right, seven), view, gone = copied.call[0], *copied.results
    y.zero_()
    assert left.eq(0).all()
    assert right.eq(0).all()
    assert (seven, gone) == (7, GONE)
    assert view.data_ptr() == weight.data_ptr()  # of the model
    assert torch.equal(x, torch.arange(6.0))


class Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.linear = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.linear += func is F.linear
        return func(*args, **(kwargs or {}))


def test_what_comes_before_a_change_is_computed_once() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))).eval().requires_grad_(False), torch.randn(3, 8)
    tensors = named_tensors(model)
    prefix = Prefix(model, ((x,), {}), tensors, Manner())
    with evaluating(model), Counting() as counting:
        for name in ("2.weight", "2.weight", "4.bias"):
            pause = prefix.before({id(tensors[name])})
            assert pause is not None
    assert counting.linear == 2 + 0 + 2
    with evaluating(model), Counting() as counting:
        again = prefix.before({id(tensors["1.weight"])})
    assert counting.linear == 1  # from the start
    with evaluating(model):
        assert again is not None
        assert torch.equal(go_on(model, again, Replay(again), Manner())[1], model(x))
        assert prefix.before({id(torch.ones(1))}) is None  # nobody reads it


@pytest.mark.parametrize("name", FORWARDS)
def test_errors_of_the_outputs_are_those_of_whole_passes(name: str) -> None:
    model, x = net(name)
    calls: list[Any] = [((x,), {}), ((torch.randn(2, 4),), {})]
    error, tensors = output_error(model, calls), named_tensors(model)
    for weight in ("first.weight", "third.weight", "second.bias", "second.weight"):
        for scale in (1.0, 0.5):
            weights = {weight: tensors[weight] * scale, "third.bias": tensors["third.bias"]}
            pairs = [(outputs(model, call), outputs(model, call, weights)) for call in calls]
            expected = divergence([a for a, _ in pairs], [b for _, b in pairs])
            assert error(weights) == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_flags_among_the_arguments_are_no_tensors_of_the_pass() -> None:
    """There is only one False: a pass that goes on turns gradients off, too."""

    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, cache: bool = True) -> Tensor:
            return self.second(self.first(x).relu())

    model, call = Flagged().eval(), ((torch.randn(2, 4),), {"cache": False})
    prefix = Prefix(model, call, named_tensors(model), Manner())
    with evaluating(model):
        pause = prefix.before({id(model.second.weight)})
        assert pause is not None
        assert not go_on(model, pause, Replay(pause), Manner())[1].requires_grad
