"""What the LeNet-5 session finds, and its tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from lnr_prune.recipes.toy import Run
from lnr_prune.selection.amount import Penalty


@dataclass(frozen=True)
class Compression:
    """One compression, in the reference's steps; rates and accuracies are fractions.

    Attributes:
        name: What was pruned.
        penalty: The penalty that was given to `prune`.
        columns_kept: Consumer -> fraction of its input channels that the lasso keeps.
        sparse_accuracy: Accuracy with the lasso's sparse matrices, at full size.
        collapsed_accuracy: Accuracy after the zero channels are removed, which is the same.
        accuracy: Accuracy after debias.
        widths: Producer -> channels, after debias.
        compression_rate: Share of the network's parameters that is left after debias.
        macs_rate: Share of its multiply-accumulates that is left after debias.
    """

    name: str
    penalty: Penalty
    columns_kept: dict[str, float]
    sparse_accuracy: float
    collapsed_accuracy: float
    accuracy: float
    widths: dict[str, int]
    compression_rate: float
    macs_rate: float


@dataclass(frozen=True)
class Point:
    """One point of a Pareto sweep.

    Attributes:
        lam: The reference's lam, or the fraction of lambda_max.
        widths: Producer -> channels.
        compression_rate: Share of the network's parameters that is left.
        accuracy: Accuracy without retraining.
        accuracy_retrained: Accuracy after one epoch of retraining; None if not asked for.
        all_zero: Whether lam removes every channel of some layer; the library then keeps one channel there.
    """

    lam: float
    widths: dict[str, int]
    compression_rate: float
    accuracy: float
    accuracy_retrained: float | None
    all_zero: bool


def summary(dense: Mapping[str, int], dense_accuracy: float, compressions: Sequence[Compression]) -> Table:
    """The dense model (its widths and accuracy) and every compression of it."""
    table = _table("LeNet-5", "channels", "params", "MACs", "sparse", "collapsed", "debiased")
    table.add_row("dense", _sizes(dense), _percent(1), _percent(1), "", "", _percent(dense_accuracy))
    for c in compressions:
        shares = (c.compression_rate, c.macs_rate, c.sparse_accuracy, c.collapsed_accuracy, c.accuracy)
        table.add_row(c.name, _sizes(c.widths), *map(_percent, shares))
    return table


def sweep_table(title: str, points: Sequence[Point]) -> Table:
    """One Pareto sweep."""
    table = _table(f"Pareto sweep: {title}", "channels", "parameters", "accuracy", "one epoch later", first="lam")
    for p in points:
        retrained = "" if p.accuracy_retrained is None else _percent(p.accuracy_retrained)
        sizes = _sizes(p.widths) + (" (nothing left)" if p.all_zero else "")
        table.add_row(f"{p.lam:.2e}", sizes, _percent(p.compression_rate), _percent(p.accuracy), retrained)
    return table


def solver_table(title: str, runs: Sequence[Run]) -> Table:
    """How far and how fast each solver got."""
    table = _table(title, "iterations", "objective", "duality gap", "seconds", first="solver")
    for run in runs:
        s = run.solution
        table.add_row(run.solver, f"{s.iterations}", f"{s.history[-1]:.9g}", f"{s.gap:.0e}", f"{run.seconds:.2f}")
    return table


def _table(title: str, *numbers: str, first: str = "") -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)  # fits 80 columns
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _sizes(widths: Mapping[str, int]) -> str:
    return "-".join(map(str, widths.values()))


def _percent(share: float) -> str:
    return f"{share:.2%}"
