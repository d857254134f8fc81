"""The walk of a tolerance: which budgets were tried, and what the pruned models were worth."""

from dataclasses import dataclass

from lnr_prune.report.chart import LABELS, Chart, chart
from lnr_prune.report.html import percent


@dataclass(frozen=True)
class WalkStep:
    """One pruned model.

    Attributes:
        share: What it costs, as a fraction of the original's cost.
        value: What it was worth.
        within: Whether that is within the tolerance.
    """

    share: float
    value: float
    within: bool


@dataclass(frozen=True)
class Walk:
    """The pruned models that a `Tolerance` measured, in this order.

    Attributes:
        cost: The cost that was reduced: "macs", "params" or "size".
        measure: What was measured.
        original: What the original model is worth.
        drop: How much less was allowed.
        steps: The pruned models.
    """

    cost: str
    measure: str
    original: float
    drop: float
    steps: tuple[WalkStep, ...]

    @property
    def kept(self) -> WalkStep | None:
        """The smallest model within the tolerance; None if there was none, and the model stayed whole."""
        return min((step for step in self.steps if step.within), key=lambda step: step.share, default=None)

    @property
    def chart(self) -> Chart | None:
        """What the models were worth against what they cost."""
        points = [(step.share, step.value) for step in self.steps]
        return chart({"pruned": points}, LABELS[self.cost], self.measure, self.original)

    def verdict(self, step: WalkStep) -> str:
        """What became of a model: "kept", "within" the tolerance, or "below" it."""
        if step == self.kept:
            return "kept"
        return "within" if step.within else "below"

    def __str__(self) -> str:
        walked = "; ".join(f"{percent(step.share)} {step.value:.4g} {self.verdict(step)}" for step in self.steps)
        return (
            f"{self.measure} at the {LABELS[self.cost]} (original {self.original:.4g}, allowed drop {self.drop:g}): "
            f"{walked or 'nothing to try'}"
        )
