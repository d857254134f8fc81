"""The front door: prune a model by linear neural reconstruction."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lnr_prune.calibration.calls import Call
from lnr_prune.calibration.data import Calibration, FixedCalibration, calibrate, first_samples
from lnr_prune.calibration.divergence import check_logits, output_error
from lnr_prune.calibration.examples import examples_of, further, kinds
from lnr_prune.calibration.reading import read_in_passes
from lnr_prune.collapse.hugging_face.settings import described
from lnr_prune.collapse.masks import Supports, masked_weights
from lnr_prune.collapse.plan import Plan, plan_for
from lnr_prune.collapse.remove import remove, warn_of_unused
from lnr_prune.collapse.trial import prunable
from lnr_prune.graph.groups import ChannelGroup, Graph
from lnr_prune.graph.module import Example, check_values, named_tensors, plain
from lnr_prune.graph.modules.folding import folded
from lnr_prune.graph.modules.guard import guarded
from lnr_prune.graph.weights import with_whole_stacks
from lnr_prune.pruned import Costs, Pruned, latencies, reported
from lnr_prune.refit.network import refit_network
from lnr_prune.refit.refit import Refit
from lnr_prune.report.walk import Walk
from lnr_prune.runtime.digest import digest, printed
from lnr_prune.runtime.identity import Identity
from lnr_prune.runtime.progress import counted
from lnr_prune.runtime.run import Run, started
from lnr_prune.runtime.work import Work, opened_folder
from lnr_prune.selection.allocation import check_reach
from lnr_prune.selection.amount import at_sizes
from lnr_prune.selection.budget import Budget
from lnr_prune.selection.costs.cost_model import costs_of
from lnr_prune.selection.costs.forecast import forecast
from lnr_prune.selection.costs.memory import MemoryPlan, available_memory, memory_plan
from lnr_prune.selection.search import within_budget
from lnr_prune.selection.select import as_selected, select, supports_of
from lnr_prune.selection.selectors import Selector
from lnr_prune.selection.trials import trials_of
from lnr_prune.settings import Amount, Settings
from lnr_prune.tolerance import Metric, Tolerance, within_tolerance


def prune(
    model: nn.Module,
    data: Any,
    amount: Amount,
    *,
    selector: str | Selector = "group_lasso",
    refit: Refit | None = Refit(),
    bias: bool = True,
    logits: bool | None = None,
    into: str = "copy",
    also: Any = None,
    run: Run = Run(),
) -> Pruned:
    """``min_M 1/2 E||y - M x||^2 + lam sum_g w_g ||M[:, g]||_F`` for every layer, then removes the zero groups.

    One pass over the calibration data gathers the second moments of all layers. From these, the channels of each
    group are chosen. A second pass refits every linear layer, in order of execution, whether it lost channels or
    not: its inputs come from the network pruned so far, its targets from the original one. Finally, the channels
    are taken out physically, and the smaller model is compared with the masked one.

    If torch.distributed is initialised, every rank must call this with its own shard of the calibration data, and
    every rank gets the same pruned model; see `lnr_prune.runtime.processes`. ``run=Run(alone=True)`` prunes on one
    rank.

    Args:
        model: A trained model that torch.export can trace. It is not modified unless ``into="model"``. Of a compiled
            model the one inside is pruned, and nothing is compiled meanwhile.
        data: Unlabelled calibration inputs, an iterable of batches: tensors or arrays, ``(input, label)`` pairs (labels
            are ignored), tuples of arguments, or dicts of keyword arguments. Or a data set of samples, which is read in
            batches of 64: a torch or Hugging Face Dataset, a data frame, a list of rows. See also `Batches`. Where an
            ``attention_mask`` among the arguments is zero, a batch is padding, which counts nowhere.
        amount: How much is kept. `Keep`: a count or share of the channels of every group. `Penalty`: as many as the
            group lasso keeps at a penalty. `Budget`: what the pruned model may cost; channels are removed where the
            outputs suffer least. `Tolerance`: as small as a metric of yours allows.
        selector: How channels are chosen: "group_lasso", "backward" (elimination; better at strong pruning), or the
            baselines "norm" and "random"; or settings: `Lasso`, `Backward`, `Norm`, `Random`. A `Penalty` needs a
            lasso.
        refit: How the layers are refitted. None = the coefficients stay as the selector left them: shrunk by the lasso,
            or the original ones.
        bias: Whether the consumers' biases are refitted, too.
        logits: Whether the model's output, or its entry ``logits``, is the logits of classes, on the last axis: of
            samples, or of the tokens of a language model. If so, the layer that gives them is fitted to the
            probabilities, and errors of the outputs are Kullback-Leibler divergences of the probabilities instead of
            squares. None = a layer that gives one output (samples, classes) is fitted to the probabilities if held-out
            samples then fit better, without fitting worse by squares; errors are measured by squares.
        into: What is shrunk: a "copy" of the model; the "model" itself, which is restored if anything fails; or a
            "graph", a `PrunedGraph` of ATen operations for evaluation only, which can lose channels even where the
            model's forward fixes their number. Weights that the model computes in every forward pass, such as those
            of weight norm, are folded into plain ones first (see `fold`), except for ``into="model"``: there they stay
            as they are, and their channels are frozen.
        also: Further calls that must stay valid, of which nothing is learned: a list of batches, or a dict from names
            of methods to lists of batches, such as ``{"embed": [x]}``. Layers that only they come to shrink with
            the others, but are not refitted.
        run: Settings that do not change the result: a work folder to resume from after a crash, memory, progress,
            processes.

    Returns:
        A `Pruned` with the smaller model, the report and the plan.

    Raises:
        ValueError, TypeError: If an argument is out of range, or names no prunable layer, or if the work folder
            belongs to a run with another model, other arguments or other data.
        CalibrationError: If the calibration data is empty, not finite, or not accepted by the model. In a process
            group, a `RankError` if another rank fails.
        GraphError: If the model cannot be traced or copied, is wrapped or scripted, or has no channel
            that can be pruned.
        LnrPruneError: If the second moments of its layers do not fit into memory; it says what would. Or if another
            run is using the work folder.
        OSError: If the work folder cannot be written.
        VerificationError: If the smaller model does not equal the masked one; your model is left as it was.

    References:
        docs/method.md explains every step.

    Example:
        >>> import torch, lnr_prune as lnr
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> pruned = lnr.prune(model, [torch.randn(256, 8)], lnr.Keep(0.5))
        >>> pruned.model
        Sequential(
          (0): Linear(in_features=8, out_features=16, bias=True)
          (1): ReLU()
          (2): Linear(in_features=16, out_features=4, bias=True)
        )
    """
    with guarded(model), started(run) as work, plain(model) as given:
        model, plainer = (given, {}) if into == "model" else folded(given)  # computed weights become plain ones
        settings = Settings.of(amount, selector, refit, bias, logits, into)
        if also and into == "graph":
            raise ValueError("a graph has the path of the first batch only: also= cannot be combined with into='graph'")
        data, examples = calibrated(model, data, also, settings, run, work)  # batches as calls, and a few small ones
        example, others = examples[0].call, examples[1:]
        logits = check_logits(model, example, logits)
        graph, target = prunable(model, example, into, others)  # the channel groups, and the module that will lose them
        groups, tensors = shrinking_groups(model, graph, settings, example), named_tensors(model)
        with remembering(run, model, data, examples, settings, work) as (data, work):
            memory = fitting_memory(graph, groups, tensors, settings, run)
            samples = work.ranks.before(data.samples)[1] or 0
            take_out = partial(without, model, graph, examples)
            metric = Metric(settings.evaluate, take_out, target, example, work)
            original = metric.original()  # before anything that takes long
            stages = forecast(
                model, graph, groups, data, example, refit,
                effort=settings.effort, evaluations=settings.evaluations, bias=bias, passes=len(memory.passes),
            )  # fmt: skip
            work = replace(work, step=counted(work.step, stages))
            passes = read_in_passes(model, memory.passes, memory.lasting, data, bias=bias, work=work)  # second moments
            choices, predicted = settings.choices(graph), dict[ChannelGroup, float]()
            walk: Walk | None = None
            if isinstance(amount, Budget | Tolerance):  # the sizes at which the outputs suffer least
                trials = trials_of(
                    model, model if target is None else target, graph, groups, passes, data,
                    samples=amount.effort.samples, refit=refit, bias=bias, logits=logits, work=work,
                )  # fmt: skip
                costs = costs_of(model, graph, groups, example)
                if isinstance(amount, Budget):
                    allocation = within_budget(trials, amount, costs)
                else:
                    allocation, walk = within_tolerance(
                        trials, amount, costs,
                        metric.of_sizes(trials, data, settings.selector, settings.seed), original,
                    )  # fmt: skip
                predicted = trials.promised(allocation, settings.selector, settings.seed)
                del trials  # frees what they remember
                choices = at_sizes(allocation.sizes, settings.selector)
            selected = select(  # the zero groups of the lasso, or what another selector drops
                passes, choices, tensors,
                samples=samples, seed=settings.seed, coefficients=refit is None, work=work,
            )  # fmt: skip
            supports, repeated = supports_of(selected), passes.moments_of(graph.repeated)
            passes.lasting.clear()  # the other moments are no longer needed
            if refit is None:
                fitted = as_selected(selected, tensors)
            else:  # least squares, layer by layer, from the pruned network's inputs to the original one's outputs
                fitted = refit_network(
                    model, graph, supports, data,
                    settings=refit, bias=bias, logits=logits, repeated=repeated, work=work,
                )  # fmt: skip
        masked = with_whole_stacks({**masked_weights(supports, tensors), **fitted.weights}, tensors)
        error = output_error(model, first_samples(data, ranks=work.ranks), logits, data.counts)(masked)
        before = Costs.of(model, example)
        small, plan = take_out(target, supports, masked)
        warn_of_unused(graph, plan, tensors)
        after, times = Costs.of(small, example), latencies(model, small, example, work.ranks)
    report = reported(
        graph, selected, fitted, predicted, error, (before, after), times, plainer, walk, refitted=refit is not None
    )
    return Pruned(small, report, plan, masked)


def calibrated(
    model: nn.Module, data: Any, also: Any, settings: Settings, run: Run, work: Work
) -> tuple[Calibration, list[Example]]:
    """Checks the arguments; returns the data as calls of the model, and small calls, the same on all processes."""
    ranks = work.ranks
    ranks.check_same("arguments", printed((settings, run.low_memory, run.work is None)))
    found = calibrate(model, data)
    ranks.check_same("weights", ranks.checksums(model))
    check_values(model)
    calls = dict[Hashable, Call]()
    for of_rank in ranks.all_gather(kinds(found)):
        calls = {**of_rank, **calls}
    return found, examples_of(model, list(calls.values()), further(model, also))


def shrinking_groups(model: nn.Module, graph: Graph, settings: Settings, example: Call) -> list[ChannelGroup]:
    """The groups that may lose channels; a budget that they cannot meet is refused before anything is measured."""
    amount = settings.amount
    if not isinstance(amount, Budget | Tolerance):
        return list(settings.choices(graph))
    groups, budget = amount.groups(graph), amount if isinstance(amount, Budget) else amount.at(1.0)
    check_reach(costs_of(model, graph, groups, example), groups, budget)
    return groups


def without(
    model: nn.Module,
    graph: Graph,
    examples: Sequence[Example],
    target: nn.Module | None,
    supports: Supports,
    masked: Mapping[str, Tensor],
) -> tuple[nn.Module, Plan]:
    """The model without the channels that the supports drop, and the plan that says so; see `remove`.

    Args:
        model: The whole model.
        graph: Its channel groups.
        examples: Calls that are compared; the first one is traced.
        target: The module that is shrunk; None = a graph is made instead.
        supports: What is kept.
        masked: Full-size weights of the masked model.
    """
    plan, training = plan_for(model, supports), any(group.training for group in graph.groups)
    return remove(
        model, target, plan, masked, examples[0].call,
        better=described(model, plan, supports), also=examples[1:], training=training,
    )  # fmt: skip


@contextmanager
def remembering(
    run: Run, model: nn.Module, data: Calibration, examples: Sequence[Example], settings: Settings, work: Work
) -> Iterator[tuple[Calibration, Work]]:
    """Within this, results are kept in the work folder, if there is one; the data must not change then."""
    if run.work is None:
        yield data, work
        return
    fixed = FixedCalibration(data.batches, data.as_call, data.counts)

    def identity() -> Identity:
        digests = work.ranks.all_gather(fixed.digests)
        also = [f"{each.method} {digest(each.call)}" for each in examples if not each.calibrated]
        return Identity.of(model, named_tensors(model), digests, {**settings.arguments, "also": also})

    with opened_folder(run.work, identity, work.ranks) as folder:
        yield fixed, replace(work, folder=folder)


def fitting_memory(
    graph: Graph, groups: Sequence[ChannelGroup], tensors: Mapping[str, Tensor], settings: Settings, run: Run
) -> MemoryPlan:
    """What the prune needs in memory, once it is known to fit.

    Raises:
        LnrPruneError: If it does not fit; the message says what would.
    """
    plan = partial(
        memory_plan, graph, groups, tensors, bias=settings.bias, refit=settings.refit, tried=settings.tries_refits
    )
    memory = plan(low_memory=run.low_memory)
    memory.check(available_memory(next(iter(tensors.values())).device), plan(low_memory=True))
    return memory
