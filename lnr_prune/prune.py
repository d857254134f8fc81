"""The front door: prune a model by linear neural reconstruction."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from lnr_prune import cost, distributed, files, resume
from lnr_prune.allocation import Allocation, Budget, check_reach
from lnr_prune.amount import check_amounts, choose_channels, groups_of
from lnr_prune.arguments import check_flags, check_settings, check_values
from lnr_prune.calibration import Call, Inputs, calibrate, short_example
from lnr_prune.collapse import collapse, restore_point
from lnr_prune.curves import check_logits, output_error, some
from lnr_prune.errors import GraphError
from lnr_prune.fingerprint import fingerprint
from lnr_prune.graph import find_groups, named_tensors
from lnr_prune.memory import available_memory, memory_plan
from lnr_prune.plan import Plan, make_plan
from lnr_prune.pruned_graph import pruned_graph
from lnr_prune.report import LayerReport, Report
from lnr_prune.search import costs_of, within_budget
from lnr_prune.solvers import Solver, find_solver
from lnr_prune.supports import Turns, as_selected, moments_of, read, refit_network, row_of, select
from lnr_prune.verify import Reference, copied, masked_weights, shrinkable

logger = logging.getLogger("lnr_prune")


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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the pruned model to a safetensors file, with the plan, the report and the original's fingerprint.

        `load` reads it. All parameters and buffers are stored, tied ones once, with the values that they have
        now; the report without its latencies, so that the same prune gives the same bytes. An existing file is
        replaced, and stays as it is if anything fails.

        Raises:
            PlanError: If the model no longer has the shapes that it was pruned to, or its state is not all tensors.
            OSError: If the file cannot be written.
        """
        report = replace(self.report, latency_before=None, latency_after=None)
        files.save_model(path, self.model, self.plan, report)


@distributed.together()
def prune(
    model: nn.Module,
    calibration: Any,
    *,
    keep: float | Mapping[str, float] | None = None,
    lam: float | Mapping[str, float] | None = None,
    lam_ratio: float | Mapping[str, float] | None = None,
    budget: Budget | None = None,
    selector: str = "group_lasso",
    solver: str | Solver = "newton",
    bias: bool = True,
    debias: bool = True,
    ridge: float | None = None,
    logits: bool = False,
    tandem: int = 0,
    inputs: Inputs | None = None,
    inplace: bool = False,
    as_graph: bool = False,
    low_memory: bool = False,
    seed: int = 0,
    progress: bool | Callable[[str], None] | None = None,
    work: str | os.PathLike[str] | None = None,
) -> Pruned:
    """``min_M 1/2 E||y - M x||^2 + lam sum_g w_g ||M[:, g]||_F`` for every layer, then removes the zero groups.

    One pass over the calibration data gathers the second moments of all layers, on which the channels of each
    group are chosen. A second one refits every linear layer, in order of execution, whether it lost channels
    or not: inputs from the network pruned so far, outputs from the original one. At last the channels
    are taken out physically, and the smaller model is compared with the masked one.

    Where torch.distributed is initialised, every rank must call this, with a shard of its own of the calibration data,
    and gets the same pruned model; see `lnr_prune.distributed`, whose ``alone()`` prunes on one rank.

    Args:
        model: A trained model that torch.export can trace. It is not modified unless ``inplace``.
        calibration: Unlabelled inputs, any iterable of batches: tensors, ``(input, label)`` pairs (labels
            are ignored), tuples of arguments, or dicts of keyword arguments.
        keep: Channels to keep of every group: a count (int), or a fraction in (0, 1] (float); or a mapping
            from producers' names to one of these, of each of their groups, which leaves all others whole.
        lam: Instead, the penalty; or a mapping from producers' names.
        lam_ratio: Instead, the penalty as a fraction of each group's lambda_max; or a mapping.
        budget: Instead, what the pruned model may cost; see `Budget`. Channels are removed where the outputs,
            measured on some of the calibration data, suffer least.
        selector: How channels are chosen: "group_lasso", "backward" (elimination; better at strong pruning),
            "backward_swap", or the baselines "norm" and "random". A penalty needs "group_lasso".
        solver: Name or settings of the solver, see `solve`.
        bias: Whether the consumers' biases are refitted too.
        debias: Whether the kept columns are refitted, by least squares. If not, they stay as the selector
            left them: shrunk by the lasso, or the original ones.
        ridge: Ridge of the refit towards the original weights, as a fraction of the inputs' mean second moment;
            default: chosen on held-out samples, layer by layer.
        logits: Whether the model's output is the logits of classes: the layer that gives them is then fitted to
            the probabilities, and errors of the outputs are measured between these, by Kullback-Leibler divergences
            instead of squares.
        tandem: Iterations in which a layer that alone reads what another one makes is refitted once more, together with
            that one: less is lost, the more is pruned the more so. 10 give most of it, and take as long as about
            thirty forward passes of the calibration data. 0 = none.
        inputs: Turns a batch of any other form into ``(args, kwargs)`` of the model.
        inplace: Shrinks ``model`` itself. If anything fails it is as before.
        as_graph: Returns a `PrunedGraph`, a GraphModule of ATen operations for evaluation only, instead of a
            module of the model's class. No channels stay then because the model's forward holds their number.
        low_memory: Gathers the second moments of a few groups at a time, which are gone when the channels of these
            are chosen, with one more pass over the calibration data for every few (two with a budget): the result
            is the same.
        seed: Of the "random" selector.
        progress: Whether to show a progress bar; default: if stderr is a terminal. Or a function that is called
            with what is being done.
        work: A folder in which statistics, finished groups and refitted layers are kept, so that a run that was
            killed goes on from there when it is called again in the same way, and ends with the same result; see
            `lnr_prune.resume`. The batches must be the same in every pass. The folder stays when all is done: the
            same call again takes little time then; remove it when the pruned model is saved.

    Returns:
        A `Pruned` with the smaller model, the report and the plan.

    Raises:
        ValueError, TypeError: If an argument is out of range, or names no prunable layer, or the work folder belongs
            to a run of another model, other arguments or data.
        CalibrationError: If the calibration data is empty, not finite, or not accepted by the model. In a process
            group, a `RankError` if another rank fails.
        GraphError: If the model cannot be traced or copied, is wrapped, or has no channel that can be pruned.
        LnrPruneError: If the second moments of its layers do not fit into memory; it says what would. If another run
            is using the work folder.
        OSError: If the work folder cannot be written.
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
    amounts: dict[str, Any] = {"keep": keep, "lam": lam, "lam_ratio": lam_ratio, "budget": budget, "selector": selector}
    flags = {"bias": bias, "debias": debias, "logits": logits, "as_graph": as_graph}
    check_amounts(**amounts)
    check_flags(**flags, inplace=inplace, low_memory=low_memory)
    if inplace and as_graph:
        raise ValueError("as_graph=True makes a new model; it cannot be combined with inplace=True")
    if as_graph and budget is not None and budget.latency is not None:
        raise ValueError("a budget of latency is measured on the shrinking module: it cannot be had with as_graph=True")
    if budget is not None and budget.search and not debias:
        raise ValueError("budget.search refits the network in every trial: it cannot be had with debias=False")
    if tandem and not debias:
        raise ValueError("tandem is a refit: it cannot be had with debias=False")
    check_settings(ridge=ridge, seed=seed, tandem=tandem, progress=progress, work=work)
    solver = find_solver(solver)
    settings = {**amounts, **flags, "solver": solver, "ridge": ridge, "tandem": tandem, "seed": seed}
    distributed.same("arguments", repr((settings, low_memory, work is None)))
    data = calibrate(model, calibration, inputs)
    distributed.whole(model)
    distributed.same("weights", distributed.checksums(model))
    check_values(model)
    example, *_ = distributed.everyone(short_example(model, data))
    if logits:
        check_logits(model, example)
    graph = find_groups(model, *example)
    target = model if inplace or as_graph else copied(model, example)
    if not as_graph:
        groups, fixed = shrinkable(target, graph.groups, example)
        graph = replace(graph, groups=groups, frozen={**graph.frozen, **fixed})
    if not graph.groups:
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in graph.frozen.items())
        raise GraphError(f"{type(model).__name__} has no channel that can be pruned. {reasons or 'It has no layers'}")
    tensors = named_tensors(model)
    if budget is None:
        choices = choose_channels(graph, keep=keep, lam=lam, lam_ratio=lam_ratio, selector=selector)
        wanted = [group for group in graph.groups if group.name in choices]
    else:
        stay = {name for layer in budget.leave for name in groups_of(graph, layer, "budget.leave")}
        wanted = [group for group in graph.groups if group.name not in stay]
        check_reach(costs_of(model, graph, {group.name for group in wanted}, example), wanted, budget)

    with _shown(progress) as step, resume.folder(work, model, data, settings) as data:
        tried = budget is not None and budget.refits + budget.search > 0
        needed = partial(memory_plan, graph, wanted, tensors, bias=bias, refit=debias, tandem=tandem, tried=tried)
        memory = needed(low_memory=low_memory)
        memory.check(available_memory(next(iter(tensors.values())).device), needed(low_memory=True))
        gathered = partial(read, model, data=data, bias=bias, progress=lambda: step("statistics"))
        readings = gathered(memory.lasting)
        turns = [readings] if len(memory.turns) == 1 else Turns(memory.turns, gathered)
        repeated = moments_of(graph.repeated, readings)
        predicted: Mapping[str, float] = {}
        if budget is not None:
            given = partial(
                within_budget, repeated=repeated, traced=example, bias=bias, debias=debias, logits=logits, progress=step
            )
            allocated = partial(given, model, target, graph, turns, data, budget)
            allocation = resume.remembered("allocation", Allocation, allocated)
            choices, predicted = choose_channels(graph, keep=allocation.sizes, selector=selector), allocation.errors
        generator = torch.Generator().manual_seed(seed)
        selected = select(
            turns, choices, tensors, solver=solver, generator=generator, coefficients=not debias, progress=step
        )
        readings.clear()  # but for the layers that are applied repeatedly, the moments have had their use
        chosen = {name: of_group.selection.support for name, of_group in selected.items()}
        if debias:
            done = refit_network(
                model, graph, chosen, data,
                repeated=repeated, bias=bias, ridge=ridge, logits=logits, tandem=tandem, progress=step,
            )  # fmt: skip
        else:
            done = as_selected(selected, tensors)

    supports = [(group, chosen[group.name]) for group in wanted]
    plan = make_plan(supports)
    plan = replace(plan, original=fingerprint(model, plan.attributes))
    masked = {**masked_weights(supports, tensors), **done.weights}
    rows = tuple(row_of(g, selected.get(g.name), done.layers, predicted.get(g.name), debias) for g in graph.groups)
    layers = tuple(fit.row(layer.name) for layer in graph.layers if (fit := done.layers.get(layer.weight)))
    _warn_of_few_samples(layers)
    before = _costs(model, example)
    error = output_error(model, some(data), logits)(masked)
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
    after = _costs(target, example)
    costs = {f"{kind}_{when}": of[kind] for when, of in (("before", before), ("after", after)) for kind in of}
    timed = partial(cost.side_by_side, [model, target], example)
    latencies = distributed.spread([timed])[0] if target is not model else (None, None)
    report = Report(rows, layers, error, graph.frozen, **costs, latency_before=latencies[0], latency_after=latencies[1])
    return Pruned(target, report, plan, masked)


def _costs(model: nn.Module, example: Call) -> dict[str, int]:
    """As the report names them."""
    return {"params": cost.parameters(model), "macs": cost.macs(model, example), "size": cost.size(model)}


def _warn_of_few_samples(layers: tuple[LayerReport, ...]) -> None:
    few = [layer for layer in layers if layer.samples < 2 * layer.columns]
    if few:
        worst = min(few, key=lambda layer: layer.samples / layer.columns)
        logger.warning(
            "%d of %d layers were fitted to fewer than two samples a column (%r to %d samples of %d columns): "
            "give more calibration data",
            len(few), len(layers), worst.name, worst.samples, worst.columns,
        )  # fmt: skip


@contextmanager
def _shown(progress: bool | Callable[[str], None] | None) -> Iterator[Callable[[str], None]]:
    """Shows what is being done."""
    if callable(progress):
        yield progress
        return
    show = sys.stderr.isatty() and distributed.rank() == 0 if progress is None else progress
    with Progress(console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task("", total=None)
        yield lambda doing: bar.update(task, description=doing, advance=1)
