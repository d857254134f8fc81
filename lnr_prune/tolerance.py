"""As small as the user's own metric allows: a walk along the budgets, by bisection over models that are really pruned.

Every model on the walk is what `prune` would return at its budget: its channels are chosen, its layers refitted, and
the channels taken out of a copy. A metric need not fall evenly. What is returned is the smallest model that was
measured to be within the tolerance.
"""

import logging
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune.calibration.calls import Call
from lnr_prune.calibration.data import Calibration, each_half
from lnr_prune.calibration.divergence import agreement
from lnr_prune.calibration.reading import fit, whole
from lnr_prune.collapse.masks import Supports
from lnr_prune.collapse.plan import Plan
from lnr_prune.collapse.verify import copied
from lnr_prune.errors import GraphError
from lnr_prune.graph.groups import ChannelGroup, Graph
from lnr_prune.graph.modules.guard import users_device
from lnr_prune.report.walk import Walk, WalkStep
from lnr_prune.runtime.checks import check_count, check_size, nearest
from lnr_prune.runtime.work import Work
from lnr_prune.selection.allocation import Allocation, smallest_sizes
from lnr_prune.selection.budget import Budget, Effort, Grid
from lnr_prune.selection.costs.cost_model import Cost, Sizes
from lnr_prune.selection.search import refitted_curves, searched
from lnr_prune.selection.selectors import Selector
from lnr_prune.selection.trials import Trials

logger = logging.getLogger("lnr_prune")

COSTS = ("macs", "params", "size")
FINEST = 1e-3  # share of the original's cost; a walk ends when the next step would be smaller
ROUNDING = 1e-9  # so that .92 - .01 allows .91

Evaluate = Callable[[nn.Module], float]
Removal = Callable[[nn.Module | None, Supports, Mapping[str, Tensor]], tuple[nn.Module, Plan]]
"""Takes channels out of a module (or makes a graph, if there is none), with these full-size weights."""


@dataclass(frozen=True)
class Tolerance:
    """As small as a metric of yours allows, on data of yours.

    The budgets are walked by bisection. The smallest model that was measured to be within the tolerance is returned;
    if there is none, the model stays whole, with a warning. `Report.walk` holds what was measured.

    Attributes:
        evaluate: A function of a model that returns a number, such as its accuracy; higher is better. It is called with
            the original (a copy), and with pruned models, each a new copy in the same mode (training or evaluation) as
            the original; torch's random numbers are the same for all. With several processes every one calls it, and
            the first one's number counts. A work folder remembers the numbers, and knows the function by its name only.
            None = without labels, how far the model agrees with the original on calibration samples that it was not
            fitted to: the share of samples for which both give the same class, if the output is one tensor (samples,
            classes); else, and with ``logits=False``, one minus the relative squared error of the outputs.
        drop: How much less than the original's number is allowed, in the units of that number: 0.01 is one point of an
            accuracy in [0, 1], and 1.0 of one in percent.
        of: The cost that is reduced: "macs", "params" or "size".
        evaluations: The largest number of pruned models that are measured. Each costs about as much as a prune with
            `Keep`, and halves the distance to the limit: eight find it to half a percent of the cost.
        uniform: As for a `Budget`.
        grid: Sizes that groups may take.
        effort: How carefully each budget is shared out.

    Raises:
        ValueError, TypeError: If a value is out of range, or of the wrong type.

    Example:
        >>> Tolerance(drop=0.02, of="params").evaluations
        8
    """

    evaluate: Evaluate | None = None
    drop: float = 0.01
    of: str = "macs"
    evaluations: int = 8
    uniform: bool = False
    grid: Grid = Grid()
    effort: Effort = Effort()

    def __post_init__(self) -> None:
        if self.evaluate is not None and not callable(self.evaluate):
            raise TypeError(
                f"evaluate must be a function of a model, got {self.evaluate!r}; without one, write Tolerance(drop=...)"
            )
        check_size("drop", self.drop)
        if self.of not in COSTS:
            raise ValueError(f"unknown cost {self.of!r}; {nearest(self.of, COSTS)}")
        check_count("evaluations", self.evaluations, 1)
        self.at(1.0)  # checks the rest

    def at(self, share: float) -> Budget:
        """The budget of so much of the original's cost."""
        shares: dict[str, Any] = {self.of: share}
        return Budget(**shares, uniform=self.uniform, grid=self.grid, effort=self.effort)

    def groups(self, graph: Graph) -> list[ChannelGroup]:
        """The groups that may lose channels; see `Budget.groups`."""
        return self.at(1.0).groups(graph)

    def measure(self, logits: bool | None) -> str:
        """What is measured, in words; ``logits`` is False if the outputs are no classes."""
        if self.evaluate is not None:
            return getattr(self.evaluate, "__name__", "value").strip("<>")
        return "1 - squared error of the outputs" if logits is False else "agreement with the original"

    def allows(self, value: float, original: float) -> bool:
        """Whether a value is within the tolerance; NaN never is."""
        return value >= original - self.drop - ROUNDING * max(1.0, abs(original))


def worth(evaluate: Evaluate, model: nn.Module) -> float:
    """What the user's function says of a model.

    Raises:
        TypeError: If that is not a number.
    """
    result: Any = evaluate(model)
    if isinstance(result, Tensor) and result.numel() == 1:
        result = result.item()
    if not isinstance(result, numbers.Real):
        raise TypeError(f"evaluate must return a number, got {result!r}")
    return float(result)


@dataclass(frozen=True, eq=False)
class Metric:
    """What pruned models are worth.

    Attributes:
        evaluate: The user's function; None = they are compared with the original.
        remove: Makes the pruned models.
        target: The module that will be shrunk; only copies of it are. None = the pruned models are graphs.
        example: Arguments of one forward pass.
        work: The processes, the progress, and where the numbers are kept.
    """

    evaluate: Evaluate | None
    remove: Removal
    target: nn.Module | None
    example: Call
    work: Work

    def original(self) -> float:
        """What the original is worth.

        Raises:
            ValueError: If that is not a finite number.
        """
        if self.evaluate is None:
            return 1.0  # it agrees with itself
        self.work.step("evaluating the original")
        value = self.work.remembered("value of the original", float, partial(self._value, self.evaluate, {}, {}))
        if not math.isfinite(value):
            raise ValueError(f"evaluate returned {value} for the original model, from which no drop can be measured")
        return value

    def of_sizes(
        self, trials: Trials, data: Calibration, selector: Selector, seed: int
    ) -> Callable[[Sizes[ChannelGroup]], float]:
        """A function of the groups' sizes: what the model that is pruned to them is worth."""
        if (evaluate := self.evaluate) is not None:
            return lambda sizes: self._value(evaluate, *trials.weights(sizes, selector, seed, whole, data))
        fitted, judging = each_half(data, self.work.ranks)
        if not any(self.work.ranks.all_gather(judging.samples)):
            judging = fitted  # there is a single sample
        same = None if trials.logits is False else agreement(trials.model, judging, judging.counts, self.work.ranks)

        def agrees(sizes: Sizes[ChannelGroup]) -> float:
            _, weights = trials.weights(sizes, selector, seed, fit, fitted)
            return same(weights) if same else 1.0 - trials.judge(weights)

        return agrees

    def _value(self, evaluate: Evaluate, supports: Supports, masked: Mapping[str, Tensor]) -> float:
        small, _ = self.remove(self._twin(), supports, masked)
        with users_device(), torch.random.fork_rng(range(torch.cuda.device_count())):
            value = worth(evaluate, small)
        return self.work.ranks.all_gather(value)[0]

    def _twin(self) -> nn.Module | None:
        if self.target is None:
            return None
        try:
            return copied(self.target, self.example)
        except GraphError as error:  # only of the model itself, into="model"
            raise GraphError(
                f"a Tolerance evaluates pruned copies, but {type(self.target).__name__} cannot be copied "
                f"({error.__cause__ or 'a copy runs on the parameters of the original'}): leave evaluate out, which "
                "needs no copies, or give a Budget"
            ) from error


def within_tolerance(
    trials: Trials,
    tolerance: Tolerance,
    costs: Mapping[str, Cost[ChannelGroup]],
    value_of: Callable[[Sizes[ChannelGroup]], float],
    original: float,
) -> tuple[Allocation[ChannelGroup], Walk]:
    """The smallest sizes that were measured to be within the tolerance, and what was measured on the way.

    Args:
        trials: Measures what sizes do to the network.
        tolerance: The settings.
        costs: Cost model of "params", "macs" and "size".
        value_of: Sizes -> what the model that is pruned to them is worth.
        original: What the original is worth.
    """
    all_channels, work = {group: group.size for group in trials.groups}, trials.work
    best, steps = Allocation(all_channels, dict.fromkeys(all_channels, 0.0)), list[WalkStep]()
    cost, refused = costs[tolerance.of], list[Sizes[ChannelGroup]]()
    low, high = cost(smallest_sizes(all_channels, tolerance.grid)) / cost(all_channels), 1.0
    curves = refitted_curves(trials, tolerance.at((low + high) / 2), costs)
    while len(steps) < tolerance.evaluations and high - low > FINEST:
        share = (low + high) / 2
        found = searched(trials, curves, tolerance.at(share), costs)
        if found.sizes in refused:  # the budgets between them come to the same sizes
            low = share
            continue
        work.step(f"evaluating at {share:.1%} of the {tolerance.of}")
        named = sorted((group.name, size) for group, size in found.sizes.items())
        value = work.remembered(f"value at {named}", float, partial(value_of, found.sizes))
        steps.append(WalkStep(cost(found.sizes) / cost(all_channels), value, tolerance.allows(value, original)))
        if steps[-1].within:
            best, high = found, steps[-1].share
        else:
            low = share
            refused.append(found.sizes)
    walk = Walk(tolerance.of, tolerance.measure(trials.logits), original, float(tolerance.drop), tuple(steps))
    if walk.kept is None:
        logger.warning("no smaller model that was tried is within the tolerance, so the model stays whole: %s", walk)
    return best, walk
