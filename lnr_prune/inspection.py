"""Looking at a model's channel groups before anything is pruned."""

import io
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from lnr_prune.calibration.calls import samples_in
from lnr_prune.calibration.data import Batches, calibrate
from lnr_prune.calibration.examples import examples_of, further, kinds
from lnr_prune.collapse.trial import shrinkable
from lnr_prune.graph import drawing
from lnr_prune.graph.groups import ChannelGroup, find_groups, layers_between
from lnr_prune.graph.module import named_tensors, plain
from lnr_prune.graph.modules.folding import folded
from lnr_prune.graph.modules.guard import guarded
from lnr_prune.report.html import embedded, render
from lnr_prune.report.names import add, by_reason, joined, repeated, span, whole_names
from lnr_prune.selection.costs.cost import counted


@dataclass(frozen=True)
class GroupCost:
    """One channel group, and what a channel of it costs.

    Attributes:
        name: Name of the group, which is that of a producer; ``Keep({...})`` takes it.
        size: Number of channels.
        producers: Layers whose rows or filters are the channels.
        consumers: Layers that read them, including those that do so in training only.
        parameters: Parameters that leave with one channel, while other groups stay whole.
        macs: Multiply-accumulates that leave with it, for one sample.
        through: Layers in between that work channel by channel, such as depthwise convolutions.
    """

    name: str
    size: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    parameters: int
    macs: int
    through: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What can be pruned in a model, and what cannot.

    Attributes:
        groups: The channel groups, in order of execution.
        frozen: Layer whose outputs, or some of them, cannot be pruned -> why.
        reachable: Share of the parameters that belong to some group.
        flow: Pairs of layers: what the first computes goes into the second. Names in angle brackets are not layers,
            but the model's input and output, and operations where several layers' outputs meet, such as ``<add_3>``.
        folded: Layer -> which weight of it, computed in every forward pass, was made a plain parameter; see `fold`.
    """

    groups: tuple[GroupCost, ...]
    frozen: Mapping[str, str]
    reachable: float
    flow: tuple[tuple[str, str], ...] = ()
    folded: Mapping[str, str] = field(default_factory=dict)

    def to_dot(self) -> str:
        """The layers as a graph in the DOT language: a colour for each group, grey for what is frozen.

        A layer has the colour of the group of its outputs. Tooltips say what a channel costs, and why layers are
        frozen.
        """
        layers: dict[str, list[str]] = defaultdict(list)
        for group in self.groups:
            for layer in (*group.producers, *group.through):
                layers[layer].append(group.name)
        return drawing.to_dot(self.flow, layers, {group.name: _summary(group) for group in self.groups}, self.frozen)

    def draw(self, path: str | Path) -> Path:
        """Draws `to_dot` to a file: its text (.dot, .gv), or an image (.svg, .png, .pdf) if graphviz is installed.

        Raises:
            ValueError: If the file has another suffix.
            LnrPruneError: If graphviz is not installed, or fails.
        """
        return drawing.draw(self.to_dot(), path)

    def section(self) -> str:
        """The channel groups, as a part of a web page."""
        return render("inspection.html", found=self)

    def _repr_html_(self) -> str:
        return embedded(self.section())

    def __rich__(self) -> Table:
        table = Table(title="channel groups", caption=f"{self.reachable:.1%} of the parameters are in groups")
        whole_names(table, "producers", "consumers")
        for column in ("channels", "parameters each", "MACs each"):
            table.add_column(column, justify="right", overflow="fold")
        for rows in repeated(self.groups):
            add(
                table,
                joined(name for group in rows for name in group.producers),
                joined(name for group in rows for name in group.consumers),
                f"{rows[0].size:,}",
                span((group.parameters for group in rows), "{:,}".format),
                span((group.macs for group in rows), "{:,}".format),
            )
        for what, reasons in (("frozen", self.frozen), ("folded", self.folded)):
            for reason, layers in by_reason(reasons).items():
                add(table, ", ".join(layers), f"{what}: {reason}", "-", "-", "-")
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()


def inspect(model: nn.Module, example: Any, *, also: Any = None) -> Inspection:
    """The channel groups of a model: what `lnr_prune.prune` can remove, what it costs, what is frozen and why.

    Args:
        model: The model; it is left as it is.
        example: A batch, in any form that `lnr_prune.prune` takes. For any other form, give
            ``Batches([batch], inputs)``.
        also: Further calls that must stay valid, see `lnr_prune.prune`.

    Returns:
        An `Inspection`, which prints as a table.

    Raises:
        GraphError: If the model cannot be traced, or is wrapped, scripted or traced already.
        CalibrationError: If the model does not accept the example.

    Example:
        >>> import torch, lnr_prune as lnr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> found = lnr.inspect(model, torch.randn(2, 8))
        >>> [(group.name, group.size, group.parameters, group.macs) for group in found.groups]
        [('0', 32, 13, 12)]
        >>> dict(found.frozen)
        {'2': 'output of the model'}
    """
    with guarded(model), plain(model) as given:
        return _inspected(*folded(given), example, also)


def _inspected(model: nn.Module, made_plain: Mapping[str, str], example: Any, also: Any) -> Inspection:
    data = calibrate(model, example if isinstance(example, Batches) else [example])
    main, *others = examples_of(model, list(kinds(data).values()), further(model, also))
    call = main.call
    graph = counted(model, find_groups(model, *call, others), call)
    groups, fixed = shrinkable(model, graph.groups, call, others)
    tensors = named_tensors(model)
    trained = {name: parameter.numel() for name, parameter in model.named_parameters()}
    samples = samples_in(call)
    reached = {name for group in groups for name, _ in group.slots}

    def cost(group: ChannelGroup) -> GroupCost:
        # for each tensor, the share of one dimension's indices that a channel owns
        share = {
            (name, dim): int((channels == 0).sum()) / tensors[name].shape[dim]
            for (name, dim), channels in group.slots.items()
        }
        parameters = sum(trained.get(name, 0) * part for (name, _), part in share.items())
        macs = sum(graph.macs.get(name, 0) * part for (name, _), part in share.items())
        macs += sum(count * shares.get(group.name, 0.0) for count, shares in graph.products)
        consumers = tuple(consumer.name for consumer in (*group.consumers, *group.training))
        return GroupCost(
            group.name, group.size, group.producers, consumers, round(parameters), round(macs / samples),
            layers_between(group, graph.flow),
        )  # fmt: skip

    reachable = sum(size for name, size in trained.items() if name in reached) / max(1, sum(trained.values()))
    frozen, costs = {**graph.frozen, **fixed}, tuple(cost(group) for group in groups)
    return Inspection(costs, frozen, reachable, graph.flow, made_plain)


def _summary(group: GroupCost) -> str:
    costs = f"{group.size:,} channels of {group.parameters:,} parameters and {group.macs:,} MACs each"
    return f"{costs}, read by {', '.join(group.consumers)}"
