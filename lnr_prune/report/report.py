"""What a prune did, group by group."""

import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.table import Table

from lnr_prune.errors import PlanError
from lnr_prune.report.html import document, embedded, in_bytes, in_seconds, percent, render, short
from lnr_prune.report.names import add, by_reason, joined, repeated, span, whole_names
from lnr_prune.report.plots import new_figure
from lnr_prune.report.rails import drawing
from lnr_prune.report.rows import GroupReport, LayerReport, ModuleCost
from lnr_prune.report.stages import stages
from lnr_prune.report.walk import Walk
from lnr_prune.runtime.codec import typed
from lnr_prune.runtime.disk import put

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Section(Protocol):
    """A result that is a part of a web page."""

    def section(self) -> str:
        """The part, as HTML."""
        ...


@dataclass(frozen=True)
class Report:
    """Every group, what was frozen, and the model before and after.

    Attributes:
        groups: One row per channel group, in order of execution.
        layers: One row per refitted layer, in order of execution.
        error: ``E||f(x) - f'(x)||^2 / E||f(x) - E f(x)||^2`` of the network's outputs, measured on a part of the
            calibration data. The layers were fitted to the same data; see `predicted` for new data.
        frozen: Name of a layer with outputs that cannot be pruned -> why.
        params_before, params_after: Number of parameters.
        macs_before, macs_after: Multiply-accumulates for one sample.
        size_before, size_after: Bytes of the parameters and buffers; None if unknown.
        latency_before, latency_after: Median seconds of five forward passes of about two samples, taken in turns: a
            rough measurement. None after pruning in place and in files. They do not count when reports are compared.
        folded: Layer -> which weight of it, computed in every forward pass, was made a plain parameter; see `fold`.
        modules: What every module costs, in the model's order; empty if unknown.
        flow: Pairs of layers: what the first computes goes into the second, as `Inspection.flow` has it.
        versions: Name of a program that made it -> its version.
        metrics: Name -> what the model was worth before and after; see `with_metric`.
        walk: The pruned models that a `Tolerance` measured; None for other amounts.
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
    folded: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[ModuleCost, ...] = ()
    flow: tuple[tuple[str, str], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    walk: Walk | None = None

    @property
    def predicted(self) -> float | None:
        """The ``error`` to expect on new data of the same kind, judged on separate samples; None without a budget."""
        known = [group.predicted for group in self.groups if group.predicted is not None]
        return sum(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """The report from what `to_dict` returned, or from JSON made of it.

        Raises:
            ValueError: If something is missing or unknown.
        """
        try:
            return typed(json.loads(json.dumps(data)), cls, "the report")
        except (PlanError, TypeError) as error:
            raise ValueError(f"this is not a report of this version of lnr-prune: {error}") from error

    def with_metric(self, name: str, before: float, after: float) -> "Report":
        """The report with what you measured of both models, such as their accuracies, which it then shows."""
        return replace(self, metrics={**self.metrics, name: (float(before), float(after))})

    def to_html(
        self,
        path: str | Path | None = None,
        *,
        title: str = "lnr-prune report",
        also: Iterable["Section"] = (),
        command: str = "",
    ) -> str:
        """The report as one web page that needs nothing else, such as the network.

        Args:
            path: File to write it to; None = write nothing.
            title: Heading of the page.
            also: What else to show on the page, such as a `Sweep`.
            command: The command that made it, which is then shown, too.

        Returns:
            The page.

        Raises:
            OSError: If the file cannot be written; one that was there stays as it was.
        """
        sections = (self.section(title), *(other.section() for other in also))
        return written(document(title, *sections, made_by={"command": command, **self.versions}), path)

    def plot(self) -> "Figure":
        """Channels kept, and errors before and after the refit, in two panels with one bar per group, by matplotlib.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        figure = new_figure(9.0, 1.2 + 0.25 * len(self.groups))
        kept, errors = figure.subplots(1, 2, sharey=True)
        names = [group.name for group in self.groups]
        places = range(len(names))
        kept.barh(places, [100 * group.kept / group.size for group in self.groups], color="C0")
        kept.set(xlabel="channels kept (%)", xlim=(0, 100), yticks=places, yticklabels=names)
        kept.invert_yaxis()
        for shift, height, colour, label, values in (
            (-0.2, 0.35, "C1", "before the refit", [group.before_refit for group in self.groups]),
            (0.2, 0.35, "C0", "after it", [group.error for group in self.groups]),
        ):
            errors.barh(
                [at + shift for at in places], [100 * (v or 0) for v in values], height, color=colour, label=label
            )
        errors.set(xlabel="squared error of the consumers (%)")
        errors.legend()
        return figure

    def section(self, title: str = "lnr-prune report") -> str:
        """The whole report, as a part of a web page."""
        known = (error for group in self.groups for error in (group.error, group.before_refit) if error is not None)
        numbers: dict[str, list[int]] = defaultdict(list)
        kept: dict[str, str] = {}
        for number, group in enumerate(self.groups):
            for layer in (*group.producers, *group.through):
                numbers[layer].append(number)
                kept[layer] = f"{layer}: {group.kept:,} of {group.size:,}"
        network = drawing(self.flow, numbers)
        return render(
            "report.html",
            report=self,
            title=title,
            pruned=sum(group.kept < group.size for group in self.groups),
            costs=[cost for cost in self._costs(short) if cost[1]],
            stages=stages(self.modules),
            budget=any(group.predicted is not None for group in self.groups),
            largest=max(known, default=0.0),
            largest_layer=max((layer.error for layer in self.layers), default=0.0),
            drawing=network,
            kept={stop.name: kept.get(stop.name, stop.name) for stop in network.stops},
        )

    def _costs(self, form: Callable[[float], str]) -> list[tuple[str, float, float, Callable[[float], str]]]:
        """Name, value before and after, and how it is written, of each cost that is known."""
        counts = [
            ("parameters", self.params_before, self.params_after, form),
            ("MACs per sample", self.macs_before, self.macs_after, form),
            ("size", self.size_before, self.size_after, in_bytes),
            ("latency (rough)", self.latency_before, self.latency_after, in_seconds),
        ]
        return [
            (name, before, after, write)
            for name, before, after, write in counts
            if before is not None and after is not None
        ]

    def _repr_html_(self) -> str:
        return embedded(self.section())

    def __rich__(self) -> Table:
        table = Table(title="lnr-prune", caption=self._caption(), caption_justify="left")
        whole_names(table, "producers", "consumers")
        lasso, budget = (any(getattr(g, what) is not None for g in self.groups) for what in ("gap", "predicted"))
        more = [*(["gap"] if lasso else []), *(["predicted"] if budget else [])]
        for column in ("channels", "kept", "error", *more):
            table.add_column(column, justify="right", overflow="fold")
        whole_names(table, "note")
        for rows in repeated(self.groups):
            notes = [note for note in dict.fromkeys(group.note for group in rows) if note]
            others = f" (and {len(notes) - 1} more)" if len(notes) > 1 else ""
            add(
                table,
                joined(name for group in rows for name in group.producers),
                joined(name for group in rows for name in group.consumers),
                str(rows[0].size),
                span((group.kept for group in rows), str),
                span((group.error for group in rows), percent),
                *([span((group.gap for group in rows), "{:.0e}".format)] if lasso else []),
                *([span((group.predicted for group in rows), percent)] if budget else []),
                "".join(notes[:1]) + others,
            )
        for what, reasons in (("frozen", self.frozen), ("folded", self.folded)):
            for reason, layers in by_reason(reasons).items():
                add(table, ", ".join(layers), *["-"] * (4 + len(more)), f"{what}: {reason}")
        return table

    def _caption(self) -> str:
        costs = [
            f"{name} {form(before)} -> {form(after)} ({_share(after, before)})"
            for name, before, after, form in self._costs("{:,}".format)
        ]
        costs.append(f"squared error of the outputs {percent(self.error)} on the calibration data")
        if self.predicted is not None:
            costs.append(f"{percent(self.predicted)} predicted for new data")
        costs += [f"{name} {before:.4g} -> {after:.4g}" for name, (before, after) in self.metrics.items()]
        costs += [f"{layer.name} fitted to the probabilities" for layer in self.layers if layer.softmax]
        return "\n".join((", ".join(costs), *([str(self.walk)] if self.walk else [])))

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()


def written(text: str, path: str | Path | None) -> str:
    """The text, which is also written to a file if there is a path."""
    if path is not None:
        put(path, lambda part: Path(part).write_text(text, encoding="utf-8"))
    return text


def _share(after: float, before: float) -> str:
    return f"{after / before:.2%}" if before else "-"
