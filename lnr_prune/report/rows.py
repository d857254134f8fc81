"""The rows of a report: one a channel group, one a refitted layer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupReport:
    """One channel group.

    Attributes:
        name: Name of the group, that of a producer.
        producers: Layers whose rows or filters were removed.
        consumers: Layers that were refitted.
        size: Channels before.
        kept: Channels after.
        error: ``E||y - M x||^2 / E||y||^2`` of the consumers on the calibration data, of those that were refitted
            together with their makers behind the activation; None if left whole.
        predicted: What the group costs on new data: relative squared error of the network's outputs; None without a
            budget.
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
        error: ``E||y - M x||^2 / E||y||^2`` on the calibration data, x in the pruned network, y in the original. Of
            two layers that were refitted together: of the second one behind its activation, of the first one as it was
            before.
        ridge: Ridge of the refit, as a fraction of the inputs' mean second moment.
        samples: Rows that it was fitted to; should be at least twice as many as the columns.
        columns: Columns of its matrix that were fitted.
        softmax: Whether it was fitted to the probabilities that its outputs, logits, stand for.
    """

    name: str
    error: float
    ridge: float
    samples: int
    columns: int
    softmax: bool = False
