"""What a prune did, group by group."""

import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.table import Table

from lnr_prune.report.html import (
    bar,
    document,
    embedded,
    error_bars,
    folded,
    in_bytes,
    in_seconds,
    left_whole,
    maybe,
    percent,
    short,
    table,
    weights_made_plain,
    who,
)
from lnr_prune.report.names import add, by_reason, joined, repeated, span, whole_names
from lnr_prune.report.plots import new_figure
from lnr_prune.report.rows import GroupReport, LayerReport
from lnr_prune.report.walk import Walk
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
            groups = tuple(GroupReport(**_tuples(row)) for row in data["groups"])
            layers = tuple(LayerReport(**row) for row in data["layers"])
            walk = data.get("walk") and Walk.from_dict(data["walk"])
            return cls(**{**data, "groups": groups, "layers": layers, "walk": walk})
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not a report of this version of lnr-prune: {error}") from error

    def to_html(
        self, path: str | Path | None = None, *, title: str = "lnr-prune report", also: Iterable["Section"] = ()
    ) -> str:
        """The report as one web page that needs nothing else: no network, no scripts.

        Args:
            path: File to write it to; None = write nothing.
            title: Heading of the page.
            also: What else to show on the page, such as a `Sweep`.

        Returns:
            The page.

        Raises:
            OSError: If the file cannot be written; one that was there stays as it was.
        """
        text = document(title, self.section(title), *(other.section() for other in also))
        if path is not None:
            put(path, lambda part: Path(part).write_text(text, encoding="utf-8"))
        return text

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
        pruned = sum(group.kept < group.size for group in self.groups)
        lead = f"{pruned} of {len(self.groups)} channel groups lost channels, {len(self.layers)} layers were refitted."
        heading = f"<h1>{escape(title)}</h1><p>{lead}</p>"
        return "\n".join(
            (
                heading,
                _tiles(self),
                *([self.walk.section()] if self.walk else []),
                _groups(self),
                _layers(self),
                left_whole(self.frozen),
                weights_made_plain(self.folded),
            )
        )

    def _repr_html_(self) -> str:
        return embedded(self.section())

    def __rich__(self) -> Table:
        table = Table(title="lnr-prune", caption=self._caption(), caption_justify="left")
        whole_names(table, "producers", "consumers")
        budget = any(group.predicted is not None for group in self.groups)
        for column in ("channels", "kept", "error", "gap", *(["predicted"] if budget else [])):
            table.add_column(column, justify="right", overflow="fold")
        whole_names(table, "note")
        for rows in repeated(self.groups):
            notes = [note for note in dict.fromkeys(group.note for group in rows) if note]
            more = f" (and {len(notes) - 1} more)" if len(notes) > 1 else ""
            add(
                table,
                joined(name for group in rows for name in group.producers),
                joined(name for group in rows for name in group.consumers),
                str(rows[0].size),
                span((group.kept for group in rows), str),
                span((group.error for group in rows), percent),
                span((group.gap for group in rows), "{:.0e}".format),
                *([span((group.predicted for group in rows), percent)] if budget else []),
                "".join(notes[:1]) + more,
            )
        for what, reasons in (("frozen", self.frozen), ("folded", self.folded)):
            for reason, layers in by_reason(reasons).items():
                add(table, layers, *["-"] * (5 + budget), f"{what}: {reason}")
        return table

    def _caption(self) -> str:
        counts = [
            ("parameters", self.params_before, self.params_after, "{:,}".format),
            ("MACs", self.macs_before, self.macs_after, "{:,}".format),
            ("size", self.size_before, self.size_after, in_bytes),
            ("latency (rough)", self.latency_before, self.latency_after, in_seconds),
        ]
        costs = [
            f"{name} {form(before)} -> {form(after)} ({_share(after, before)})"
            for name, before, after, form in counts
            if before is not None and after is not None
        ]
        costs.append(f"squared error of the outputs {percent(self.error)} on the calibration data")
        if self.predicted is not None:
            costs.append(f"{percent(self.predicted)} predicted for new data")
        costs += [f"{layer.name} fitted to the probabilities" for layer in self.layers if layer.softmax]
        return "\n".join((", ".join(costs), *([str(self.walk)] if self.walk else [])))

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


def _share(after: float, before: float) -> str:
    return f"{after / before:.2%}" if before else "-"


def _tiles(of: Report) -> str:
    counts = [
        ("Parameters", of.params_before, of.params_after, short),
        ("MACs per sample", of.macs_before, of.macs_after, short),
        ("Size", of.size_before, of.size_after, in_bytes),
        ("Latency (rough)", of.latency_before, of.latency_after, in_seconds),
    ]
    tiles = [
        f'<div class="tile">{name}<b>{percent(after / before)}</b>{bar(after / before, percent(after / before))}'
        f'<span class="quiet">{form(before)} → {form(after)}</span></div>'
        for name, before, after, form in counts
        if before and after is not None
    ]
    expected = of.predicted
    note = "squared, relative, on the calibration data"
    if expected is not None:
        note += f"; {percent(expected)} predicted for new data"
    tiles.append(
        f'<div class="tile">Error of the outputs<b>{percent(of.error)}</b>{bar(of.error, percent(of.error))}'
        f'<span class="quiet">{note}</span></div>'
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _groups(of: Report) -> str:
    known = (error for group in of.groups for error in (group.error, group.before_refit) if error is not None)
    largest, budget = max(known, default=0.0), any(group.predicted is not None for group in of.groups)
    columns = [
        ("layers that make the channels", "wide", ""),
        ("channels kept", "drawn", ""),
        ("", "number", "kept"),
        ("errors", "drawn", ""),
        ("before the refit", "number", "before the refit"),
        ("after", "number", "after it"),
        *([("at the outputs", "number", "at the outputs")] if budget else []),
    ]
    rows = []
    for group in of.groups:
        note = f'<div class="quiet">{escape(group.note)}</div>' if group.note else ""
        row = [
            who(group.producers, group.consumers) + note,
            bar(group.kept / max(1, group.size), f"{group.kept} of {group.size} channels kept"),
            f"{group.kept:,} of {group.size:,}",
            error_bars(group.before_refit, group.error, largest),
            maybe(group.before_refit),
            maybe(group.error),
            *([maybe(group.predicted)] if budget else []),
        ]
        rows.append(row)
    about = (
        "Errors are <code>E‖y − M x‖² / E‖y‖²</code> of the layers that read the channels: with the selector's "
        "coefficients in the original network (orange), and after the refit in the pruned one (blue)."
    )
    if budget:
        about += " At the outputs: the error that the group is predicted to cause there on new data."
    return f'<h2>Channels</h2><p class="quiet">{about}</p>{table(columns, rows)}'


def _layers(of: Report) -> str:
    if not of.layers:
        return "<h2>Refitted layers</h2><p>None: the coefficients are as the selector left them.</p>"
    largest = max(layer.error for layer in of.layers)
    columns = [("layer", "wide", ""), ("error", "drawn", ""), ("", "number", "error")]
    columns += [(name, "number", name) for name in ("ridge", "samples", "columns")]
    rows = [
        [
            folded([layer.name]) + ('<div class="quiet">fitted to the probabilities</div>' if layer.softmax else ""),
            error_bars(None, layer.error, largest),
            percent(layer.error),
            f"{layer.ridge:.2g}",
            f"{layer.samples:,}",
            f"{layer.columns:,}",
        ]
        for layer in of.layers
    ]
    about = "What remains after each layer is fitted from the pruned network's inputs to the original one's outputs."
    return f'<h2>Refitted layers</h2><p class="quiet">{about}</p>{table(columns, rows)}'
