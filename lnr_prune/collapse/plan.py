"""The plan: what is taken out of a model, as plain data."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor, nn

from lnr_prune.collapse.fingerprint import Fingerprint, fingerprint
from lnr_prune.errors import PlanError
from lnr_prune.graph.groups import ChannelGroup
from lnr_prune.graph.owners import Slot

Key = TypeVar("Key")
Value = TypeVar("Value")
SHOWN = 12  # ranges of channels in a line


@dataclass(frozen=True)
class Plan:
    """Which indices of every parameter's dimensions are kept, and which ints of the submodules change with them.

    Attributes:
        channels: Name of a group -> channels kept, ascending.
        indices: Parameter -> dimension -> indices kept, ascending; what is not named stays whole.
        attributes: Submodule -> attribute -> its new value. A dotted attribute is an entry of a tuple or list
            (``sizes.1``) or of a settings object (``config.num_heads``).
        original: The architecture that it was made for; None = not known.
    """

    channels: Mapping[str, tuple[int, ...]]
    indices: Mapping[str, Mapping[int, tuple[int, ...]]]
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    original: Fingerprint | None = None

    def __bool__(self) -> bool:
        """Whether anything is removed."""
        return bool(self.indices)

    def __str__(self) -> str:
        if not self:
            return "nothing is removed"
        lines = [f"{group}: {_listed(kept)}" for group, kept in self.channels.items()]
        for name, dims in self.indices.items():
            kind = self.original.tensors.get(name) if self.original else None
            sides = (f"dimension {dim} keeps {len(kept)}" for dim, kept in dims.items())
            what = f"{kind.shape} -> {kept_shape(kind.shape, dims)}" if kind else ", ".join(sides)
            lines.append(f"{name}: {what}")
        for module, entries in self.attributes.items():
            lines += [f"{module}.{attribute} = {value}".lstrip(".") for attribute, value in entries.items()]
        return "\n".join(lines)

    def then(self, second: "Plan") -> "Plan":
        """Both plans in one: that of a model, and that of the pruned model, which was pruned again.

        Raises:
            PlanError: If the second plan was not made for what this one leaves.

        Example:
            >>> import torch, lnr_prune as lnr
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
            >>> first = lnr.prune(model, [torch.randn(256, 8)], lnr.Keep(0.5))
            >>> second = lnr.prune(first.model, [torch.randn(256, 8)], lnr.Keep(0.5))
            >>> lnr.apply_plan(first.plan.then(second.plan), model)[0]
            Linear(in_features=8, out_features=8, bias=True)
        """
        original, left = self.original, second.original
        if original is None or left is None:
            raise PlanError("a plan does not say what architecture it was made for; the plans of prune do")
        shapes = {name: kept_shape(kind.shape, self.indices.get(name, {})) for name, kind in original.tensors.items()}
        if shapes != {name: kind.shape for name, kind in left.tensors.items()}:
            raise PlanError("the second plan was not made for what the first one leaves of the model")
        channels = {group: _of(kept, self.channels.get(group)) for group, kept in second.channels.items()}
        indices = {
            name: {dim: _of(kept, self.indices.get(name, {}).get(dim)) for dim, kept in dims.items()}
            for name, dims in second.indices.items()
        }
        return Plan(
            {**self.channels, **channels},
            _over(self.indices, indices),
            _over(self.attributes, second.attributes),
            replace(original, ints=_over(left.ints, original.ints)),
        )

    def diff(self, other: "Plan") -> str:
        """What this plan keeps and another does not, and the reverse, group by group; "" if nothing."""
        lines = list(_diff(self.channels, other.channels))
        if not lines and self != other:
            lines = ["the same channels, of another architecture"]
        return "\n".join(lines)


def make_plan(supports: Mapping[ChannelGroup, Tensor]) -> Plan:
    """The plan that keeps the channels in every group's support, (size,) bool."""
    channels: dict[str, tuple[int, ...]] = {}
    kept: dict[Slot, Tensor] = {}
    attributes: dict[str, dict[str, int]] = {}
    for group, support in supports.items():
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


def plan_for(model: nn.Module, supports: Mapping[ChannelGroup, Tensor]) -> Plan:
    """The same plan, with the architecture of the model that it is for."""
    plan = make_plan(supports)
    return replace(plan, original=fingerprint(model, plan.attributes))


def _of(kept: tuple[int, ...], before: tuple[int, ...] | None) -> tuple[int, ...]:
    """Indices among those that were kept before, as indices of the whole."""
    return kept if before is None else tuple(before[index] for index in kept)


def _over(
    first: Mapping[str, Mapping[Key, Value]], second: Mapping[str, Mapping[Key, Value]]
) -> dict[str, dict[Key, Value]]:
    """Both, with the entries of the second one where both have them."""
    return {name: {**first.get(name, {}), **second.get(name, {})} for name in {**first, **second}}


def kept_shape(shape: tuple[int, ...], dims: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of what is left of a tensor."""
    return tuple(len(dims[dim]) if dim in dims else size for dim, size in enumerate(shape))


def _indices(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[:, 0].tolist())


def _diff(first: Mapping[str, tuple[int, ...]], second: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for group in dict.fromkeys((*first, *second)):
        if group not in second:
            yield f"{group}: {_listed(first[group])} here, whole in the other"
        elif group not in first:
            yield f"{group}: whole here, {_listed(second[group])} in the other"
        elif first[group] != second[group]:
            here, there = set(first[group]), set(second[group])
            parts = (f"{len(here & there)} in both", *_only("here", here - there), *_only("in the other", there - here))
            yield f"{group}: keeps {', '.join(parts)}"


def _only(where: str, channels: set[int]) -> Iterator[str]:
    if channels:
        yield f"only {where} {_ranges(sorted(channels))}"


def _listed(kept: Iterable[int]) -> str:
    kept = tuple(kept)
    return f"keeps {len(kept)} channel{'s' * (len(kept) != 1)}: {_ranges(kept)}"


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"; a long list ends in "..."."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(texts[:SHOWN] + ["..."] * (len(texts) > SHOWN))
