"""The settings that the result of a prune depends on, and whether they can be combined."""

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lnr_prune.graph.groups import ChannelGroup, Graph
from lnr_prune.refit.refit import Refit
from lnr_prune.runtime.checks import check_flags
from lnr_prune.selection.amount import Choice, Keep, Penalty, lasso_of
from lnr_prune.selection.budget import Budget, Effort
from lnr_prune.selection.selectors import Random, Selector, find_selector
from lnr_prune.tolerance import Evaluate, Tolerance

Amount = Keep | Penalty | Budget | Tolerance
INTO = ("copy", "model", "graph")


@dataclass(frozen=True)
class Settings:
    """The arguments of `lnr_prune.prune`; see there.

    Raises:
        ValueError, TypeError: If a setting is of the wrong type, or cannot be combined with another one.
    """

    amount: Amount
    selector: Selector
    refit: Refit | None
    bias: bool
    logits: bool | None
    into: str

    @classmethod
    def of(cls, amount: Any, selector: Any, refit: Any, bias: Any, logits: Any, into: Any) -> "Settings":
        """The settings; a name of a selector becomes the selector."""
        return cls(amount, find_selector(selector), refit, bias, logits, into)

    def __post_init__(self) -> None:
        check_amount(self.amount)
        check_flags(bias=self.bias, **({} if self.logits is None else {"logits": self.logits}))
        if not (self.refit is None or isinstance(self.refit, Refit)):
            raise TypeError(f"refit must be a Refit, such as Refit(window=2), or None for no refit, got {self.refit!r}")
        if self.into not in INTO:
            raise ValueError(f"into must be one of {', '.join(INTO)}, got {self.into!r}")
        if isinstance(self.amount, Penalty):
            lasso_of(self.selector)
        if isinstance(self.amount, Budget) and self.amount.latency is not None and self.into == "graph":
            raise ValueError(
                "a budget of latency is measured on the module that shrinks: it cannot be combined with "
                "into='graph'; limit the macs instead"
            )
        if self.effort is not None and self.effort.search and self.refit is None:
            raise ValueError(
                "a search refits the network in every trial: Effort(search=...) cannot be combined with refit=None"
            )

    def choices(self, graph: Graph) -> dict[ChannelGroup, Choice]:
        """How the channels of every group are chosen; empty if the sizes must be measured first."""
        if isinstance(self.amount, Budget | Tolerance):
            return {}
        return self.amount.choices(graph, self.selector)

    @property
    def effort(self) -> Effort | None:
        """How carefully a budget is shared out; None if there is none."""
        return self.amount.effort if isinstance(self.amount, Budget | Tolerance) else None

    @property
    def evaluate(self) -> Evaluate | None:
        """The user's metric, if there is one."""
        return self.amount.evaluate if isinstance(self.amount, Tolerance) else None

    @property
    def evaluations(self) -> int:
        """Models that are pruned and measured on the way."""
        return self.amount.evaluations if isinstance(self.amount, Tolerance) else 0

    @property
    def tries_refits(self) -> bool:
        """Whether networks are also refitted before the channels are chosen."""
        if isinstance(self.amount, Tolerance):
            return True
        return self.effort is not None and self.effort.refits + self.effort.search > 0

    @property
    def seed(self) -> int:
        """The seed of what is drawn."""
        return self.selector.seed if isinstance(self.selector, Random) else 0

    @property
    def arguments(self) -> Mapping[str, object]:
        """The settings by name; pruning a copy counts as the same as pruning the model itself."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**given, "into": "graph" if self.into == "graph" else "module"}


def check_amount(amount: Any) -> None:
    """Refuses anything that does not say how much is kept.

    Raises:
        TypeError: The message says what could have been meant.
    """
    if isinstance(amount, Amount):
        return
    if isinstance(amount, numbers.Real) and not isinstance(amount, bool):
        share = amount if 0 < float(amount) <= 1 else 0.5
        raise TypeError(
            f"the amount is a bare number, {amount!r}, which could mean two things: lnr.Keep({amount!r}) keeps so many "
            f"channels of every group, lnr.Budget(macs={share!r}) keeps that share of the multiply-accumulates and "
            "removes channels where the outputs suffer least. Write the one that you mean"
        )
    advice = "such as lnr.Keep(0.5)"
    if isinstance(amount, Mapping):
        advice = f"write lnr.Keep({amount!r}) if it names layers, lnr.Budget(macs=0.5) if it limits the whole model"
    raise TypeError(f"the amount must be a Keep, a Penalty, a Budget or a Tolerance, got {amount!r}; {advice}")
