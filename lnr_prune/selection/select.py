"""Which channels of every group stay, group by group, in order of execution."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lnr_prune.calibration.reading import Part, Reading, whole
from lnr_prune.collapse.masks import Supports, filled_up, masked_weights, whole_masks
from lnr_prune.graph.groups import ChannelGroup
from lnr_prune.refit.refit import Refitted
from lnr_prune.runtime.work import Work
from lnr_prune.selection.amount import Choice
from lnr_prune.selection.honest import ridges_of
from lnr_prune.selection.selectors import Candidates, Selection

logger = logging.getLogger("lnr_prune")


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
    passes: Iterable[Sequence[Reading]],
    choices: Mapping[ChannelGroup, Choice],
    tensors: Mapping[str, Tensor],
    *,
    samples: int = 0,
    seed: int = 0,
    coefficients: bool = True,
    part: Part = whole,
    work: Work = Work(),
) -> dict[ChannelGroup, Selected]:
    """Chooses every group's channels on the original network's second moments, in order of execution.

    If one layer reads several groups (a concatenation), the columns that an earlier group has dropped are left out of
    the later groups' problems. Processes that prune together share out the groups of a pass that are read by different
    layers.

    Args:
        passes: Groups with their second moments, some at a time.
        choices: Group -> how its channels are chosen.
        tensors: The original model's tensors.
        samples: Number of calibration samples, to warn if they are few; 0 = do not warn.
        seed: Seed of selectors that draw.
        coefficients: Whether the selectors' own coefficients are wanted.
        part: Picks the samples whose moments are used.
        work: The processes, the progress, and where choices are kept.
    """
    masks: dict[str, Tensor] = {}
    selected: dict[ChannelGroup, Selected] = {}
    generator = torch.Generator().manual_seed(seed)

    def choose(reading: Reading, draws: Tensor) -> tuple[Selection, float]:
        work.step(f"selecting {reading.group.name}")
        problem = reading.problem(tensors, masks, part=part, ridges=ridges_of(reading, tensors))
        original = tuple(layer.matrix(tensors) for layer in reading.layers)
        candidates = Candidates(problem, original, _magnitude(reading.group, tensors), draws)
        selection = _in_multiples(choices[reading.group](candidates), reading.group, candidates.magnitude)
        if bool(selection.support.all()):  # it loses nothing, and its layers stay as they are
            return replace(selection, coefficients=original if coefficients else ()), 0.0
        error = reading.problem(tensors, masks, part=part).error(selection.coefficients)
        return selection if coefficients else replace(selection, coefficients=()), error

    for readings in passes:
        _warn_of_few_samples(readings, samples)
        for together in _independent(readings):
            draws = [torch.rand(reading.group.size, generator=generator) for reading in together]
            tasks = {
                reading.group.name: partial(choose, reading, u) for reading, u in zip(together, draws, strict=True)
            }
            done = work.share_out("channels of", tuple[Selection, float], tasks)
            for reading, (selection, error) in zip(together, done, strict=True):
                group = reading.group
                masks |= masked_weights({group: selection.support}, {**whole_masks([group], tensors), **masks})
                kept = reading.columns(tensors, masks)
                selected[group] = Selected(replace(reading, moments=()), selection, error, kept)
    return selected


def _in_multiples(selection: Selection, group: ChannelGroup, magnitude: Tensor) -> Selection:
    """The selection, with more channels if the forward takes certain numbers of them only."""
    support = filled_up(selection.support, group.multiple, magnitude)
    more = int(support.sum()) - int(selection.support.sum())
    if more == 0:
        return selection
    note = f"{more} more, as the forward takes multiples of {group.multiple} only"
    return replace(selection, support=support, note="; ".join(filter(None, (selection.note, note))))


def supports_of(selected: Mapping[ChannelGroup, Selected]) -> Supports:
    """Group -> True for every channel that is kept."""
    return {group: chosen.selection.support for group, chosen in selected.items()}


def as_selected(selected: Mapping[ChannelGroup, Selected], tensors: Mapping[str, Tensor]) -> Refitted:
    """The coefficients as the selectors left them."""
    weights: dict[str, Tensor] = {}
    for chosen in selected.values():
        for layer, M, kept in zip(chosen.reading.layers, chosen.selection.coefficients, chosen.kept, strict=True):
            weights |= layer.write(M * kept, {**tensors, **weights})
    return Refitted(weights, {})


def _warn_of_few_samples(readings: Sequence[Reading], samples: int) -> None:
    """Warns of layers with fewer than two rows per column to learn from; all rows of an image count."""
    few: dict[str, int] = {}
    for layer, halves in (pair for r in readings for pair in zip(r.layers, r.moments, strict=True)):
        columns, seen = len(halves.fit.xx), halves.fit.count + halves.held.count
        if seen < 2 * columns:
            few[layer.consumer.name] = columns
    if few and samples:
        name, columns = max(few.items(), key=lambda entry: entry[1])
        logger.warning(
            "fewer than two rows per column to learn from, in %d layers (%r has %d columns; there are %d calibration "
            "samples): they stay near their original weights; give more samples",
            len(few), name, columns, samples,
        )  # fmt: skip


def _independent(readings: Sequence[Reading]) -> list[list[Reading]]:
    """Cuts the groups into runs; no two groups of a run are read by the same layer."""
    runs: list[list[Reading]] = []
    read_by: set[str] = set()
    for reading in readings:
        consumers = {layer.consumer.weight for layer in reading.layers}
        if not runs or read_by & consumers:
            runs.append([])
            read_by = set()
        runs[-1].append(reading)
        read_by |= consumers
    return runs


def _magnitude(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """L1 norm of every channel's filters, summed over the producers."""
    magnitude = torch.zeros(group.size, dtype=torch.float64)
    for weight, dim in group.rows:
        rows = tensors[weight].detach().double().abs().movedim(dim, 0).flatten(1).sum(1).cpu()
        channels = group.slots[weight, dim]
        magnitude.index_add_(0, channels[channels >= 0], rows[channels >= 0])
    return magnitude.to(tensors[weight].device)
