"""What a prune did, group by group."""

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lnr_prune import page, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lnr_prune.sweep import Sweep


@dataclass(frozen=True)
class GroupReport:
    """One channel group.

    Attributes:
        name: Name of the group, that of a producer.
        producers: Layers whose rows or filters were removed.
        consumers: Layers that were refitted.
        size: Channels before.
        kept: Channels after.
        error: ``E||y - M x||^2 / E||y||^2`` of the consumers on the calibration data, in tandem behind their
            activation; None if left whole.
        predicted: What the budget expected the group to cost: relative squared error of the network's
            outputs; None without a budget.
        before_refit: ``error`` of the selector's own coefficients, on the original network's inputs; None if
            left whole.
        lam: Penalty of the group lasso; None if another selector chose.
        gap: Relative duality gap of its solve; None likewise.
        note: What to know, "" if nothing.
    """

    name: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    size: int
    kept: int
    error: float | None = None
    lam: float | None = None
    gap: float | None = None
    predicted: float | None = None
    before_refit: float | None = None
    note: str = ""


@dataclass(frozen=True)
class LayerReport:
    """One layer that was refitted.

    Attributes:
        name: Name of the layer.
        error: ``E||y - M x||^2 / E||y||^2`` on the calibration data, x in the pruned network, y in the original; in
            tandem behind the activation, and of the first of two layers as it was before.
        ridge: Ridge of the refit, as a fraction of the inputs' mean second moment.
        samples: Rows that it was fitted to; should be at least twice as many as the columns.
        columns: Columns of its matrix that were fitted.
    """

    name: str
    error: float
    ridge: float
    samples: int
    columns: int


@dataclass(frozen=True)
class Report:
    """Every group, what was frozen, and the model before and after.

    Attributes:
        groups: One row a channel group, in order of execution.
        layers: One row a refitted layer, in order of execution.
        error: ``E||f(x) - f'(x)||^2 / E||f(x) - E f(x)||^2`` of the network's outputs, measured on some of the
            calibration data.
        frozen: Layer whose outputs, or some of them, cannot be pruned -> why.
        params_before, params_after: Number of parameters.
        macs_before, macs_after: Multiply-accumulates for one sample.
        size_before, size_after: Bytes of the parameters and buffers; None if unknown.
        latency_before, latency_after: Median seconds of five forward passes of about two samples, in turns, so a rough
            measurement; None after pruning in place and in files. Two reports are equal whatever these are.
    """

    groups: tuple[GroupReport, ...]
    layers: tuple[LayerReport, ...]
    error: float
    frozen: Mapping[str, str]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    size_before: int | None = None
    size_after: int | None = None
    latency_before: float | None = field(default=None, compare=False)
    latency_after: float | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """The report that `to_dict` gave, or JSON made of it.

        Raises:
            ValueError: If something is missing or not known.
        """
        try:
            groups = tuple(GroupReport(**_tuples(row)) for row in data["groups"])
            layers = tuple(LayerReport(**row) for row in data["layers"])
            return cls(**{**data, "groups": groups, "layers": layers})
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not a report of this version of lnr-prune: {error}") from error

    def to_html(
        self, path: str | Path | None = None, *, title: str = "lnr-prune report", sweep: "Sweep | None" = None
    ) -> str:
        """The report as one web page that needs nothing else: no network, no scripts.

        Args:
            path: File to write it to; None = write nothing.
            title: Heading of the page.
            sweep: Shows this Pareto frontier too.

        Returns:
            The page.
        """
        text = page.document(title, page.report(self, title), *([page.sweep(sweep)] if sweep else []))
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self) -> "Figure":
        """Channels kept and errors, one bar a group, as a matplotlib figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        return plots.groups(self)

    def _repr_html_(self) -> str:
        return page.embedded(page.report(self, "lnr-prune report"))

    def __rich__(self) -> Table:
        table = Table(title="lnr-prune", caption=self._caption(), caption_justify="left")
        for column in ("producers", "consumers"):
            table.add_column(column)
        budget = any(group.predicted is not None for group in self.groups)
        for column in ("channels", "kept", "error", "gap", *(["predicted"] if budget else [])):
            table.add_column(column, justify="right")
        table.add_column("note")
        for group in self.groups:
            row = (
                ", ".join(group.producers),
                ", ".join(group.consumers),
                str(group.size),
                str(group.kept),
                "-" if group.error is None else f"{group.error:.2%}",
                "-" if group.gap is None else f"{group.gap:.0e}",
                *([] if not budget else ["-" if group.predicted is None else f"{group.predicted:.2%}"]),
                group.note,
            )
            table.add_row(*map(Text, row))  # not markup: names are whatever the model's are
        for layer, reason in self.frozen.items():
            table.add_row(Text(layer), *["-"] * (5 + budget), Text(f"frozen: {reason}"))
        return table

    def _caption(self) -> str:
        counts = [
            ("parameters", self.params_before, self.params_after, "{:,}".format),
            ("MACs", self.macs_before, self.macs_after, "{:,}".format),
            ("size", self.size_before, self.size_after, page.in_bytes),
            ("latency (rough)", self.latency_before, self.latency_after, page.in_seconds),
        ]
        costs = [
            f"{name} {form(before)} -> {form(after)} ({_share(after, before)})"
            for name, before, after, form in counts
            if before is not None and after is not None
        ]
        return f"{', '.join(costs)}, squared error of the outputs {self.error:.2%}"

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


def _share(after: float, before: float) -> str:
    return f"{after / before:.2%}" if before else "-"
