"""From a budget to sizes: curves, allocation, and a local search on what the outputs really suffer."""

import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lnr_prune import cost, distributed, resume
from lnr_prune.allocation import Allocation, Budget, Cost, Sizes, allocate, cost_of
from lnr_prune.calibration import Calibration, Call, samples_in
from lnr_prune.collapse import collapse, restore_point
from lnr_prune.curves import error_curves, output_error, some
from lnr_prune.graph import Graph, named_tensors
from lnr_prune.plan import make_plan
from lnr_prune.statistics import SecondMoments
from lnr_prune.supports import Reading, refit_network
from lnr_prune.verify import masked_weights

LEAST = 1e-2  # of an error that counts as left when all is refitted
FACTORS = (3.0, 3.0, 1.5, 1.5)  # by which a curve is scaled, round by round


def within_budget(
    model: nn.Module,
    target: nn.Module,
    graph: Graph,
    turns: Iterable[Mapping[str, Reading]],
    data: Calibration,
    budget: Budget,
    *,
    repeated: Mapping[str, SecondMoments],
    traced: Call,
    bias: bool,
    debias: bool = True,
    logits: bool = False,
    progress: Callable[[str], None],
) -> Allocation:
    """Sizes of the groups within the budget.

    Errors are measured on some samples of the calibration data; networks whose errors are, are refitted to others.

    Args:
        model: The original model.
        target: The module that is to be shrunk; it is, to measure latencies, and is as before when this returns.
        graph: The model's channel groups.
        turns: Groups that may shrink, with their statistics, some groups at a time.
        data: The calibration data.
        budget: The budget.
        repeated: As for `refit_network`.
        traced: The call that the graph was traced with.
        bias: Whether biases are refitted.
        debias: Whether the layers will be refitted; if not, there is nothing to try.
        logits: Whether the outputs are logits.
        progress: Called with what is being done.

    Raises:
        ValueError: If the budget is out of reach.
    """
    tensors, example = named_tensors(model), data.example()
    batches = some(data, 2 * budget.samples)
    judged = batches[1::2] or batches  # all ranks have all
    fit = Calibration(distributed.shard(batches[::2]), lambda call: call)
    suffered = output_error(model, judged, logits)
    curves, eliminations = error_curves(tensors, turns, suffered, lambda name: progress(f"measuring {name}"))
    groups = {group.name: group for group in graph.groups if group.name in curves}
    costs = costs_of(model, graph, groups, traced)

    def measured() -> float:
        return distributed.spread([lambda: cost.latency(target, example)])[0]

    whole = resume.remembered("latency", float, measured) if budget.latency is not None else 1.0

    def latency(sizes: Sizes) -> float:
        plan = make_plan((group, torch.arange(group.size) < sizes[name]) for name, group in groups.items())
        restore = restore_point(target)
        try:
            collapse(target, plan)
            return measured() / whole
        finally:
            restore()

    def error(doing: str, sizes: Sizes) -> float:
        progress(doing)
        supports = {name: eliminations[name].support(size) for name, size in sizes.items()}
        masked = masked_weights([(groups[name], support) for name, support in supports.items()], tensors)
        with resume.nothing():  # a trial is remembered as a whole
            done = refit_network(model, graph, supports, fit, repeated=repeated, bias=bias, logits=logits)
        return distributed.everyone(suffered({**masked, **done.weights}))[0]

    def remembered(what: str, measure: Callable[[Sizes], float]) -> Callable[[Sizes], float]:
        return lambda sizes: resume.remembered(f"{what} at {sorted(sizes.items())}", float, partial(measure, sizes))

    shared_out = partial(allocate, costs=costs, budget=budget, latency=remembered("latency", latency))
    if debias and budget.refits:
        left = remembered("trial", partial(error, "measuring what the refit leaves"))
        curves = attenuated(curves, shared_out(curves).sizes, left, budget.refits)
    return search(curves, shared_out, remembered("trial", partial(error, "searching")), budget.search)


def costs_of(model: nn.Module, graph: Graph, names: Container[str], traced: Call) -> dict[str, Cost]:
    """The cost model of "params", "macs" and "size" when these groups may shrink."""
    return {kind: cost_of(model, graph, kind, samples_in(traced), names) for kind in ("params", "macs", "size")}


def attenuated(
    curves: Mapping[str, Tensor], sizes: Sizes, error: Callable[[Sizes], float], refits: int
) -> dict[str, Tensor]:
    """The curves, times what is left of such an error when all other layers are refitted.

    The layers behind a group undo part of its error, the more the more there are. What is left is measured for groups
    evenly along the depth, each pruned alone, and interpolated for those in between.

    Args:
        curves: Group -> its error curve, in order of execution.
        sizes: About what the groups will keep; what is left is measured there, of groups that lose channels.
        error: Sizes -> measured error of the refitted network.
        refits: For how many groups it is measured at most.
    """
    whole = {name: len(curve) - 1 for name, curve in curves.items()}
    names = list(curves)
    known = [i for i, name in enumerate(names) if sizes[name] < whole[name] and float(curves[name][sizes[name]]) > 0]
    if not known:
        return dict(curves)
    even = np.linspace(0, len(known) - 1, min(refits, len(known))).round().astype(int)
    measured = [known[i] for i in dict.fromkeys(even)]
    alone = [(name, sizes[name]) for name in (names[i] for i in measured)]
    left = [error({**whole, name: size}) / float(curves[name][size]) for name, size in alone]
    logarithms = np.interp(range(len(names)), measured, np.log(np.clip(left, LEAST, 1.0)))
    return {name: curve * math.exp(by) for (name, curve), by in zip(curves.items(), logarithms, strict=True)}


def search(
    curves: Mapping[str, Tensor],
    shared_out: Callable[[Mapping[str, Tensor]], Allocation],
    error: Callable[[Sizes], float],
    trials: int,
) -> Allocation:
    """Scales one curve after another, and keeps what lowers the measured error.

    The sum of the groups' errors leaves out how they add up through the network. Every trial is within the budget, as
    it is shared out anew.

    Args:
        curves: Group -> its error curve, in order of execution.
        shared_out: Curves -> sizes within the budget.
        error: Sizes -> measured error of the whole network.
        trials: Number of measurements; 0 = take the curves at their word.
    """
    best = shared_out(curves)
    if trials == 0:
        return best
    least, tried = error(best.sizes), [best.sizes]

    def changes() -> Iterator[Mapping[str, Tensor]]:
        for factor in FACTORS:
            names = sorted(curves, key=lambda each: -best.errors[each])
            for name, scale in itertools.product(names, (factor, 1 / factor)):
                yield {**curves, name: curves[name] * scale}

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
