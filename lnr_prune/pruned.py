"""What a prune returns."""

import os
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune._version import __version__
from lnr_prune.calibration.calls import Call
from lnr_prune.collapse import files
from lnr_prune.collapse.hugging_face import folder as folders
from lnr_prune.collapse.plan import Plan
from lnr_prune.graph.groups import ChannelGroup, Graph, layers_between
from lnr_prune.refit.refit import Refitted
from lnr_prune.refit.regression import LayerFit
from lnr_prune.report.report import Report
from lnr_prune.report.rows import GroupReport, ModuleCost
from lnr_prune.report.walk import Walk
from lnr_prune.runtime.processes import Ranks
from lnr_prune.selection.costs import cost
from lnr_prune.selection.select import Selected


@dataclass(frozen=True, eq=False)
class Pruned:
    """What `prune` returns.

    Attributes:
        model: The smaller model, of the original's class. It is not compiled: call torch.compile again.
        report: What was done to every group; ``print(pruned.report)``.
        plan: Which indices of which parameters were kept.
        masked: Full-size parameters (name -> tensor) of the masked model, which computes the same:
            ``torch.func.functional_call(original, pruned.masked, inputs)`` equals ``pruned.model(inputs)``. If the
            report says that weights were folded, the original is ``lnr.fold(model)``, whose names these are.
    """

    model: nn.Module
    report: Report
    plan: Plan
    masked: Mapping[str, Tensor]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the pruned model to a safetensors file, with the plan, the report and the original's fingerprint.

        `load` reads it. All parameters and buffers are stored, tied ones once, with the values that they have
        now. The report is stored without its latencies, so that the same prune gives the same bytes. An existing
        file is replaced, but stays as it is if anything fails.

        Raises:
            PlanError: If the model no longer has the shapes that it was pruned to, or its state is not all tensors.
            OSError: If the file cannot be written.
        """
        files.save_model(path, self.model, self.plan, self._kept)

    def save_pretrained(self, folder: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Writes a model of Hugging Face's transformers to a folder: safetensors, settings, and the tokenizer if given.

        If the model's settings can say how large its layers are now, this is an ordinary folder: plain
        ``AutoModel.from_pretrained``, vLLM and converters read it. If they cannot, since layers that the settings count
        together have different widths, the folder holds the plan as well; then `from_pretrained` of this package loads
        it, and a warning says so. ``Budget(uniform=True)`` keeps widths equal.

        Args:
            folder: The folder; it is made if it does not exist.
            tokenizer: A tokenizer or processor, which is saved there, too.

        Raises:
            LnrPruneError: If the model is none of transformers.
            PlanError: If the model no longer has the shapes that it was pruned to, or was pruned twice: give it the
                joint plan, ``dataclasses.replace(second, plan=first.plan.then(second.plan))``.
            OSError: If a file cannot be written.
        """
        folders.save_folder(folder, self.model, self.plan, self._kept, tokenizer)

    @property
    def _kept(self) -> Report:
        """The report as it is stored: the same prune gives the same bytes."""
        return replace(self.report, latency_before=None, latency_after=None)


@dataclass(frozen=True)
class Costs:
    """What a model costs.

    Attributes:
        params: Number of parameters.
        macs: Multiply-accumulates for one sample.
        size: Bytes of the parameters and buffers.
        modules: Module -> its own parameters, and its own multiply-accumulates; in the model's order.
    """

    params: int
    macs: int
    size: int
    modules: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, model: nn.Module, example: Call) -> "Costs":
        """The costs of a model; ``example`` is a call of it."""
        macs, by_module = cost.macs_by_module(model, example)
        params = Counter[str]()
        for name, parameter in model.named_parameters():
            params[name.rpartition(".")[0]] += parameter.numel()
        modules = {name: (params[name], by_module.get(name, 0)) for name in dict.fromkeys((*params, *by_module))}
        return cls(cost.parameters(model), macs, cost.size(model), modules)


def latencies(model: nn.Module, small: nn.Module, example: Call, ranks: Ranks) -> tuple[float | None, float | None]:
    """Median seconds of a forward pass of each model; None if they are the same one."""
    timed = [] if small is model else [partial(cost.side_by_side, [model, small], example)]
    before, after = next(iter(ranks.share_out(timed)), (None, None))
    return before, after


def reported(
    graph: Graph,
    selected: Mapping[ChannelGroup, Selected],
    fitted: Refitted,
    predicted: Mapping[ChannelGroup, float],
    error: float,
    costs: tuple[Costs, Costs],
    seconds: tuple[float | None, float | None],
    folded: Mapping[str, str],
    walk: Walk | None,
    *,
    refitted: bool,
) -> Report:
    """The report of a prune.

    Args:
        graph: The model's channel groups.
        selected: The groups whose channels were chosen.
        fitted: The layers that were refitted.
        predicted: The errors of the groups that a budget predicted.
        error: Error of the outputs.
        costs: Costs before and after.
        seconds: Seconds of a forward pass, before and after.
        folded: Layer -> what was folded.
        walk: What a tolerance measured.
        refitted: Whether there was a refit.
    """
    rows = tuple(row_of(g, selected.get(g), fitted.layers, predicted.get(g), refitted) for g in graph.groups)
    fits = fitted.layers
    layers = tuple(fit.row(layer.name) for layer in graph.layers if (fit := fits.get(layer.weight)))
    rows = tuple(replace(row, through=layers_between(g, graph.flow)) for row, g in zip(rows, graph.groups, strict=True))
    before, after = costs
    return Report(
        rows, layers, error, graph.frozen,
        before.params, after.params, before.macs, after.macs, before.size, after.size, *seconds, folded,
        modules_of(before, after), graph.flow, versions(), walk=walk,
    )  # fmt: skip


def modules_of(before: Costs, after: Costs) -> tuple[ModuleCost, ...]:
    """What every module costs; a graph has the parameters of the original's modules, but not the modules."""
    known = any(macs for name, (_, macs) in after.modules.items() if name)
    found = [(name, now, after.modules.get(name, (0, 0))) for name, now in before.modules.items()]
    return tuple(
        ModuleCost(name, params, later[0], macs, later[1] if known else None) for name, (params, macs), later in found
    )


def versions() -> dict[str, str]:
    """The programs that make a pruned model."""
    return {"lnr-prune": __version__, "torch": str(torch.__version__), "Python": platform.python_version()}


def row_of(
    group: ChannelGroup,
    chosen: Selected | None,
    fits: Mapping[str, LayerFit],
    predicted: float | None,
    refitted: bool,
) -> GroupReport:
    """The group's row of the report, after the refit if its consumers were refitted; chosen = None: it stays whole."""
    consumers = tuple(consumer.name for consumer in group.consumers)
    row = GroupReport(group.name, group.producers, consumers, group.size, group.size)
    if chosen is None:
        return row
    selection, fitted = chosen.selection, [fits[c.weight] for c in group.consumers if c.weight in fits]
    if fitted:
        scale = sum(fit.scale for fit in fitted)
        error = sum(fit.error for fit in fitted) / scale if scale > 0 else 0.0
    elif refitted and consumers:  # they read the same as in the original network, and stay as they are
        error = 0.0
    else:
        error = chosen.error
    return replace(
        row,
        kept=int(selection.support.sum()),
        error=error,
        lam=selection.lam,
        gap=selection.gap,
        predicted=predicted,
        before_refit=chosen.error,
        note=selection.note,
    )
