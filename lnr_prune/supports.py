"""The support of every channel group, on the second moments of the original network."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from rich.progress import Progress
from torch import Tensor, nn

from lnr_prune.amount import Choice
from lnr_prune.calibration import Calibration
from lnr_prune.graph import ChannelGroup, Consumer, Graph, named_tensors
from lnr_prune.problem import GroupLasso
from lnr_prune.registry import Pair, find
from lnr_prune.selection import Candidates, Selection
from lnr_prune.solvers import Solver
from lnr_prune.statistics import SecondMoments, gather
from lnr_prune.verify import masked_weights


@dataclass(frozen=True, eq=False)
class Selected:
    """A group whose channels are chosen.

    Attributes:
        group: The group.
        pairs: Its consumers, with their adapters.
        problem: The group lasso of its channels.
        selection: What was chosen.
        kept: Per consumer, the columns that neither this nor an earlier group has dropped, (d,) bool.
    """

    group: ChannelGroup
    pairs: tuple[Pair, ...]
    problem: GroupLasso
    selection: Selection
    kept: tuple[Tensor, ...]


def select(
    model: nn.Module,
    graph: Graph,
    choices: Mapping[str, Choice],
    data: Calibration,
    *,
    bias: bool,
    solver: str | Solver,
    generator: torch.Generator,
    bar: Progress,
) -> tuple[dict[str, Selected], dict[str, SecondMoments]]:
    """Chooses every group's channels on the original network's second moments, in order of execution.

    Columns that an earlier group has dropped from a layer (a concatenation's) are out of the later ones' problems.
    """
    tensors = named_tensors(model)
    groups = [group for group in graph.groups if group.name in choices]
    pairs = {group.name: tuple(paired(consumer, bias) for consumer in group.consumers) for group in groups}
    readers = {pair.consumer.weight: pair for of_group in pairs.values() for pair in of_group}
    task = bar.add_task("statistics", total=None)
    gathered = gather(model, readers, data, progress=lambda: bar.advance(task))
    bar.update(task, completed=0, total=len(groups))
    masks = {name: torch.ones_like(tensors[name]) for name in readers}
    selected: dict[str, Selected] = {}
    for group in groups:
        bar.update(task, description=f"selecting {group.name}")
        original = tuple(pair.matrix(tensors) for pair in pairs[group.name])
        problem = _problem(group, pairs[group.name], original, gathered, masks, tensors)
        candidates = Candidates(problem, original, _magnitude(group, tensors), solver, generator)
        selection = choices[group.name](candidates)
        masks |= masked_weights([(group, selection.support)], masks)
        kept = tuple(pair.columns(masks[pair.consumer.weight], bias=1.0) for pair in pairs[group.name])
        selected[group.name] = Selected(group, pairs[group.name], problem, selection, kept)
        bar.advance(task)
    return selected, gathered


def paired(consumer: Consumer, bias: bool) -> Pair:
    """A layer with its adapter; without ``bias`` it keeps its own."""
    consumer = consumer if bias else replace(consumer, bias=None)
    return Pair(consumer, find(consumer))


def _problem(
    group: ChannelGroup,
    pairs: tuple[Pair, ...],
    original: tuple[Tensor, ...],
    gathered: Mapping[str, SecondMoments],
    masks: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> GroupLasso:
    blocks = []
    for pair, W in zip(pairs, original, strict=True):
        columns = pair.columns(masks[pair.consumer.weight], bias=1.0)
        moments = gathered[pair.consumer.weight].through(W).restricted(columns)
        blocks.append(moments.block(pair.groups(tensors)))
    return GroupLasso(tuple(blocks), blocks[0].R.new_ones(group.size))


def _magnitude(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """L1 norm of every channel's filters over the producers."""
    magnitude = torch.zeros(group.size, dtype=torch.float64)
    for weight, dim in group.rows:
        rows = tensors[weight].detach().double().abs().movedim(dim, 0).flatten(1).sum(1).cpu()
        channels = group.slots[weight, dim]
        magnitude.index_add_(0, channels[channels >= 0], rows[channels >= 0])
    return magnitude.to(tensors[weight].device)
