"""Rows of the accuracy benchmark, and how far each is ahead of the best peer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One method at one budget; shares are fractions of the dense network, figures are means over calibration seeds.

    Attributes:
        network: Name of the network.
        limited: What the budget limits, "params" or "macs"; "" for the dense network.
        budget: The share that may be left of it.
        method: Name of the method.
        finetuned: Whether one epoch of training followed.
        score: Accuracy or, of sentence embeddings, Spearman's correlation.
        spread: Standard error of the score over the seeds; None with one seed.
        ahead: How much the score is above the best peer's; None without peers.
        ahead_error: Standard error of that over the test samples; of correlations, as if their ranks were given.
    """

    network: str
    limited: str
    budget: float
    method: str
    finetuned: bool
    macs: float
    params: float
    latency: float
    score: float
    spread: float | None
    agreement: float
    divergence: float
    seconds: float
    samples: int
    seeds: int
    ahead: float | None = None
    ahead_error: float | None = None


@dataclass(frozen=True, eq=False)
class Result:
    """A row, and the mean terms of its score, to compare it with others test sample by test sample."""

    row: Row
    terms: Tensor


def compared(results: Sequence[Result]) -> list[Row]:
    """The rows, each with how far it is ahead of the best peer of the same network and budget."""
    rows = []
    for result in results:
        row = result.row
        rivals = [other for other in results if is_peer(other.row.method) and _race(other.row) == _race(row)]
        if rivals:
            best = max(rivals, key=lambda other: other.row.score)
            difference = result.terms - best.terms
            error = float(difference.std()) / len(difference) ** 0.5
            row = replace(row, ahead=float(difference.mean()), ahead_error=error)
        rows.append(row)
    return rows


def _race(row: Row) -> tuple[str, str, float, bool]:
    return row.network, row.limited, row.budget, row.finetuned


def is_peer(method: str) -> bool:
    """Whether a method has nothing of ours in it."""
    return method.startswith("peer, ") and not method.endswith(", refit")
