"""Masked weights: full-size tensors in which dropped channels are zero."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lnr_prune.calibration.outputs import own_tensors
from lnr_prune.graph.groups import ChannelGroup
from lnr_prune.graph.owners import along
from lnr_prune.graph.weights import tensor_named

Supports = Mapping[ChannelGroup, Tensor]
"""Group -> True for every channel that is kept, (size,) bool."""


def masked_weights(supports: Supports, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The consumers' weights with the columns of dropped channels set to zero, at full size."""
    masked: dict[str, Tensor] = {}
    for group, support in supports.items():
        keep = torch.cat([support.cpu(), torch.ones(1, dtype=torch.bool)])
        for consumer in (*group.consumers, *group.training):
            weight = masked[consumer.weight] if consumer.weight in masked else tensor_named(tensors, consumer.weight)
            columns = along(keep[consumer.channels], consumer.dim, weight.shape).to(weight)
            masked[consumer.weight] = weight.detach() * columns
    return masked


def filled_up(support: Tensor, multiple: int, order: Tensor) -> Tensor:
    """The support with as many more channels as make it a multiple: those that are greatest in ``order``, (size,)."""
    lacking = min(-int(support.sum()) % multiple, int((~support).sum()))
    dropped = (~support).nonzero()[:, 0]
    more = dropped[order[dropped].topk(lacking).indices]
    return support.index_fill(0, more, True)


def random_weights(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random values that hide no error: gates and scales away from zero, variances positive."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in own_tensors(model).items():
        if not tensor.is_floating_point():
            continue
        value = torch.rand(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            value = 2 * value - 1  # of either sign
            value = (value + value.sign() / 2) / max(1, tensor[0].numel()) ** 0.5
        else:
            value += 0.5
        weights[name] = value.to(tensor)
    return weights


def whole_masks(groups: Iterable[ChannelGroup], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that keep everything, of one row each, for the groups' consumers, those in training included."""
    consumers = (consumer for group in groups for consumer in (*group.consumers, *group.training))
    weights = {c: tensor_named(tensors, c.weight) for c in consumers}
    return {c.weight: weight.detach().narrow(1 - c.dim, 0, 1).clone().fill_(1) for c, weight in weights.items()}
