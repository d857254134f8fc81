"""The Pareto frontier: what a model costs against what it is worth, at several budgets."""

import inspect
import io
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lnr_prune import page, plots
from lnr_prune.allocation import Budget
from lnr_prune.amount import check_amounts
from lnr_prune.calibration import calibrate
from lnr_prune.chart import LABELS
from lnr_prune.curves import check_logits, divergence, outputs, some
from lnr_prune.prune import prune
from lnr_prune.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Amounts = Budget | Mapping[str, Any]
AMOUNTS = ("keep", "lam", "lam_ratio", "budget")


@dataclass(frozen=True, eq=False)
class SweepPoint:
    """One pruned model.

    Attributes:
        amount: What was asked for, in words.
        model: The pruned model; retrained, if the sweep retrains.
        report: What was done to every group.
        value: What the pruned model is worth before any retraining.
        retrained: The same afterwards; None without retraining.
    """

    amount: str
    model: nn.Module
    report: Report
    value: float
    retrained: float | None = None

    @property
    def final(self) -> float:
        """The value of `model`: retrained if it was."""
        return self.value if self.retrained is None else self.retrained

    def share(self, cost: str) -> float:
        """What is left of "params", "macs", "size" or "latency", as a fraction of the original's."""
        before, after = (getattr(self.report, f"{cost}_{when}") for when in ("before", "after"))
        return float(after / before) if before else 1.0


@dataclass(frozen=True, eq=False)
class Sweep:
    """What `sweep` returns.

    Attributes:
        points: One a budget, in their order.
        measure: What a value is.
        maximize: Whether larger values are better.
        cost: The cost that counts: "params", "macs", "size" or "latency".
        dense: The original model's value.
    """

    points: tuple[SweepPoint, ...]
    measure: str
    maximize: bool
    cost: str
    dense: float

    @property
    def pareto(self) -> tuple[SweepPoint, ...]:
        """The points that no other one beats: none is as cheap and better, or as good and cheaper.

        Cheapest first; of equal points the first.
        """
        sign = -1.0 if self.maximize else 1.0
        best, least = [], math.inf
        known = [point for point in self.points if not math.isnan(point.final)]
        for point in sorted(known, key=lambda point: (point.share(self.cost), sign * point.final)):
            if sign * point.final < least:
                best.append(point)
                least = sign * point.final
        return tuple(best)

    def plot(self, axes: "Axes | None" = None) -> "Figure":
        """Value against cost as a matplotlib figure, or drawn into ``axes``; points on the frontier are filled.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        return plots.frontier(self, axes)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the models as plain data, for JSON."""
        best = set(map(id, self.pareto))
        points = [
            {
                "amount": point.amount,
                "value": point.value,
                "retrained": point.retrained,
                "pareto": id(point) in best,
                "report": point.report.to_dict(),
            }
            for point in self.points
        ]
        settings = {"measure": self.measure, "maximize": self.maximize, "cost": self.cost, "dense": self.dense}
        return {**settings, "points": points}

    def _repr_html_(self) -> str:
        return page.embedded(page.sweep(self))

    def __rich__(self) -> Table:
        retrained = any(point.retrained is not None for point in self.points)
        table = Table(title="sweep", caption=f"{self.measure} of the original model: {self.dense:.4g}")
        table.add_column("asked for")
        for column in ("parameters", "MACs", self.measure, *(["retrained"] if retrained else [])):
            table.add_column(column, justify="right")
        table.add_column("frontier")
        best = set(map(id, self.pareto))
        for point in self.points:
            values = [point.value, *([] if point.retrained is None else [point.retrained])]
            shares = (f"{point.share('params'):.2%}", f"{point.share('macs'):.2%}")
            mark = "yes" if id(point) in best else ""
            table.add_row(Text(point.amount), *shares, *(f"{value:.4g}" for value in values), mark)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()


def sweep(
    model: nn.Module,
    calibration: Any,
    budgets: Iterable[Amounts],
    *,
    retrain: Callable[[nn.Module], nn.Module | None] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    maximize: bool = True,
    cost: str = "params",
    seed: int = 0,
    **options: Any,
) -> Sweep:
    """Prunes a model once for every budget, and finds the budgets that are worth their cost.

    Args:
        model: A trained model; it is left as it is.
        calibration: Unlabelled inputs, as for `prune`.
        budgets: For every point a `Budget`, or a mapping with one of prune's other amounts: ``{"keep": 0.5}``.
        retrain: Trains a pruned model in place, or returns a trained one. Torch's global generator starts from
            ``seed`` for every point, and is as before when the sweep ends.
        evaluate: What a model is worth, such as its accuracy. Default: the error of its outputs,
            ``E||f(x) - f'(x)||^2 / E||f(x) - E f(x)||^2`` on some of the calibration data, of which less is better;
            with ``logits=True`` by divergences of the probabilities, as in the reports.
        maximize: Whether larger values of ``evaluate`` are better.
        cost: What is to be small: "params", "macs", "size" or "latency" (roughly measured).
        seed: As for `prune`, and for ``retrain``.
        options: Further arguments of `prune`, the same for every point, but that each has a folder of its own in
            ``work``.

    Returns:
        The `Sweep`: print it, or `Sweep.plot` it.

    Raises:
        ValueError: If there is no budget, cost is unknown, or inplace is asked for.
        LnrPruneError: What `prune` raises.

    Example:
        >>> import torch, lnr_prune as lnr
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> swept = lnr.sweep(model, [torch.randn(256, 8)], [{"keep": 24}, {"keep": 16}, {"keep": 8}])
        >>> [point.amount for point in swept.pareto]
        ['keep=8', 'keep=16', 'keep=24']
    """
    asked = _checked(budgets, options)
    if cost not in LABELS:
        raise ValueError(f"unknown cost {cost!r}; known costs: {', '.join(LABELS)}")
    if options.get("inplace"):
        raise ValueError("a sweep prunes the original model again and again: it cannot be had with inplace=True")
    for name, function in (("retrain", retrain), ("evaluate", evaluate)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function of a model, got {function!r}")
    data = calibrate(model, calibration, options.get("inputs"))
    options = {**options, "seed": seed}
    if evaluate is None:
        calls, logits = some(data), bool(options.get("logits"))
        if logits:
            check_logits(model, calls[0])
        original = [outputs(model, call) for call in calls]
        maximize, measure = False, "error of the outputs"

        def value(of: nn.Module) -> float:
            return divergence(original, [outputs(of, call) for call in calls], logits)
    else:
        measure, given = getattr(evaluate, "__name__", "value").strip("<>"), evaluate

        def value(of: nn.Module) -> float:
            result = given(of)
            if isinstance(result, Tensor):
                result = result.item()
            if not isinstance(result, numbers.Real):
                raise TypeError(f"evaluate must return a number, got {result!r}")
            return float(result)

    dense, points = value(model), []
    for number, budget in enumerate(asked):
        own = {"work": os.path.join(options["work"], str(number))} if options.get("work") is not None else {}
        pruned = prune(model, data.batches, **_settings(budget), **{**options, **own})
        point = SweepPoint(_words(budget), pruned.model, pruned.report, value(pruned.model))
        points.append(point if retrain is None else _retrained(point, retrain, value, seed))
    return Sweep(tuple(points), measure, maximize, cost, dense)


def _checked(budgets: Iterable[Amounts], options: Mapping[str, Any]) -> list[Amounts]:
    """The budgets, each of which `prune` could be asked for."""
    one = isinstance(budgets, Budget | Mapping | str)
    if one or not isinstance(budgets, Iterable):
        raise TypeError(f"budgets must be a list of budgets, one for every point, got {budgets!r}; wrap it in a list")
    asked = list(budgets)
    if not asked:
        raise ValueError("a sweep needs at least one budget, got none")
    for point in asked:
        if not isinstance(point, Budget | Mapping):
            raise TypeError(f"a point of a sweep is a Budget or a mapping such as {{'keep': 0.5}}, got {point!r}")
        settings = {**options, **_settings(point)}
        inspect.signature(prune).bind(None, None, **settings)  # TypeError: it names what is unknown
        amounts = {name: settings.get(name) for name in AMOUNTS}
        check_amounts(**amounts, selector=settings.get("selector", "group_lasso"))
    return asked


def _settings(point: Amounts) -> dict[str, Any]:
    """The arguments of prune that a point stands for."""
    return {"budget": point} if isinstance(point, Budget) else dict(point)


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


def _words(budget: Amounts) -> str:
    """The settings that are not their defaults."""
    if isinstance(budget, Budget):
        given = {field.name: getattr(budget, field.name) for field in fields(budget)}
        budget = {field.name: given[field.name] for field in fields(budget) if given[field.name] != field.default}
    return ", ".join(f"{name}={value}" for name, value in budget.items())
