"""The front door: prune a model by linear neural reconstruction."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from lnr_prune import cost
from lnr_prune.amount import choose_channels
from lnr_prune.calibration import Calibration, Inputs, calibrate, short_example
from lnr_prune.collapse import collapse, restore_point
from lnr_prune.errors import GraphError
from lnr_prune.graph import ChannelGroup, find_groups, named_tensors
from lnr_prune.plan import Plan, make_plan
from lnr_prune.problem import GroupLasso
from lnr_prune.problem import debias as debiased
from lnr_prune.pruned_graph import pruned_graph
from lnr_prune.registry import Pair, find
from lnr_prune.report import GroupReport, Report
from lnr_prune.selection import Candidates
from lnr_prune.solvers import Solver
from lnr_prune.statistics import SecondMoments, gather
from lnr_prune.verify import Reference, copied, masked_weights, shrinkable


@dataclass(frozen=True, eq=False)
class Pruned:
    """What `prune` returns.

    Attributes:
        model: The smaller model, of the original's class.
        report: What was done to every group; ``print(pruned.report)``.
        plan: Which indices of which parameters were kept.
        masked: Full-size parameters (name -> tensor) of the equal, masked model:
            ``torch.func.functional_call(original, pruned.masked, inputs)`` is ``pruned.model(inputs)``.
    """

    model: nn.Module
    report: Report
    plan: Plan
    masked: Mapping[str, Tensor]


def prune(
    model: nn.Module,
    calibration: Any,
    *,
    keep: float | Mapping[str, float] | None = None,
    lam: float | Mapping[str, float] | None = None,
    lam_ratio: float | Mapping[str, float] | None = None,
    selector: str = "group_lasso",
    solver: str | Solver = "newton",
    bias: bool = True,
    debias: bool = True,
    ridge: float = 0.0,
    inputs: Inputs | None = None,
    inplace: bool = False,
    as_graph: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Pruned:
    """``min_M 1/2 E||y - M x||^2 + lam sum_g w_g ||M[:, g]||_F`` for every layer, then removes the zero groups.

    One channel group after the other, in order of execution: second moments of its consumers (inputs
    from the network pruned so far, outputs from the original one), support, least-squares refit on it.
    At last the channels are taken out physically, and the smaller model is compared with the masked one.

    Args:
        model: A trained model that torch.export can trace. It is not modified unless ``inplace``.
        calibration: Unlabelled inputs, any iterable of batches: tensors, ``(input, label)`` pairs (labels
            are ignored), tuples of arguments, or dicts of keyword arguments.
        keep: Channels to keep of every group: a count (int), or a fraction in (0, 1] (float); or a mapping
            from producers' names to one of these, which leaves all other groups whole.
        lam: Instead, the penalty; or a mapping from producers' names.
        lam_ratio: Instead, the penalty as a fraction of each group's lambda_max; or a mapping.
        selector: How ``keep`` channels are chosen: "group_lasso", or the baselines "norm" and "random".
        solver: Name or settings of the solver, see `solve`.
        bias: Whether the consumers' biases are refitted too.
        debias: Whether the kept columns are refitted, by least squares. If not, they stay as the selector
            left them: shrunk by the lasso, or the original ones.
        ridge: Ridge of the refit, as a fraction of the inputs' mean second moment.
        inputs: Turns a batch of any other form into ``(args, kwargs)`` of the model.
        inplace: Shrinks ``model`` itself. If anything fails it is as before.
        as_graph: Returns a `PrunedGraph`, a GraphModule of ATen operations for evaluation only, instead of a
            module of the model's class. No channels stay then because the model's forward holds their number.
        seed: Of the "random" selector.
        progress: Whether to show a progress bar; default: if stderr is a terminal.

    Returns:
        A `Pruned` with the smaller model, the report and the plan.

    Raises:
        ValueError, TypeError: If an argument is out of range, or names no prunable layer.
        CalibrationError: If the calibration data is empty, not finite, or not accepted by the model.
        GraphError: If the model cannot be traced or copied, or has no channel that can be pruned.
        VerificationError: If the smaller model does not equal the masked one; the model is left as it was.

    Example:
        >>> import torch, lnr_prune as lnr
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> pruned = lnr.prune(model, [torch.randn(256, 8)], keep=0.5)
        >>> pruned.model
        Sequential(
          (0): Linear(in_features=8, out_features=16, bias=True)
          (1): ReLU()
          (2): Linear(in_features=16, out_features=4, bias=True)
        )
    """
    if inplace and as_graph:
        raise ValueError("as_graph=True makes a new model; it cannot be combined with inplace=True")
    data = calibrate(model, calibration, inputs)
    example = short_example(model, data)
    graph = find_groups(model, *example)
    target = model if inplace or as_graph else copied(model, example)
    if not as_graph:
        groups, fixed = shrinkable(target, graph.groups, example)
        graph = replace(graph, groups=groups, frozen={**graph.frozen, **fixed})
    if not graph.groups:
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in graph.frozen.items())
        raise GraphError(f"{type(model).__name__} has no channel that can be pruned. {reasons or 'It has no layers'}")
    choices = choose_channels(graph, keep=keep, lam=lam, lam_ratio=lam_ratio, selector=selector)

    tensors = dict(named_tensors(model))
    masked: dict[str, Tensor] = {}
    supports: list[tuple[ChannelGroup, Tensor]] = []
    rows: list[GroupReport] = []
    generator = torch.Generator().manual_seed(seed)
    with _progress_bar(progress) as bar:
        task = bar.add_task("pruning", total=len(choices))
        for group in graph.groups:
            row = GroupReport(
                group.name, group.producers, tuple(c.name for c in group.consumers), group.size, group.size
            )
            if group.name in choices:
                bar.update(task, description=group.name, advance=1)
                state = {**tensors, **masked}
                pairs = _pairs(group, bias)
                alive = _alive(pairs, supports, state)
                problem = _problem(model, group, pairs, alive, data, masked, state)
                original = tuple(pair.matrix(state) for pair in pairs)
                candidates = Candidates(problem, original, _magnitude(group, state), solver, generator)
                selection = choices[group.name](candidates)
                M = debiased(problem, selection.support, ridge) if debias else selection.coefficients
                for pair, M_c, alive_c in zip(pairs, M, alive, strict=True):
                    masked |= pair.write(M_c * alive_c, state)
                masked |= masked_weights([(group, selection.support)], {**state, **masked})  # in training heads too
                supports.append((group, selection.support))
                row = replace(
                    row,
                    kept=int(selection.support.sum()),
                    error=problem.error(M),
                    lam=selection.lam,
                    gap=selection.gap,
                    note=selection.note,
                )
            rows.append(row)

    plan = make_plan(supports)
    before = cost.parameters(model), cost.macs(model, example)
    if as_graph:
        target = pruned_graph(model, plan, masked, example)
    else:
        reference = Reference(model, masked, example, training=any(group.training for group in graph.groups))
        restore = restore_point(target)
        try:
            collapse(target, plan, masked)
            reference.check(target)
        except BaseException:
            restore()
            raise
    after = cost.parameters(target), cost.macs(target, example)
    report = Report(tuple(rows), graph.frozen, before[0], after[0], before[1], after[1])
    return Pruned(target, report, plan, masked)


def _pairs(group: ChannelGroup, bias: bool) -> list[Pair]:
    """The group's consumers with their adapters; without ``bias`` the layers keep theirs."""
    consumers = [c if bias else replace(c, bias=None) for c in group.consumers or group.training]
    return [Pair(consumer, find(consumer)) for consumer in consumers]


def _alive(pairs: list[Pair], supports: list[tuple[ChannelGroup, Tensor]], state: Mapping[str, Tensor]) -> list[Tensor]:
    """Per consumer, the columns whose channels no earlier group has dropped, (d,) bool."""
    ones = {name: torch.ones_like(tensor) for pair in pairs for name, tensor in pair.parameters(state).items()}
    ones |= {name: mask for name, mask in masked_weights(supports, {**state, **ones}).items() if name in ones}
    return [pair.matrix(ones).bool().any(0) for pair in pairs]


def _problem(
    model: nn.Module,
    group: ChannelGroup,
    pairs: list[Pair],
    alive: list[Tensor],
    data: Calibration,
    masked: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> GroupLasso:
    if group.consumers:
        moments = gather(model, {pair.consumer.weight: pair for pair in pairs}, data, weights=masked)
    else:  # nothing is known of what a head reads that runs in training only: as if it were white
        moments = {pair.consumer.weight: SecondMoments.white(pair.matrix(state)) for pair in pairs}
    blocks = tuple(
        pair.block(moments[pair.consumer.weight].restricted(columns), state[pair.consumer.weight])
        for pair, columns in zip(pairs, alive, strict=True)
    )
    return GroupLasso(blocks, blocks[0].R.new_ones(group.size))


def _magnitude(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """L1 norm of every channel's filters over the producers."""
    magnitude = torch.zeros(group.size, dtype=torch.float64)
    for weight, dim in group.rows:
        rows = tensors[weight].detach().double().abs().movedim(dim, 0).flatten(1).sum(1).cpu()
        channels = group.slots[weight, dim]
        magnitude.index_add_(0, channels[channels >= 0], rows[channels >= 0])
    return magnitude.to(tensors[weight].device)


def _progress_bar(show: bool | None) -> Progress:
    show = sys.stderr.isatty() if show is None else show
    return Progress(console=Console(stderr=True), transient=True, disable=not show)
