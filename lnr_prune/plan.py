"""The plan: what leaves a model, as plain data."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune.fingerprint import Fingerprint
from lnr_prune.graph import ChannelGroup, Slot

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan, and the fingerprint of the model that it was made for, to a JSON file.

        Raises:
            PlanError: If it is not known what model the plan was made for.
        """
        from lnr_prune import files

        files.save_plan(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """The plan that `save` or `Pruned.save` wrote.

        Raises:
            PlanError: If the file is damaged, or is none of ours.
            OSError: If it cannot be read.
        """
        from lnr_prune import files

        return files.plan_of(path)

    def diff(self, other: "Plan") -> str:
        """What another plan keeps that this one does not, and the reverse, group by group; "" if nothing."""
        lines = list(_diff(self.channels, other.channels))
        if not lines and self != other:
            lines = ["the same channels, of another architecture"]
        return "\n".join(lines)

    def apply(self, model: nn.Module, *, example: Any = None, inplace: bool = False) -> nn.Module:
        """Removes the planned channels from another checkpoint of the same architecture.

        Its weights are cut, not refitted: the result is what masking these channels leaves of it, and as a
        rule less accurate than `prune` on its own calibration data.

        Args:
            model: A model of the architecture that the plan was made for. It is not modified unless ``inplace``.
            example: A batch, as for `prune`, on which the result is compared with the masked model.
            inplace: Shrinks ``model`` itself. If anything fails it is as before.

        Raises:
            PlanError: If the model is of another architecture.
            CalibrationError: If the model does not accept the example.
            VerificationError: If the smaller model does not equal the masked one.

        Example:
            >>> import torch, lnr_prune as lnr
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
            >>> plan = lnr.prune(model, [torch.randn(256, 8)], keep=0.5).plan
            >>> _ = model.load_state_dict({name: torch.randn_like(w) for name, w in model.state_dict().items()})
            >>> plan.apply(model, example=torch.randn(2, 8))[0]
            Linear(in_features=8, out_features=16, bias=True)
        """
        from lnr_prune import shrink

        return shrink.planned(model, self, example=example, inplace=inplace)


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
