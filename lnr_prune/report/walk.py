"""The walk of a tolerance: which budgets were tried, and what the pruned models were worth."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from lnr_prune.report.chart import LABELS, svg
from lnr_prune.report.html import percent, table


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

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Walk":
        """The walk from plain data, as `Report.to_dict` returns it."""
        return cls(**{**data, "steps": tuple(WalkStep(**step) for step in data["steps"])})

    @property
    def kept(self) -> WalkStep | None:
        """The smallest model within the tolerance; None if there was none, and the model stayed whole."""
        return min((step for step in self.steps if step.within), key=lambda step: step.share, default=None)

    def section(self) -> str:
        """The walk, as a part of a web page."""
        label = LABELS[self.cost]
        columns = [(label, "number", label), (self.measure, "number", self.measure), ("", "", "")]
        rows = [
            [percent(step.share), f"{step.value:.4g}", self._verdict(step)]
            for step in sorted(self.steps, key=lambda step: -step.share)
        ]
        about = (
            f"The smallest model whose {escape(self.measure)} is at least {self.original - self.drop:.4g}: that of the "
            f"original, {self.original:.4g}, less {self.drop:g}."
        )
        drawing = svg({"pruned": [(step.share, step.value) for step in self.steps]}, label, self.measure, self.original)
        return f'<h2>Tolerance</h2><p class="quiet">{about}</p>{drawing}{table(columns, rows)}'

    def __str__(self) -> str:
        walked = "; ".join(f"{percent(step.share)} {step.value:.4g} {self._verdict(step)}" for step in self.steps)
        return (
            f"{self.measure} at the {LABELS[self.cost]} (original {self.original:.4g}, allowed drop {self.drop:g}): "
            f"{walked or 'nothing to try'}"
        )

    def _verdict(self, step: WalkStep) -> str:
        if step == self.kept:
            return "kept"
        return "within" if step.within else "below"
