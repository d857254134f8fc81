"""All channel groups of a network: their statistics, their supports, and the refit of all layers."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lnr_prune import resume
from lnr_prune.amount import Choice
from lnr_prune.calibration import Calibration
from lnr_prune.errors import AdapterError
from lnr_prune.graph import ChannelGroup, Consumer, Graph, named_tensors
from lnr_prune.problem import GroupLasso
from lnr_prune.refit import Refit, refit
from lnr_prune.registry import Pair, find
from lnr_prune.selection import Candidates, Selection
from lnr_prune.solvers import Solver
from lnr_prune.statistics import SecondMoments, gather
from lnr_prune.verify import masked_weights


@dataclass(frozen=True, eq=False)
class Reading:
    """A group and the layers that read it.

    Attributes:
        group: The group.
        pairs: Its consumers, with their adapters.
        moments: Second moments of their inputs, in the original network.
    """

    group: ChannelGroup
    pairs: tuple[Pair, ...]
    moments: tuple[SecondMoments, ...]

    def problem(self, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> GroupLasso:
        """The group lasso of its channels, on the columns that the masks leave (weight's name -> 0 or 1)."""
        kept = self.columns(tensors, masks or {})
        blocks = [
            sums.through(pair.matrix(tensors)).restricted(columns).block(pair.groups(tensors))
            for pair, sums, columns in zip(self.pairs, self.moments, kept, strict=True)
        ]
        return GroupLasso(tuple(blocks), blocks[0].R.new_ones(self.group.size))

    def columns(self, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Per consumer, the columns that the masks leave, (d,) bool."""
        return tuple(
            pair.columns(masks.get(pair.consumer.weight, torch.ones_like(tensors[pair.consumer.weight])), bias=1.0)
            for pair in self.pairs
        )


def read(
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    data: Calibration,
    *,
    bias: bool,
    progress: Callable[[], None] | None = None,
) -> dict[str, Reading]:
    """One pass over the calibration data: every group with its consumers' second moments, in order of execution."""
    pairs = {g: tuple(paired(consumer, bias) for consumer in g.consumers or g.training) for g in groups}
    readers = {pair.consumer.weight: pair for g, of_group in pairs.items() for pair in of_group if g.consumers}
    moments = gather(model, readers, data, progress=progress)
    tensors = named_tensors(model)
    for pair in (pair for of_group in pairs.values() for pair in of_group):
        if pair.consumer.weight not in moments:  # it runs in training only: nothing is known of its inputs
            moments[pair.consumer.weight] = SecondMoments.white(pair.matrix(tensors))
    return {
        g.name: Reading(g, of_group, tuple(moments[pair.consumer.weight] for pair in of_group))
        for g, of_group in pairs.items()
    }


@dataclass(frozen=True, eq=False)
class Selected:
    """A group whose channels are chosen.

    Attributes:
        reading: The group and its consumers.
        selection: What was chosen.
        error: ``E||y - M x||^2 / E||y||^2`` of its consumers in the original network, with the selection's M.
        kept: Per consumer, the columns that neither this nor an earlier group has dropped, (d,) bool.
    """

    reading: Reading
    selection: Selection
    error: float
    kept: tuple[Tensor, ...]


def select(
    readings: Mapping[str, Reading],
    choices: Mapping[str, Choice],
    tensors: Mapping[str, Tensor],
    *,
    solver: str | Solver,
    generator: torch.Generator,
    progress: Callable[[str], None],
) -> dict[str, Selected]:
    """Chooses every group's channels on the original network's second moments, in order of execution.

    Columns that an earlier group has dropped from a layer (a concatenation's) are out of the later ones' problems.
    Processes that prune together share out the groups that read different layers.
    """
    masks: dict[str, Tensor] = {}
    selected: dict[str, Selected] = {}

    def choose(name: str, draws: Tensor) -> tuple[Selection, float]:
        progress(f"selecting {name}")
        reading = readings[name]
        problem = reading.problem(tensors, masks)
        original = tuple(pair.matrix(tensors) for pair in reading.pairs)
        selection = choices[name](Candidates(problem, original, _magnitude(reading.group, tensors), solver, draws))
        return selection, problem.error(selection.coefficients)

    for names in _independent(readings):
        draws = [torch.rand(readings[name].group.size, generator=generator) for name in names]
        tasks = {name: partial(choose, name, drawn) for name, drawn in zip(names, draws, strict=True)}
        done = resume.spread("channels of", tuple[Selection, float], tasks)
        for name, (selection, error) in zip(names, done, strict=True):
            reading = readings[name]
            masks |= masked_weights([(reading.group, selection.support)], {**_ones([reading.group], tensors), **masks})
            selected[name] = Selected(reading, selection, error, reading.columns(tensors, masks))
    return selected


def _independent(readings: Mapping[str, Reading]) -> list[list[str]]:
    """The groups' names in runs, within which no two are read by the same layer."""
    runs: list[list[str]] = []
    read_by: set[str] = set()
    for name, reading in readings.items():
        consumers = {pair.consumer.weight for pair in reading.pairs}
        if not runs or read_by & consumers:
            runs.append([])
            read_by = set()
        runs[-1].append(name)
        read_by |= consumers
    return runs


def refit_network(
    model: nn.Module,
    graph: Graph,
    readings: Mapping[str, Reading],
    supports: Mapping[str, Tensor],
    data: Calibration,
    *,
    bias: bool,
    ridge: float | None = None,
    logits: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Refit:
    """Refits every linear layer of the network, pruned or not, in one sweep; see `refit`.

    Layers that are applied repeatedly are refitted on the original network's moments.
    """
    tensors = named_tensors(model)
    read_by = {name: readings[name] for name in supports}
    chosen = [(readings[name].group, support) for name, support in supports.items()]
    masks = masked_weights(chosen, _ones((group for group, _ in chosen), tensors))
    pairs: dict[str, Pair] = {}
    kept: dict[str, Tensor] = {}
    repeated: dict[str, SecondMoments] = {}
    for reading in read_by.values():
        for pair, moments, columns in zip(reading.pairs, reading.moments, reading.columns(tensors, masks), strict=True):
            name = pair.consumer.weight
            pairs[name], kept[name] = pair, columns
            if name in graph.repeated:
                repeated[name] = moments
    for layer in graph.layers:
        if layer.weight not in graph.repeated and layer.weight not in pairs:
            with suppress(AdapterError):  # nobody can read it: it stays as it is
                pairs[layer.weight] = paired(layer, bias)
    order = {layer.weight: position for position, layer in enumerate(graph.layers)}
    pairs = dict(sorted(pairs.items(), key=lambda entry: order.get(entry[0], len(order))))
    return refit(
        model,
        pairs,
        kept,
        data,
        repeated=repeated,
        ridge=ridge,
        bias=bias,
        logits=logits,
        progress=None if progress is None else lambda layer: progress(f"refitting {layer}"),
    )


def _ones(groups: Iterable[ChannelGroup], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the groups' consumers, those in training included, that leave everything."""
    names = {consumer.weight for group in groups for consumer in (*group.consumers, *group.training)}
    return {name: torch.ones_like(tensors[name]) for name in sorted(names)}


def paired(consumer: Consumer, bias: bool) -> Pair:
    """A layer with its adapter; without ``bias`` it keeps its own."""
    consumer = consumer if bias else replace(consumer, bias=None)
    return Pair(consumer, find(consumer))


def _magnitude(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """L1 norm of every channel's filters over the producers."""
    magnitude = torch.zeros(group.size, dtype=torch.float64)
    for weight, dim in group.rows:
        rows = tensors[weight].detach().double().abs().movedim(dim, 0).flatten(1).sum(1).cpu()
        channels = group.slots[weight, dim]
        magnitude.index_add_(0, channels[channels >= 0], rows[channels >= 0])
    return magnitude.to(tensors[weight].device)
