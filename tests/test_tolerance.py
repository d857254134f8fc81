"""A tolerance: the smallest model that was measured to be within it, by the user's own metric, and nothing touched."""

import logging
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lnr_prune as lnr
from lnr_prune.calibration.calls import samples_in
from lnr_prune.calibration.data import Calibration, calibrate, each_half, first_of_each_half
from lnr_prune.collapse.files import report_of
from lnr_prune.refit.network import refit_network
from lnr_prune.report.report import Report
from lnr_prune.report.walk import Walk, WalkStep
from lnr_prune.selection.costs import cost
from tests.helpers.untouched import Untouched

FAST = lnr.Effort(refits=0)


def problem() -> tuple[nn.Sequential, list[Tensor], Tensor]:
    """Three classes, in a network with channels to spare; batches, and other samples."""
    torch.manual_seed(0)
    first, second = nn.Linear(6, 14), nn.Linear(14, 10)
    with torch.no_grad():
        first.weight[5:] = first.weight[:5].repeat(2, 1)[:9] + 0.05 * torch.randn(9, 6)
        second.weight[4:] *= 0.1
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(10, 3)).eval()
    return net, list(torch.randn(6, 32, 6)), torch.randn(200, 6)


def walked(pruned: lnr.Pruned) -> Walk:
    assert pruned.report.walk is not None
    return pruned.report.walk


@pytest.mark.parametrize(("into", "of"), [("copy", "macs"), ("model", "params"), ("graph", "size")])
def test_the_model_that_is_returned_is_the_smallest_that_was_measured_within(into: str, of: str) -> None:
    net, data, test = problem()
    classes, given = net(test).argmax(1), []

    def same(model: nn.Module) -> float:
        given.append(cost.parameters(model))
        return float((model(test).argmax(1) == classes).double().mean())

    pruned = lnr.prune(net, data, lnr.Tolerance(same, drop=0.01, of=of, effort=FAST), selector="norm", into=into)
    walk = walked(pruned)
    within = [step for step in walk.steps if step.value >= 0.99]
    assert within == [step for step in walk.steps if step.within]
    assert len(within) < len(walk.steps) <= 8
    kept = min(within, key=lambda step: step.share)
    assert walk.kept == kept
    assert same(pruned.model) == kept.value
    report = pruned.report
    assert kept.share == pytest.approx(getattr(report, f"{of}_after") / getattr(report, f"{of}_before"))
    assert given[0] == report.params_before  # the original comes first; then pruned ones
    assert given[1 + walk.steps.index(kept)] == report.params_after
    assert (walk.cost, walk.measure, walk.original, walk.drop) == (of, "same", 1.0, 0.01)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([9, 9, 9, 9], 3),  # all within: smaller and smaller
        ([9, 1, 9, 1], 2),  # as a bisection goes
        ([9, 1, 1, 1], 0),
        ([1, 1, 9, 1], 2),
        ([float("nan"), 9, 1, 9], 3),
    ],
)
def test_a_metric_may_go_up_and_down(values: list[float], kept: int) -> None:
    net, data, _ = problem()
    answers = iter([10, *values])

    def metric(model: nn.Module) -> float:
        return next(answers)

    pruned = lnr.prune(net, data, lnr.Tolerance(metric, drop=1, evaluations=4, effort=FAST), selector="norm")
    steps = walked(pruned).steps
    assert [step.value for step in steps] == pytest.approx(values, nan_ok=True)
    assert walked(pruned).kept is steps[kept]
    assert steps[kept].share == min(step.share for step in steps if step.within)


def test_a_drop_that_is_just_allowed_is_allowed() -> None:
    assert lnr.Tolerance(drop=0.01).allows(0.91, 0.92)
    assert not lnr.Tolerance(drop=0.01).allows(0.9099, 0.92)


def test_where_nothing_fits_the_model_stays_whole(caplog: pytest.LogCaptureFixture) -> None:
    net, data, test = problem()
    answers = iter(range(100))

    def worse(model: nn.Module) -> float:
        return -next(answers)

    with caplog.at_level(logging.WARNING, logger="lnr_prune"):
        pruned = lnr.prune(net, data, lnr.Tolerance(worse, drop=0.5, evaluations=3, effort=FAST), selector="norm")
    assert "no smaller model that was tried is within the tolerance, so the model stays whole: worse at" in caplog.text
    assert walked(pruned).kept is None
    assert len(walked(pruned).steps) == 3
    assert pruned.report.params_after == pruned.report.params_before
    torch.testing.assert_close(pruned.model(test), net(test))


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (float("nan"), ValueError, "evaluate returned nan for the original model"),
        ("good", TypeError, "evaluate must return a number, got 'good'"),
        (torch.ones(2), TypeError, r"evaluate must return a number, got tensor\("),
    ],
)
def test_the_original_is_judged_before_anything_is_measured(
    answer: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, data, _ = problem()
    monkeypatch.setattr(sys.modules["lnr_prune.prune"], "read_in_passes", None)
    with pytest.raises(error, match=message):
        lnr.prune(net, data, lnr.Tolerance(lambda model: answer))


def test_numbers_of_any_kind() -> None:
    net, data, _ = problem()
    answers: Iterator[Any] = iter([torch.tensor([2.0]), True, 2])
    amount = lnr.Tolerance(lambda model: next(answers), drop=0.5, evaluations=2, effort=FAST)
    walk = walked(lnr.prune(net, data, amount, selector="norm"))
    assert (walk.original, [step.value for step in walk.steps]) == (2.0, [1.0, 2.0])
    assert walk.measure == "lambda"


def spoiling(fail: Callable[[], Any]) -> Callable[[nn.Module], float]:
    """A metric that spoils the models it is given, and draws random numbers; it fails at its third model."""
    calls = []

    def evaluate(model: nn.Module) -> float:
        model.train()
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.mul_(7).add_(torch.randn(()).to(tensor))
        model.double()
        setattr(model, "spoilt", True)  # noqa: B010  (mypy takes no assignment)
        calls.append(float(torch.rand(())))
        if len(calls) == 3:
            fail()
        assert len(set(calls)) == 1, "all models see the same random numbers"
        return 1.0

    return evaluate


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fail", [lambda: None, lambda: 1 / 0, interrupted])
@pytest.mark.parametrize("into", ["copy", "model"])
def test_the_model_is_not_touched(fail: Callable[[], Any], into: str, tmp_path: Path) -> None:
    first, data, _ = problem()
    net = nn.Sequential(nn.BatchNorm1d(6), *first)
    amount = lnr.Tolerance(spoiling(fail), evaluations=3, effort=FAST)
    before = Untouched(net, tmp_path)
    error = None
    try:
        pruned = lnr.prune(net, data, amount, selector="norm", into=into)
    except (ZeroDivisionError, KeyboardInterrupt) as raised:
        error = raised.with_traceback(None)
    if into == "copy" or error is not None:
        before.check()
    if error is None:
        assert not hasattr(pruned.model, "spoilt")
        assert next(pruned.model.parameters()).dtype == torch.float32
        assert random.getstate() == before.before["Python's random numbers"]


def test_a_model_that_has_no_copies_is_judged_without_them() -> None:
    class Stubborn(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("there is only one")

    first, data, _ = problem()
    net = Stubborn(*first)
    with pytest.raises(lnr.GraphError, match=r"Stubborn cannot be copied \(there is only one\): leave evaluate out"):
        lnr.prune(net, data, lnr.Tolerance(lambda model: 1.0, effort=FAST), into="model")
    assert walked(lnr.prune(net, data, lnr.Tolerance(drop=0.2, evaluations=2, effort=FAST), into="model")).steps


def test_without_a_metric_it_is_agreement_on_samples_that_were_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data, _ = problem()
    fitted = list[list[Tensor]]()
    real = refit_network

    def refit(model: nn.Module, graph: Any, supports: Any, calls: Any, **options: Any) -> Any:
        done = real(model, graph, supports, calls, **options)
        if isinstance(calls, Calibration):  # no trial
            fitted.append([args[0] for args, _ in calls])
            weights.append(done.weights)
        return done

    weights = list[Any]()
    monkeypatch.setattr("lnr_prune.selection.trials.refit_network", refit)
    walk = walked(lnr.prune(net, data, lnr.Tolerance(drop=0.1, evaluations=3, effort=FAST), selector="norm"))
    judging = torch.cat([args[0] for args, _ in each_half(calibrate(net, data))[1]])
    assert walk.measure == "agreement with the original"
    for calls, of, step in zip(fitted[:-1], weights[:-1], walk.steps, strict=True):  # the last one is the promise
        seen = torch.cat(calls)
        assert not (seen[:, None] == judging).all(2).any()
        assert len(seen) + len(judging) == sum(map(len, data))
        outputs = torch.func.functional_call(net, dict(of), judging)
        same = (outputs.argmax(1) == net(judging).argmax(1)).double().mean()
        assert step.value == pytest.approx(float(same))


def test_outputs_that_are_no_classes_are_compared_by_their_error() -> None:
    net, data, _ = problem()
    pruned = lnr.prune(net, data, lnr.Tolerance(drop=0.05, effort=FAST), selector="norm", logits=False)
    walk = walked(pruned)
    assert walk.measure == "1 - squared error of the outputs"
    assert walk.kept is not None
    assert 1 - pruned.report.error == pytest.approx(walk.kept.value, abs=0.02)


@pytest.mark.parametrize("sizes", [(32, 32, 32), (7, 1, 50), (1,)])
def test_the_halves_are_all_samples(sizes: tuple[int, ...]) -> None:
    net, _, _ = problem()
    data = calibrate(net, [torch.randn(size, 6) for size in sizes])
    parts, known = each_half(data), first_of_each_half(data, None)
    assert sum(part.samples for part in parts) == sum(sizes)
    for part, of_all in zip(parts, known, strict=True):
        assert sum(map(samples_in, part)) == sum(map(samples_in, of_all))
        for (one, _), (other, _) in zip(part, of_all, strict=True):
            assert torch.equal(one[0], other[0])


def test_what_is_left_alone_and_multiples_hold_on_the_walk() -> None:
    net, data, _ = problem()
    amount = lnr.Tolerance(lambda model: 1.0, grid=lnr.Grid(round_to=4, leave=("2",)), effort=FAST)
    pruned = lnr.prune(net, data, amount, selector="norm")
    assert [group.kept for group in pruned.report.groups] == [4, 10]
    with pytest.raises(ValueError, match="leave names every channel group"):
        lnr.prune(net, data, lnr.Tolerance(grid=lnr.Grid(leave=("0", "2"))))


def test_a_work_folder_remembers_what_was_measured(tmp_path: Path) -> None:
    net, data, _ = problem()
    broken = [False]

    def metric(model: nn.Module) -> float:
        if broken[0]:
            raise OSError("the test data is gone")
        return float(cost.parameters(model) > 120)

    amount, run = lnr.Tolerance(metric, evaluations=4, effort=FAST), lnr.Run(work=tmp_path / "work")
    first = lnr.prune(net, data, amount, selector="norm", run=run)
    broken[0] = True
    again = lnr.prune(net, data, amount, selector="norm", run=run)
    assert again.report == first.report
    assert all(torch.equal(first.masked[name], value) for name, value in again.masked.items())
    with pytest.raises(ValueError, match="belongs to another run"):
        lnr.prune(net, data, lnr.Tolerance(metric, evaluations=5, effort=FAST), selector="norm", run=run)


def test_the_walk_is_in_every_form_of_the_report(tmp_path: Path) -> None:
    net, data, _ = problem()
    pruned = lnr.prune(net, data, lnr.Tolerance(drop=0.1, evaluations=3, effort=FAST), selector="norm")
    report, walk = pruned.report, walked(pruned)
    assert "agreement with the original at the MACs left (original 1, allowed drop 0.1):" in str(report)
    assert report.to_html().count("<h2>Tolerance</h2>") == 1
    assert Report.from_dict(report.to_dict()) == report
    pruned.save(tmp_path / "m.safetensors")
    assert report_of(tmp_path / "m.safetensors").walk == walk
    point = lnr.sweep(net, data, [lnr.Tolerance(drop=0.1, evaluations=3, effort=FAST)]).points[0]
    assert point.report.walk == walk
    assert point.amount.startswith("drop=0.1, evaluations=3")


def test_a_walk_says_what_was_kept() -> None:
    steps = (WalkStep(0.5, 0.99, True), WalkStep(0.3, 0.9, False), WalkStep(0.4, 0.98, True))
    walk = Walk("params", "<b>", 1.0, 0.02, steps)
    assert "50\N{NO-BREAK SPACE}% 0.99 within; 30\N{NO-BREAK SPACE}% 0.9 below; 40\N{NO-BREAK SPACE}% 0.98 kept" in str(
        walk
    )
    report = Report((), (), 0.0, {}, 1, 1, 1, 1, walk=walk)
    assert "whose &lt;b&gt; is at least" in " ".join(report.to_html().split())


def test_a_tolerance_is_walked_with_other_settings_of_a_prune() -> None:
    net, data, _ = problem()
    options: Iterator[dict[str, Any]] = iter(
        [{"refit": None}, {"selector": "random", "refit": lnr.Refit(window=2, iterations=2)}, {"logits": True}]
    )
    for given in options:
        walk = walked(lnr.prune(net, data, lnr.Tolerance(drop=0.3, evaluations=2, effort=FAST), **given))
        assert len(walk.steps) == 2


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"evaluate": 0.01}, TypeError, r"evaluate must be a function of a model, got 0.01; without one, write"),
        ({"drop": -1}, ValueError, "drop must be >= 0 and finite, got -1"),
        ({"drop": "little"}, TypeError, "drop must be a number"),
        ({"of": "latency"}, ValueError, "unknown cost 'latency'; known: macs, params, size"),
        ({"evaluations": 0}, ValueError, "evaluations must be at least 1, got 0"),
        ({"grid": 8}, TypeError, r"such as Grid\(round_to=8\), got 8"),
        ({"effort": 3}, TypeError, r"such as Effort\(samples=512\), got 3"),
        ({"uniform": "yes"}, TypeError, "uniform must be True or False"),
    ],
)
def test_tolerances_check_themselves(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lnr.Tolerance(**values)


def test_a_search_needs_a_refit() -> None:
    net, data, _ = problem()
    with pytest.raises(ValueError, match="cannot be combined with refit=None"):
        lnr.prune(net, data, lnr.Tolerance(effort=lnr.Effort(search=2)), refit=None)
