"""What a prune returns."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lnr_prune.calibration.calls import Call
from lnr_prune.collapse import files
from lnr_prune.collapse.hugging_face import folder as folders
from lnr_prune.collapse.plan import Plan
from lnr_prune.graph.groups import ChannelGroup, Graph
from lnr_prune.refit.refit import Refitted
from lnr_prune.refit.regression import LayerFit
from lnr_prune.report.report import Report
from lnr_prune.report.rows import GroupReport
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
    """

    params: int
    macs: int
    size: int

    @classmethod
    def of(cls, model: nn.Module, example: Call) -> "Costs":
        """The costs of a model; ``example`` is a call of it."""
        return cls(cost.parameters(model), cost.macs(model, example), cost.size(model))


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
    before, after = costs
    return Report(
        rows, layers, error, graph.frozen,
        before.params, after.params, before.macs, after.macs, before.size, after.size, *seconds, folded, walk,
    )  # fmt: skip


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
