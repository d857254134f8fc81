"""The user's batches, buffers and process are never touched, whatever the forward does and whatever goes wrong."""

import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lnr_prune as lnr
from tests.helpers.untouched import Untouched

HALF = lnr.Keep(0.5)
DRAWS = int(os.environ.get("LNR_PRUNE_INTERRUPTS", "20"))
BUDGET = lnr.Budget(params=0.6, effort=lnr.Effort(search=2))
NOWHERE = Path("/nonexistent")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).eval()


class Pure(nn.Module):
    """Normalises its inputs."""

    net: Any

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - 1.0) / 4.0)


class InPlace(Pure):
    """The same, in place."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sub_(1.0).div_(4.0))


class Nested(Pure):
    """The same for a tensor in a dict in a list, both of which it changes, too."""

    def forward(self, parts: list[dict[str, Tensor]]) -> Tensor:  # type: ignore[override]
        parts.append({"x": parts[0].pop("x").sub_(1.0).div_(4.0)})
        return self.net(parts[-1]["x"])


def batches() -> list[Tensor]:
    return list((torch.randn(96, 8, generator=torch.Generator().manual_seed(1)) * 4 + 1).split(32))


def nested(of: list[Tensor]) -> lnr.Batches:
    return lnr.Batches([[{"x": x}] for x in of], lambda parts: ((parts,), {}))


@pytest.mark.parametrize("amount", [HALF, BUDGET])
@pytest.mark.parametrize("options", [{}, {"refit": lnr.Refit(window=2, iterations=2)}, {"into": "graph"}])
def test_a_forward_may_write_into_its_inputs(amount: Any, options: dict[str, Any]) -> None:
    expected = lnr.prune(Pure().eval(), batches(), amount, **options)
    given = batches()
    pruned = lnr.prune(InPlace().eval(), given, amount, **options)
    assert all(map(torch.equal, given, batches()))
    assert pruned.plan.channels == expected.plan.channels
    assert pruned.report.error == pytest.approx(expected.report.error, rel=1e-6)
    for name, value in expected.masked.items():
        torch.testing.assert_close(pruned.masked[name], value)


def test_a_forward_may_change_lists_and_dicts_among_its_inputs() -> None:
    given = nested(batches())
    pruned = lnr.prune(Nested().eval(), given, HALF)
    assert all(
        torch.equal(x, parts[0]["x"]) and len(parts) == 1 for x, parts in zip(batches(), given.data, strict=True)
    )
    assert pruned.report.error == pytest.approx(lnr.prune(Pure().eval(), batches(), HALF).report.error, rel=1e-6)


def test_no_verb_writes_into_the_batches(tmp_path: Path) -> None:
    model, (x, *rest) = InPlace().eval(), batches()
    lnr.inspect(model, x)
    lnr.sweep(model, [x, *rest], [HALF])
    pruned = lnr.prune(model, [x, *rest], HALF)
    pruned.save(tmp_path / "m.safetensors")
    lnr.load(tmp_path / "m.safetensors", model, example=x)
    lnr.apply_plan(pruned.plan, model, example=x)
    assert all(map(torch.equal, [x, *rest], batches()))


class Stateful(nn.Module):
    """Counts its calls and averages its outputs, in evaluation mode too, and replaces a third buffer."""

    calls: Tensor
    mean: Tensor
    net: Any

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x) - self.mean
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * y.detach().mean(0))
        self.last = y.detach().mean(0)
        return y


def test_buffers_that_a_forward_changes_are_put_back(tmp_path: Path) -> None:
    model, data = Stateful().eval(), batches()
    before = Untouched(model, tmp_path)
    lnr.inspect(model, data[0])
    before.check()
    pruned = lnr.prune(model, data, HALF)
    before.check()
    lnr.sweep(model, data, [HALF])
    lnr.apply_plan(pruned.plan, model, example=data[0])
    lnr.prune(model, data, HALF, into="graph")
    before.check()
    for changed in (model, pruned.model):
        assert int(changed.get_buffer("calls")) == 0
        assert not changed.get_buffer("mean").any()


def test_a_prune_in_inference_mode_gives_a_model_that_trains() -> None:
    with torch.inference_mode():
        pruned = lnr.prune(mlp(), batches(), HALF)
    pruned.model(batches()[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.model.parameters())


@pytest.mark.parametrize("into", ["copy", "model", "graph"])
def test_models_and_batches_made_in_inference_mode(into: str) -> None:
    with torch.inference_mode():
        model, data = mlp(), [x * 1 for x in batches()]
    before = Untouched(model, NOWHERE)
    found = lnr.inspect(model, data[0])
    before.check()
    pruned = lnr.prune(model, data, HALF, into=into)
    assert [group.name for group in found.groups] == list(pruned.plan.channels)
    assert pruned.report.params_after == lnr.prune(mlp(), batches(), HALF).report.params_after
    if into == "copy":
        before.check()


class Positions(nn.Module):
    """Makes a tensor of its own."""

    net: Any

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + torch.arange(8, device=x.device))


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.device("meta"),
        torch.no_grad,
        torch.enable_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
)
def test_contexts_around_a_prune(context: Callable[[], Any], tmp_path: Path) -> None:
    model, data = Positions().eval(), batches()
    expected = lnr.prune(model, data, HALF).report.params_after
    with context():
        assert lnr.inspect(model, data[0]).groups
        pruned = lnr.prune(model, data, HALF)
        pruned.save(tmp_path / "m.safetensors")
        lnr.load(tmp_path / "m.safetensors", model, example=data[0])
        assert lnr.prune(model, data, BUDGET).plan
    assert pruned.report.params_after == expected
    assert {tensor.device.type for tensor in pruned.model.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_default_device_and_dtype(device: str) -> None:
    model, data = Positions().eval(), batches()
    expected = lnr.prune(model, data, HALF)
    torch.set_default_device(device)
    torch.set_default_dtype(torch.float64)
    try:
        pruned = lnr.prune(model, data, HALF)
        assert str(torch.get_default_device()) == device
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert pruned.plan == expected.plan
    assert {parameter.dtype for parameter in pruned.model.parameters()} == {torch.float32}


def test_scales_beyond_the_range_of_float32() -> None:
    model = mlp().double()
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.mul_(1e30)
    assert lnr.prune(model, [x.double() for x in batches()], HALF).plan


class Masked(nn.Module):
    """Scores, some of which are masked, and an output of NaN."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.net, self.value = mlp(), value
        self.register_buffer("mask", torch.tensor([False, False, False, True]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x).masked_fill(self.mask, self.value), x.new_full((len(x),), float("nan"))


@pytest.mark.parametrize("into", ["copy", "graph"])
@pytest.mark.parametrize("value", [float("-inf"), float("nan"), -1e9])
def test_masked_outputs_do_not_hinder(value: float, into: str) -> None:
    pruned = lnr.prune(Masked(value).eval(), batches(), HALF, into=into)
    plain = lnr.prune(Masked(0.0).eval(), batches(), HALF)
    assert pruned.report.params_after == plain.report.params_after
    assert 0 < pruned.report.error < 1
    if value != -1e9:  # what is masked counts nowhere, neither in the error nor in its scale
        assert pruned.report.error == pytest.approx(plain.report.error, rel=1e-4)


def test_prunes_in_several_threads_wait_for_each_other() -> None:
    data, results = batches(), list[int]()
    alone = lnr.prune(mlp(), data, HALF).report.params_after
    before = Untouched(mlp(), NOWHERE)
    filters = list(warnings.filters)

    def go() -> None:
        results.append(lnr.prune(mlp(), data, HALF).report.params_after)
        results.append(lnr.prune(mlp(), data, HALF, into="graph").report.params_after)
        lnr.inspect(mlp(), data[0])

    threads = [threading.Thread(target=go) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [alone] * 4
    assert list(warnings.filters) == filters
    before.check()
    assert lnr.prune(mlp(), data, HALF).report.params_after == alone


@contextmanager
def served(model: nn.Module, x: Tensor) -> Iterator[list[object]]:
    """Another thread runs the model again and again; gives a list of its outputs and errors."""
    stop, seen = threading.Event(), list[object]()

    def serve() -> None:
        while not stop.is_set():
            try:
                with torch.no_grad():
                    seen.append(model(x))
            except Exception as error:
                seen.append(error)
            time.sleep(1e-3)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def test_another_model_may_run_meanwhile() -> None:
    other, x = mlp(), batches()[0]
    with served(other, x) as seen:
        lnr.prune(Stateful().eval(), batches(), HALF)
    assert seen
    assert all(isinstance(y, Tensor) and torch.equal(y, other(x)) for y in seen)


def test_the_same_model_may_not_but_is_as_before_afterwards() -> None:
    model, data, filters = mlp(), batches(), list(warnings.filters)
    before, expected = Untouched(model, NOWHERE), model(data[0])
    with served(model, data[0]), suppress(lnr.LnrPruneError):
        lnr.prune(model, data, HALF)
    before.check()
    assert list(warnings.filters) == filters
    assert torch.equal(model(data[0]), expected)
    assert lnr.prune(model, data, HALF).plan == lnr.prune(mlp(), data, HALF).plan


class Counting(nn.Sequential):
    """A small network that counts its calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return result


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that interrupts")
def test_an_interrupt_at_any_instant_leaves_nothing_behind() -> None:
    """`LNR_PRUNE_INTERRUPTS=200` for more draws."""
    model, data, refit = Counting().train(), batches(), lnr.Refit(window=2, iterations=2)
    lnr.prune(model, data, HALF, refit=refit)
    begin = time.perf_counter()
    expected = lnr.prune(model, data, HALF, refit=refit).report.params_after
    seconds = time.perf_counter() - begin
    names = [thread.name for thread in threading.enumerate()]
    before, filters, drawn = Untouched(model, NOWHERE), list(warnings.filters), random.Random(0)
    handlers = [signal.getsignal(kind) for kind in (signal.SIGALRM, signal.SIGINT)]
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupted = 0
    try:
        for _ in range(DRAWS):
            try:
                signal.setitimer(signal.ITIMER_REAL, drawn.uniform(1e-3, seconds))
                lnr.prune(model, data, HALF, refit=refit)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for thread in threading.enumerate():
                if thread is not threading.main_thread() and thread.name not in names:
                    thread.join(5)  # it ends by itself
            before.check()
            assert list(warnings.filters) == filters
            assert all(map(torch.equal, data, batches()))
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for kind, handler in zip((signal.SIGALRM, signal.SIGINT), handlers, strict=True):
            signal.signal(kind, handler)
    assert interrupted
    assert lnr.prune(model, data, HALF, refit=refit).report.params_after == expected
