"""The plan: what leaves a model, as plain data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lnr_prune.graph import ChannelGroup, Slot


@dataclass(frozen=True)
class Plan:
    """Which indices of every parameter's dimensions are kept, and which ints of the submodules change with them.

    Attributes:
        channels: Name of a group -> channels kept, ascending.
        indices: Parameter -> dimension -> indices kept, ascending; what is not named stays whole.
        attributes: Submodule -> attribute -> its new value. A dotted attribute is an entry of a tuple or list
            (``sizes.1``) or of a settings object (``config.num_heads``).
    """

    channels: Mapping[str, tuple[int, ...]]
    indices: Mapping[str, Mapping[int, tuple[int, ...]]]
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether anything is removed."""
        return bool(self.indices)


def make_plan(supports: Iterable[tuple[ChannelGroup, Tensor]]) -> Plan:
    """The plan that keeps, of every group, the channels of its support, (size,) bool."""
    channels: dict[str, tuple[int, ...]] = {}
    kept: dict[Slot, Tensor] = {}
    attributes: dict[str, dict[str, int]] = {}
    for group, support in supports:
        support = support.cpu()
        if bool(support.all()):
            continue
        channels[group.name] = _indices(support)
        keep = torch.cat([support, support.new_ones(1)])  # channel -1 stays
        for slot, channel in group.slots.items():
            kept[slot] = keep[channel] & kept.get(slot, True)  # a concatenation's columns are in several groups
        for (module, attribute), (value, per_channel) in group.attributes.items():
            entries = attributes.setdefault(module, {})
            entries[attribute] = entries.get(attribute, value) - int(per_channel[~support].sum())
    indices: dict[str, dict[int, tuple[int, ...]]] = {}
    for (parameter, dim), mask in kept.items():
        indices.setdefault(parameter, {})[dim] = _indices(mask)
    return Plan(channels, indices, attributes)


def _indices(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[:, 0].tolist())
