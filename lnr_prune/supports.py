"""All channel groups of a network: their statistics, their supports, and the refit of all layers."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
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
from lnr_prune.report import GroupReport
from lnr_prune.ridge import LayerFit
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
        moments: Second moments of their inputs, in the original network; () while they are not in memory.
    """

    group: ChannelGroup
    pairs: tuple[Pair, ...]
    moments: tuple[SecondMoments, ...] = ()

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

        def mask(weight: str) -> Tensor:
            return masks.get(weight, tensors[weight].new_ones(())).expand_as(tensors[weight])

        return tuple(pair.columns(mask(pair.consumer.weight), bias=1.0) for pair in self.pairs)


def read(
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    data: Calibration,
    *,
    bias: bool,
    progress: Callable[[], None] | None = None,
) -> dict[str, Reading]:
    """One pass over the calibration data: every group with its consumers' second moments, in order of execution."""
    pairs = {g: pairs_of(g, bias) for g in groups}
    readers = {pair.consumer.weight: pair for g, of_group in pairs.items() for pair in of_group if g.consumers}
    moments = gather(model, readers, data, progress=progress) if readers else {}
    tensors = named_tensors(model)
    for pair in (pair for of_group in pairs.values() for pair in of_group):
        if pair.consumer.weight not in moments:  # it runs in training only: nothing is known of its inputs
            moments[pair.consumer.weight] = SecondMoments.white(pair.matrix(tensors))
    return {
        g.name: Reading(g, of_group, tuple(moments[pair.consumer.weight] for pair in of_group))
        for g, of_group in pairs.items()
    }


def moments_of(weights: Container[str], readings: Mapping[str, Reading]) -> dict[str, SecondMoments]:
    """The moments of those of these layers that some groups are read by."""
    pairs = (pair for reading in readings.values() for pair in zip(reading.pairs, reading.moments, strict=True))
    return {pair.consumer.weight: moments for pair, moments in pairs if pair.consumer.weight in weights}


@dataclass(frozen=True, eq=False)
class Turns:
    """Channel groups with their second moments, some groups at a time: one pass over the calibration data a turn.

    Attributes:
        groups: The groups of every turn, in order of execution.
        read: Groups -> name of a group -> its reading.
    """

    groups: Sequence[Sequence[ChannelGroup]]
    read: Callable[[Sequence[ChannelGroup]], dict[str, Reading]]

    def __iter__(self) -> Iterator[dict[str, Reading]]:
        for groups in self.groups:
            readings = self.read(groups)
            yield readings
            readings.clear()  # their memory is for the next


@dataclass(frozen=True, eq=False)
class Selected:
    """A group whose channels are chosen.

    Attributes:
        reading: The group and its consumers, without their moments.
        selection: What was chosen; without coefficients if these were not asked for.
        error: ``E||y - M x||^2 / E||y||^2`` of its consumers in the original network, with the selection's M.
        kept: Per consumer, the columns that neither this nor an earlier group has dropped, (d,) bool.
    """

    reading: Reading
    selection: Selection
    error: float
    kept: tuple[Tensor, ...]


def select(
    turns: Iterable[Mapping[str, Reading]],
    choices: Mapping[str, Choice],
    tensors: Mapping[str, Tensor],
    *,
    solver: str | Solver,
    generator: torch.Generator,
    coefficients: bool = True,
    progress: Callable[[str], None],
) -> dict[str, Selected]:
    """Chooses every group's channels on the original network's second moments, in order of execution.

    Columns that an earlier group has dropped from a layer (a concatenation's) are out of the later ones' problems.
    Processes that prune together share out the groups of a turn that read different layers.
    """
    masks: dict[str, Tensor] = {}
    selected: dict[str, Selected] = {}

    def choose(reading: Reading, draws: Tensor) -> tuple[Selection, float]:
        name = reading.group.name
        progress(f"selecting {name}")
        problem = reading.problem(tensors, masks)
        original = tuple(pair.matrix(tensors) for pair in reading.pairs)
        selection = choices[name](Candidates(problem, original, _magnitude(reading.group, tensors), solver, draws))
        error = problem.error(selection.coefficients)
        return selection if coefficients else replace(selection, coefficients=()), error

    for readings in turns:
        for names in _independent(readings):
            draws = [torch.rand(readings[name].group.size, generator=generator) for name in names]
            tasks = {name: partial(choose, readings[name], u) for name, u in zip(names, draws, strict=True)}
            done = resume.spread("channels of", tuple[Selection, float], tasks)
            for name, (selection, error) in zip(names, done, strict=True):
                reading = replace(readings[name], moments=())
                whole = _ones([reading.group], tensors)
                masks |= masked_weights([(reading.group, selection.support)], {**whole, **masks})
                selected[name] = Selected(reading, selection, error, reading.columns(tensors, masks))
    return selected


def as_selected(selected: Mapping[str, Selected], tensors: Mapping[str, Tensor]) -> Refit:
    """The coefficients as the selectors left them."""
    weights: dict[str, Tensor] = {}
    for of_group in selected.values():
        for pair, M, kept in zip(of_group.reading.pairs, of_group.selection.coefficients, of_group.kept, strict=True):
            weights |= pair.write(M * kept, {**tensors, **weights})
    return Refit(weights, {})


def row_of(
    group: ChannelGroup,
    chosen: Selected | None,
    fits: Mapping[str, LayerFit],
    predicted: float | None,
    refitted: bool,
) -> GroupReport:
    """The group's row of the report: as it was chosen (None = it stays whole), or as its consumers were refitted."""
    consumers = tuple(consumer.name for consumer in group.consumers)
    row = GroupReport(group.name, group.producers, consumers, group.size, group.size)
    if chosen is None:
        return row
    selection, fitted = chosen.selection, [fits[c.weight] for c in group.consumers if c.weight in fits]
    if fitted:
        scale = sum(fit.scale for fit in fitted)
        error = sum(fit.error for fit in fitted) / scale if scale > 0 else 0.0
    elif refitted and consumers:  # they read what they did in the original network, and stay as they are
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
    supports: Mapping[str, Tensor],
    data: Calibration,
    *,
    repeated: Mapping[str, SecondMoments],
    bias: bool,
    ridge: float | None = None,
    logits: bool = False,
    tandem: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Refit:
    """Refits every linear layer of the network, pruned or not, in one sweep; see `refit`.

    Layers that are applied repeatedly are refitted on the original network's moments, ``repeated``.
    """
    tensors = named_tensors(model)
    chosen = [(group, supports[group.name]) for group in graph.groups if group.name in supports]
    return refit(
        model,
        refitted(graph, (group for group, _ in chosen), bias),
        _kept(chosen, tensors, bias),
        data,
        repeated=repeated,
        ridge=ridge,
        bias=bias,
        logits=logits,
        tandem=tandem,
        rows=_alive(chosen, tensors),
        progress=None if progress is None else lambda layer: progress(f"refitting {layer}"),
    )


def refitted(graph: Graph, groups: Iterable[ChannelGroup], bias: bool) -> dict[str, Pair]:
    """The layers that a refit reaches when these groups are pruned, in order of execution: weight's name -> layer."""
    pairs = {pair.consumer.weight: pair for group in groups for pair in pairs_of(group, bias)}
    for layer in graph.layers:
        if layer.weight not in graph.repeated and layer.weight not in pairs:
            with suppress(AdapterError):  # nobody can read it: it stays as it is
                pairs[layer.weight] = paired(layer, bias)
    order = {layer.weight: position for position, layer in enumerate(graph.layers)}
    return dict(sorted(pairs.items(), key=lambda entry: order.get(entry[0], len(order))))


def _kept(
    chosen: Sequence[tuple[ChannelGroup, Tensor]], tensors: Mapping[str, Tensor], bias: bool
) -> dict[str, Tensor]:
    """Weight's name -> the columns that supports leave, (d,) bool."""
    masks, kept = masked_weights(chosen, _ones((group for group, _ in chosen), tensors)), dict[str, Tensor]()
    for reading in (Reading(group, pairs_of(group, bias)) for group, _ in chosen):
        names = (pair.consumer.weight for pair in reading.pairs)
        kept |= dict(zip(names, reading.columns(tensors, masks), strict=True))
    return kept


def _alive(chosen: Sequence[tuple[ChannelGroup, Tensor]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight's name -> the rows that supports leave, (h,) bool, of layers that lose some."""
    alive: dict[str, Tensor] = {}
    for group, support in chosen:
        keep = torch.cat([support.cpu(), torch.ones(1, dtype=torch.bool)])
        for weight, dim in group.rows:
            rows = keep[group.slots[weight, dim].cpu()].to(tensors[weight].device)
            alive[weight] = alive[weight] & rows if weight in alive else rows
    return alive


def pairs_of(group: ChannelGroup, bias: bool) -> tuple[Pair, ...]:
    """The layers that read a group, or that do so in training if nobody else does, with their adapters."""
    return tuple(paired(consumer, bias) for consumer in group.consumers or group.training)


def _ones(groups: Iterable[ChannelGroup], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the groups' consumers, those in training included, that leave everything: of one row each."""
    consumers = (consumer for group in groups for consumer in (*group.consumers, *group.training))
    return {c.weight: tensors[c.weight].detach().narrow(1 - c.dim, 0, 1).clone().fill_(1) for c in consumers}


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
