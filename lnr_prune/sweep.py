"""The Pareto frontier: what a model costs against what it is worth, at several budgets."""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune.calibration.data import Batches, calibrate, first_samples
from lnr_prune.calibration.divergence import check_logits, divergence, outputs
from lnr_prune.graph.module import plain
from lnr_prune.graph.modules.guard import guarded
from lnr_prune.prune import prune
from lnr_prune.report.chart import LABELS
from lnr_prune.report.frontier import Sweep, SweepPoint
from lnr_prune.runtime.checks import check_flags, check_seed, nearest
from lnr_prune.runtime.run import Run, check_run
from lnr_prune.selection.amount import Keep
from lnr_prune.selection.budget import Effort, Grid
from lnr_prune.settings import Amount, Settings
from lnr_prune.tolerance import worth


def sweep(
    model: nn.Module,
    data: Any,
    amounts: Iterable[Amount],
    *,
    retrain: Callable[[nn.Module], nn.Module | None] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    maximize: bool = True,
    cost: str = "params",
    seed: int = 0,
    run: Run = Run(),
    **options: Any,
) -> Sweep:
    """Prunes a model once for every amount, and finds the amounts that are worth their cost.

    Args:
        model: A trained model; it is left as it is.
        data: Unlabelled calibration inputs, as for `prune`.
        amounts: For every point a `Keep`, a `Penalty`, a `Budget` or a `Tolerance`.
        retrain: Trains a pruned model in place, or returns a trained one. Torch's global random generator is seeded
            with ``seed`` for every point, and restored afterwards.
        evaluate: Says what a model is worth, such as its accuracy. Default: the error of its outputs,
            ``E||f(x) - f'(x)||^2 / E||f(x) - E f(x)||^2``, on some of the calibration data, where less is better.
            With ``logits=True``, divergences of the probabilities are measured instead, as in the reports.
        maximize: Whether larger values of ``evaluate`` are better.
        cost: The cost to compare: "params", "macs", "size" or "latency" (roughly measured).
        seed: The seed for ``retrain``.
        run: As for `prune`, except that each point has its own folder in ``run.work``.
        options: Further arguments of `prune`, the same for every point.

    Returns:
        The `Sweep`: print it, or `Sweep.plot` it.

    Raises:
        ValueError, TypeError: If there is no amount, an argument is out of range or unknown, or ``into="model"`` is
            asked for.
        LnrPruneError: As `prune` raises it.

    Example:
        >>> import torch, lnr_prune as lnr
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> swept = lnr.sweep(model, [torch.randn(256, 8)], [lnr.Keep(24), lnr.Keep(16), lnr.Keep(8)])
        >>> [point.amount for point in swept.pareto]
        ['Keep(8)', 'Keep(16)', 'Keep(24)']
    """
    asked = _checked(amounts, options)
    check_flags(maximize=maximize)
    check_seed(seed)
    check_run(run)
    if cost not in LABELS:
        raise ValueError(f"unknown cost {cost!r}; {nearest(cost, LABELS)}")
    for name, function in (("retrain", retrain), ("evaluate", evaluate)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function of a model, got {function!r}")
    with plain(model) as module:
        calibration = calibrate(module, data)
    if evaluate is None:
        with guarded(model), plain(model) as module:
            calls = first_samples(calibration)
            logits = check_logits(module, calls[0], options.get("logits"))
        maximize, measure = False, "error of the outputs"

        def rows_of(net: nn.Module) -> Iterator[Tensor]:
            return (outputs(net, call, None, logits, calibration.counts) for call in calls)

        def value(of: nn.Module) -> float:
            with guarded(model), plain(model) as whole, guarded(of), plain(of) as module:
                return divergence(rows_of(whole), rows_of(module), logits)
    else:
        measure, given = getattr(evaluate, "__name__", "value").strip("<>"), evaluate

        def value(of: nn.Module) -> float:
            return worth(given, of)

    again = replace(data, data=calibration.batches) if isinstance(data, Batches) else calibration.batches
    dense, points = value(model), []
    for number, amount in enumerate(asked):
        work = None if run.work is None else os.path.join(run.work, str(number))
        pruned = prune(model, again, amount, run=replace(run, work=work), **options)
        point = SweepPoint(_words(amount), pruned.model, pruned.report, value(pruned.model))
        points.append(point if retrain is None else _retrained(point, retrain, value, seed))
    return Sweep(tuple(points), measure, maximize, cost, dense)


def _checked(amounts: Iterable[Amount], options: Mapping[str, Any]) -> list[Amount]:
    """The amounts, once it is known that `prune` takes each of them."""
    one = isinstance(amounts, Amount | Mapping | str)
    if one or not isinstance(amounts, Iterable):
        raise TypeError(f"amounts must be a list of amounts, one for every point, got {amounts!r}; wrap it in a list")
    asked = list(amounts)
    if not asked:
        raise ValueError("a sweep needs at least one amount, got none")
    for amount in asked:
        given = inspect.signature(prune).bind(None, None, amount, **options)  # its TypeError names what is unknown
        given.apply_defaults()
        settings = {name: given.arguments[name] for name in ("selector", "refit", "bias", "logits", "into")}
        Settings.of(amount, **settings)
        if given.arguments["into"] == "model":
            raise ValueError(
                "a sweep prunes the original model again and again: it cannot be combined with into='model'; "
                "use into='copy' or into='graph'"
            )
    return asked


def _retrained(
    point: SweepPoint,
    retrain: Callable[[nn.Module], nn.Module | None],
    value: Callable[[nn.Module], float],
    seed: int,
) -> SweepPoint:
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        returned = retrain(point.model)
    if returned is not None and not isinstance(returned, nn.Module):
        raise TypeError(f"retrain must return a model, or None after training in place, got {type(returned).__name__}")
    model = point.model if returned is None else returned
    return SweepPoint(point.amount, model, point.report, point.value, value(model))


def _words(settings: Amount | Grid | Effort) -> str:
    """The settings that are not their defaults."""
    if isinstance(settings, Keep):
        return f"Keep({settings.channels})"
    given = [(field, getattr(settings, field.name)) for field in fields(settings)]
    return ", ".join(
        _words(value) if isinstance(value, Grid | Effort) else f"{field.name}={getattr(value, '__name__', value)}"
        for field, value in given
        if value != field.default
    )
