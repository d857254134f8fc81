"""The support of every channel group, on the second moments of the original network."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lnr_prune.amount import Choice
from lnr_prune.calibration import Calibration
from lnr_prune.graph import ChannelGroup, Consumer
from lnr_prune.problem import GroupLasso
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
    pairs = {group: tuple(paired(consumer, bias) for consumer in group.consumers) for group in groups}
    readers = {pair.consumer.weight: pair for of_group in pairs.values() for pair in of_group}
    moments = gather(model, readers, data, progress=progress)
    return {
        group.name: Reading(group, of_group, tuple(moments[pair.consumer.weight] for pair in of_group))
        for group, of_group in pairs.items()
    }


@dataclass(frozen=True, eq=False)
class Selected:
    """A group whose channels are chosen.

    Attributes:
        reading: The group and its consumers.
        problem: The group lasso of its channels.
        selection: What was chosen.
        kept: Per consumer, the columns that neither this nor an earlier group has dropped, (d,) bool.
    """

    reading: Reading
    problem: GroupLasso
    selection: Selection
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
    """
    masks: dict[str, Tensor] = {}
    selected: dict[str, Selected] = {}
    for name, reading in readings.items():
        progress(f"selecting {name}")
        problem = reading.problem(tensors, masks)
        original = tuple(pair.matrix(tensors) for pair in reading.pairs)
        candidates = Candidates(problem, original, _magnitude(reading.group, tensors), solver, generator)
        selection = choices[name](candidates)
        ones = {pair.consumer.weight: torch.ones_like(tensors[pair.consumer.weight]) for pair in reading.pairs}
        masks |= masked_weights([(reading.group, selection.support)], {**ones, **masks})
        selected[name] = Selected(reading, problem, selection, reading.columns(tensors, masks))
    return selected


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
