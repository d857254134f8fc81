"""The refit of a whole network: which layers it reaches, and which of their columns and rows stay."""

from collections.abc import Iterable, Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from lnr_prune.calibration.adapter import AdaptedLayer
from lnr_prune.calibration.data import Calibration
from lnr_prune.calibration.moments import SecondMoments
from lnr_prune.calibration.reading import Reading, adapted, adapted_layers
from lnr_prune.collapse.masks import Supports, masked_weights, whole_masks
from lnr_prune.errors import AdapterError
from lnr_prune.graph.groups import ChannelGroup, Graph
from lnr_prune.graph.module import named_tensors
from lnr_prune.refit.refit import Prepared, Refit, Refitted, prepared, refit
from lnr_prune.runtime.work import Work


def refit_network(
    model: nn.Module,
    graph: Graph,
    supports: Supports,
    data: Calibration | Prepared,
    *,
    settings: Refit = Refit(),
    bias: bool = True,
    logits: bool | None = False,
    repeated: Mapping[str, SecondMoments],
    work: Work = Work(),
) -> Refitted:
    """Refits every linear layer of the network, pruned or not, in one sweep; see `refit`.

    Layers that are called several times are refitted to the original network's moments, ``repeated``.
    """
    tensors = named_tensors(model)
    chosen = {group: supports[group] for group in graph.groups if group in supports}
    return refit(
        model,
        refitted_layers(graph, chosen, bias),
        _kept(chosen, tensors, bias),
        data,
        settings=settings,
        bias=bias,
        logits=logits,
        alive=_alive(chosen, tensors),
        repeated=repeated,
        picked=graph.estimated,
        work=work,
    )


def prepared_network(
    model: nn.Module, graph: Graph, data: Calibration, *, bias: bool = True, work: Work = Work()
) -> Prepared:
    """What several refits of the network to the same data share."""
    return prepared(model, refitted_layers(graph, graph.groups, bias), data, work.ranks)


def refitted_layers(graph: Graph, groups: Iterable[ChannelGroup], bias: bool) -> dict[str, AdaptedLayer]:
    """The layers that a refit reaches when these groups are pruned, in order of execution: weight's name -> layer."""
    layers = {layer.consumer.weight: layer for group in groups for layer in adapted_layers(group, bias)}
    for consumer in graph.layers:
        if consumer.weight not in graph.repeated and consumer.weight not in layers:
            with suppress(AdapterError):  # no adapter reads it: it stays as it is
                layers[consumer.weight] = adapted(consumer, bias)
    order = {consumer.weight: position for position, consumer in enumerate(graph.layers)}
    return dict(sorted(layers.items(), key=lambda entry: order.get(entry[0], len(order))))


def _kept(supports: Supports, tensors: Mapping[str, Tensor], bias: bool) -> dict[str, Tensor]:
    """Weight's name -> the columns that the supports leave, (d,) bool."""
    masks, kept = masked_weights(supports, whole_masks(supports, tensors)), dict[str, Tensor]()
    for reading in (Reading(group, adapted_layers(group, bias)) for group in supports):
        names = (layer.consumer.weight for layer in reading.layers)
        kept |= dict(zip(names, reading.columns(tensors, masks), strict=True))
    return kept


def _alive(supports: Supports, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight's name -> the rows that the supports leave, (h,) bool, for layers that lose some."""
    alive: dict[str, Tensor] = {}
    for group, support in supports.items():
        keep = torch.cat([support.cpu(), torch.ones(1, dtype=torch.bool)])
        for weight, dim in group.rows:
            rows = keep[group.slots[weight, dim].cpu()].to(tensors[weight].device)
            alive[weight] = alive[weight] & rows if weight in alive else rows
    return alive
