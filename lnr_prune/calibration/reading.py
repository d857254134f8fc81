"""Channel groups with the second moments of the layers that read them."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lnr_prune.calibration.adapter import AdaptedLayer, find
from lnr_prune.calibration.data import Calibration
from lnr_prune.calibration.gather import gather
from lnr_prune.calibration.moments import Halves, SecondMoments
from lnr_prune.graph.groups import ChannelGroup, Consumer
from lnr_prune.graph.module import named_tensors
from lnr_prune.graph.weights import tensor_named, whole_name
from lnr_prune.lasso.problem import GroupLasso
from lnr_prune.runtime.work import Work

Part = Callable[[Halves], SecondMoments]
"""Picks the samples whose moments are used."""


def whole(halves: Halves) -> SecondMoments:
    """The moments of all samples."""
    return halves.whole


def fit(halves: Halves) -> SecondMoments:
    """The moments of the samples to fit on."""
    return halves.fit


@dataclass(frozen=True, eq=False)
class Reading:
    """A group and the layers that read it.

    Attributes:
        group: The group.
        layers: Its consumers, with their adapters.
        moments: Second moments of their inputs, in the original network; () while they are not in memory.
    """

    group: ChannelGroup
    layers: tuple[AdaptedLayer, ...]
    moments: tuple[Halves, ...] = ()

    def problem(
        self,
        tensors: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
        *,
        part: Part = whole,
        ridges: Sequence[float] | None = None,
    ) -> GroupLasso:
        """The group lasso of its channels.

        Args:
            tensors: The original model's tensors.
            masks: Weight's name -> a mask of 0 and 1; the problem has only the columns that these leave.
            part: Picks the samples.
            ridges: Per consumer, a ridge towards its own matrix, see `SecondMoments.towards`.
        """
        kept, chosen = self.columns(tensors, masks or {}), [part(halves) for halves in self.moments]
        blocks = []
        for index, (layer, moments, columns) in enumerate(zip(self.layers, chosen, kept, strict=True)):
            W = layer.matrix(tensors)
            moments = moments.through(W).restricted(columns)
            if ridges is not None:
                moments = moments.towards(W, ridges[index], columns & self.ridged(layer, tensors))
            blocks.append(moments.block(layer.groups(tensors), self._rows(layer, chosen)))
        return GroupLasso(tuple(blocks), blocks[0].R.new_ones(self.group.size))

    def _rows(self, layer: AdaptedLayer, moments: Sequence[SecondMoments]) -> float:
        """Rows of a layer. Of parts of a stack, the mean: an expert counts as much as the rows that reach it."""
        stack = whole_name(layer.consumer.weight)[0]
        pairs = zip(self.layers, moments, strict=True)
        counts = [of.count for each, of in pairs if whole_name(each.consumer.weight)[0] == stack]
        return sum(counts) / len(counts)

    @staticmethod
    def ridged(layer: AdaptedLayer, tensors: Mapping[str, Tensor]) -> Tensor:
        """Columns of a layer that a ridge applies to: all but the bias, (d,) bool."""
        return layer.columns(torch.ones_like(tensor_named(tensors, layer.consumer.weight)), bias=0.0)

    def columns(self, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Per consumer, the columns that the masks leave, (d,) bool."""

        def mask(weight: str) -> Tensor:
            whole = tensor_named(tensors, weight)
            return masks.get(weight, whole.new_ones(())).expand_as(whole)

        return tuple(layer.columns(mask(layer.consumer.weight), bias=1.0) for layer in self.layers)


def read(
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    data: Calibration,
    *,
    bias: bool,
    work: Work = Work(),
) -> list[Reading]:
    """Every group with its consumers' second moments, in order of execution, from one pass over the data."""
    layers = {group: adapted_layers(group, bias) for group in groups}
    readers = {layer.consumer.weight: layer for group, of in layers.items() for layer in of if group.consumers}
    moments = gather(model, readers, data, work) if readers else {}
    tensors = named_tensors(model)
    for layer in (layer for of in layers.values() for layer in of):
        if layer.consumer.weight not in moments:  # it runs in training only: its inputs are not known
            white = SecondMoments.white(layer.matrix(tensors))
            moments[layer.consumer.weight] = Halves(white, white)
    return [Reading(group, of, tuple(moments[layer.consumer.weight] for layer in of)) for group, of in layers.items()]


@dataclass(frozen=True, eq=False)
class GroupPasses:
    """Channel groups with their second moments, some groups at a time, with one pass over the data for each.

    Iterating yields the readings of each pass. Their moments are freed when the next one begins.

    Attributes:
        passes: The groups of every pass, in order of execution.
        lasting: Readings that stay in memory from the start; all of them if there is only one pass.
        read: Groups -> their readings.
    """

    passes: Sequence[Sequence[ChannelGroup]]
    lasting: list[Reading]
    read: Callable[[Sequence[ChannelGroup]], list[Reading]]

    def __iter__(self) -> Iterator[list[Reading]]:
        if len(self.passes) == 1:
            yield self.lasting
            return
        for groups in self.passes:
            readings = self.read(groups)
            yield readings
            readings.clear()  # frees their memory for the next

    def moments_of(self, weights: Container[str]) -> dict[str, SecondMoments]:
        """Weight's name -> moments, for those named layers whose moments stay in memory."""
        pairs = (pair for reading in self.lasting for pair in zip(reading.layers, reading.moments, strict=True))
        return {layer.consumer.weight: both.whole for layer, both in pairs if layer.consumer.weight in weights}


def read_in_passes(
    model: nn.Module,
    passes: Sequence[Sequence[ChannelGroup]],
    lasting: Sequence[ChannelGroup],
    data: Calibration,
    *,
    bias: bool,
    work: Work = Work(),
) -> GroupPasses:
    """The groups with their second moments, pass by pass, see `lnr_prune.selection.costs.memory`."""
    reading = partial(read, model, data=data, bias=bias, work=work)
    return GroupPasses(passes, reading(lasting), reading)


def adapted_layers(group: ChannelGroup, bias: bool) -> tuple[AdaptedLayer, ...]:
    """The layers that read a group, with their adapters; if there are none, those that read it in training."""
    return tuple(adapted(consumer, bias) for consumer in group.consumers or group.training)


def adapted(consumer: Consumer, bias: bool) -> AdaptedLayer:
    """A layer with its adapter; without ``bias``, its bias stays as it is."""
    consumer = consumer if bias else replace(consumer, bias=None)
    return AdaptedLayer(consumer, find(consumer))
