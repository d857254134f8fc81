"""What a sweep found: the cost of every pruned model against its value."""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from lnr_prune.report.chart import LABELS, chart
from lnr_prune.report.html import document, embedded, render
from lnr_prune.report.plots import figure_of, new_figure
from lnr_prune.report.report import Report, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class SweepPoint:
    """One pruned model.

    Attributes:
        amount: The amount that was asked for, in words.
        model: The pruned model; retrained, if the sweep retrains.
        report: What was done to every group.
        value: Value of the pruned model before any retraining.
        retrained: Its value after retraining; None without retraining.
    """

    amount: str
    model: nn.Module
    report: Report
    value: float
    retrained: float | None = None

    @property
    def final(self) -> float:
        """The value of `model`: after retraining, if there was any."""
        return self.value if self.retrained is None else self.retrained

    def share(self, cost: str) -> float:
        """What is left of "params", "macs", "size" or "latency", as a fraction of the original's."""
        before, after = (getattr(self.report, f"{cost}_{when}") for when in ("before", "after"))
        return float(after / before) if before else 1.0


@dataclass(frozen=True, eq=False)
class Sweep:
    """What `sweep` returns.

    Attributes:
        points: One per budget, in the order of the budgets.
        measure: What the values measure.
        maximize: Whether larger values are better.
        cost: The cost that is compared: "params", "macs", "size" or "latency".
        dense: The original model's value.
        title: What it is called on a page.
    """

    points: tuple[SweepPoint, ...]
    measure: str
    maximize: bool
    cost: str
    dense: float
    title: str = "Sweep"

    @property
    def pareto(self) -> tuple[SweepPoint, ...]:
        """The points that no other one beats: no other is as cheap and better, or as good and cheaper.

        The cheapest comes first. Of equal points, only the first is included.
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
        axes = axes or new_figure(6.0, 4.0).subplots()
        points = sorted(self.points, key=lambda point: point.share(self.cost))
        best = set(map(id, self.pareto))
        shares = [100 * point.share(self.cost) for point in points]
        curves = {"as pruned": [point.value for point in points]}
        if any(point.retrained is not None for point in points):
            curves["retrained"] = [point.final for point in points]
        for name, values in curves.items():
            axes.plot(shares, values, marker="o", markerfacecolor="none", label=name)
        on = [(share, point.final) for share, point in zip(shares, points, strict=True) if id(point) in best]
        axes.plot(*zip(*on, strict=True), "o", color=f"C{len(curves) - 1}")
        if self.dense is not None:
            axes.axhline(self.dense, color="grey", linestyle=":", label="original")
        axes.set(xlabel=f"{LABELS[self.cost]} (%)", ylabel=self.measure)
        axes.grid(alpha=0.3)
        axes.legend()
        return figure_of(axes)

    def to_dict(self) -> dict[str, Any]:
        """Everything except the models as plain data, for JSON."""
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

    def to_html(self, path: str | Path | None = None, *, title: str | None = None, command: str = "") -> str:
        """The frontier, and the report of every point, as one web page that needs nothing else.

        Args:
            path: File to write it to; None = write nothing.
            title: Title of the page; None = that of the sweep.
            command: The command that made it, which is then shown, too.

        Returns:
            The page.

        Raises:
            OSError: If the file cannot be written; one that was there stays as it was.
        """
        reports = [point.report.section(point.amount) for point in self.points]
        versions = next((point.report.versions for point in self.points), {})
        return written(
            document(title or self.title, self.section(title), *reports, made_by={"command": command, **versions}), path
        )

    def section(self, title: str | None = None) -> str:
        """The frontier, as a part of a web page."""
        retrained = any(point.retrained is not None for point in self.points)
        curves = {"as pruned": [(point.share(self.cost), point.value) for point in self.points]}
        if retrained:
            curves["retrained"] = [(point.share(self.cost), point.final) for point in self.points]
        drawn = chart(curves, LABELS[self.cost], self.measure, self.dense)
        return render("sweep.html", sweep=self, title=title or self.title, chart=drawn, retrained=retrained)

    def _repr_html_(self) -> str:
        return embedded(self.section())

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
