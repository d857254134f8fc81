"""From a budget to sizes: curves, allocation, and a local search on what the outputs really suffer."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
from torch import Tensor

from lnr_prune.graph.groups import ChannelGroup
from lnr_prune.selection.allocation import Allocation, allocate
from lnr_prune.selection.budget import Budget
from lnr_prune.selection.costs.cost_model import Cost, Group, Sizes
from lnr_prune.selection.trials import Trials

LEAST = 1e-2  # least share of an error that counts as left after a refit
FACTORS = (3.0, 3.0, 1.5, 1.5)  # by which a curve is scaled, round by round


def within_budget(trials: Trials, budget: Budget, costs: Mapping[str, Cost[ChannelGroup]]) -> Allocation[ChannelGroup]:
    """``argmin_sizes sum_g curves_g[sizes_g]`` within the budget, where the curves are what the outputs suffer.

    Args:
        trials: Measures what sizes do to the network.
        budget: The budget.
        costs: Cost model of "params", "macs" and "size".

    Raises:
        ValueError: If the budget is out of reach.
    """
    work, names = trials.work, {group.name: group for group in trials.groups}

    def measured() -> dict[str, tuple[int, float]]:
        found = searched(trials, refitted_curves(trials, budget, costs), budget, costs)
        return {group.name: (size, found.errors[group]) for group, size in found.sizes.items()}

    known = work.remembered("allocation", dict[str, tuple[int, float]], measured)
    sizes, errors = ({names[name]: entry[i] for name, entry in known.items()} for i in (0, 1))
    return Allocation(sizes, errors)  # type: ignore[arg-type]  # an int and a float of each


def refitted_curves(
    trials: Trials, budget: Budget, costs: Mapping[str, Cost[ChannelGroup]]
) -> dict[ChannelGroup, Tensor]:
    """The groups' error curves, as far as a refit leaves their errors; see `attenuated`."""
    if trials.refit is None or not budget.effort.refits:
        return trials.curves
    sizes = allocate(trials.curves, costs, budget, trials.latency).sizes
    left = partial(trials.error, "trying a refit")
    return attenuated(trials.curves, sizes, left, budget.effort.refits)


def searched(
    trials: Trials,
    curves: Mapping[ChannelGroup, Tensor],
    budget: Budget,
    costs: Mapping[str, Cost[ChannelGroup]],
) -> Allocation[ChannelGroup]:
    """The sizes within the budget that these curves give, and a `search` from there."""
    shared_out = partial(allocate, costs=costs, budget=budget, latency=trials.latency)
    return search(curves, shared_out, partial(trials.error, "searching"), budget.effort.search)


def attenuated(
    curves: Mapping[Group, Tensor], sizes: Sizes[Group], error: Callable[[Sizes[Group]], float], refits: int
) -> dict[Group, Tensor]:
    """The curves, each times the share of its error that is left when all other layers are refitted.

    The layers behind a group undo part of its error; more layers undo more of it. The share that is left is measured
    for groups spread evenly along the depth, each pruned alone, and interpolated for those in between.

    Args:
        curves: Group -> its error curve, in order of execution.
        sizes: Roughly how many channels the groups will keep. There, the share is measured, for groups that lose some.
        error: Sizes -> measured error of the refitted network.
        refits: The largest number of groups for which it is measured.
    """
    whole, groups = {group: len(curve) - 1 for group, curve in curves.items()}, list(curves)
    shrinking = [i for i, g in enumerate(groups) if sizes[g] < whole[g] and float(curves[g][sizes[g]]) > 0]
    if not shrinking:
        return dict(curves)
    even = np.linspace(0, len(shrinking) - 1, min(refits, len(shrinking))).round().astype(int)
    measured = [shrinking[i] for i in dict.fromkeys(even)]
    alone = [(group, sizes[group]) for group in (groups[i] for i in measured)]
    left = [error({**whole, group: size}) / float(curves[group][size]) for group, size in alone]
    logarithms = np.interp(range(len(groups)), measured, np.log(np.clip(left, LEAST, 1.0)))
    return {group: curve * math.exp(by) for (group, curve), by in zip(curves.items(), logarithms, strict=True)}


def search(
    curves: Mapping[Group, Tensor],
    shared_out: Callable[[Mapping[Group, Tensor]], Allocation[Group]],
    error: Callable[[Sizes[Group]], float],
    trials: int,
) -> Allocation[Group]:
    """Scales one curve after another, and keeps what lowers the measured error.

    The sum of the groups' errors ignores how they add up through the network. Every trial is within the budget, as the
    budget is shared out again.

    Args:
        curves: Group -> its error curve, in order of execution.
        shared_out: Curves -> sizes within the budget.
        error: Sizes -> measured error of the whole network.
        trials: Number of measurements; 0 = trust the curves.
    """
    best = shared_out(curves)
    if trials == 0:
        return best
    least, tried = error(best.sizes), [best.sizes]

    def changes() -> Iterator[Mapping[Group, Tensor]]:
        for factor in FACTORS:
            groups = sorted(curves, key=lambda each: -best.errors[each])
            for group, scale in itertools.product(groups, (factor, 1 / factor)):
                yield {**curves, group: curves[group] * scale}

    for changed in changes():
        trial = shared_out(changed)
        if trial.sizes in tried:
            continue
        if len(tried) > trials:
            break
        tried.append(trial.sizes)
        measured = error(trial.sizes)
        if measured < least:
            best, least, curves = trial, measured, changed
    return best
