"""The rows of a report: one per channel group, one per refitted layer, and one per module."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupReport:
    """One channel group.

    Attributes:
        name: Name of the group, which is that of a producer.
        producers: Layers whose rows or filters were removed.
        consumers: Layers that were refitted.
        size: Channels before.
        kept: Channels after.
        error: ``E||y - M x||^2 / E||y||^2`` of the consumers on the calibration data. For consumers that were refitted
            together with their producers, it is measured behind the activation. None if the group was left whole.
        predicted: Relative squared error that the group is predicted to cause in the network's outputs on new data;
            None without a budget.
        before_refit: ``error`` of the selector's own coefficients, on the original network's inputs; None if the
            group was left whole.
        lam: Penalty of the group lasso; None if another selector was used.
        gap: Relative duality gap of its solve; None if another selector was used.
        note: What else to know about the group; "" if nothing.
        through: Layers in between that work channel by channel, such as depthwise convolutions.
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
    through: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerReport:
    """One layer that was refitted.

    Attributes:
        name: Name of the layer.
        error: ``E||y - M x||^2 / E||y||^2`` on the calibration data, x in the pruned network, y in the original. If
            two layers were refitted together, the second one's is measured behind its activation, and the first one's
            is from before the joint refit.
        ridge: Ridge of the refit, as a fraction of the inputs' mean second moment.
        samples: Number of rows that it was fitted to, which should be at least twice the number of columns.
        columns: Columns of its matrix that were fitted.
        softmax: Whether its outputs are logits, and it was fitted to their probabilities.
    """

    name: str
    error: float
    ridge: float
    samples: int
    columns: int
    softmax: bool = False


@dataclass(frozen=True)
class ModuleCost:
    """What one module of the network costs by itself, without those inside of it.

    Attributes:
        name: Name of the module, "" for the network itself.
        params_before, params_after: Number of parameters.
        macs_before, macs_after: Multiply-accumulates for one sample; macs_after is None for a graph,
            which has no modules.
    """

    name: str
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int | None
