"""Ints that a submodule holds: which of them a plan changes, and how they are read and written.

An attribute is named by a dotted path from its submodule: ``num_heads``, ``sizes.1`` (an entry of a tuple or
list), ``config.num_heads`` (of a settings object that the submodule holds).
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune.graph.groups import ChannelGroup
from lnr_prune.graph.module import named_tensors
from lnr_prune.graph.sizes import HeldInt

COUNTS = frozenset(
    f"{side}{noun}"
    for noun in ("channels", "features", "dim", "size", "planes")
    for side in ("in_", "out_", "num_", "n_", "hidden_", "embed_", "embedding_", "inner_", "")
    if side + noun != "size"  # of anything: a kernel, a head, a window
) | {"d_model", "n_embd", "nf", "nx", "width", "num_parameters", "normalized_shape"}  # fmt: skip
"""Names of attributes that may count the channels of a layer's own tensors."""
HEADS = frozenset(
    f"{side}{noun}"
    for noun in ("heads", "head", "attention_heads", "key_value_heads", "kv_heads")
    for side in ("num_", "n_", "")
)
"""Names of attributes that may count the heads of the projections inside of a submodule."""
INNER = ("all_head_size", "inner_dim")
"""Names of attributes that may count these projections' outputs."""
Role = tuple[str, type[nn.Module], str]
"""A line of code, a class of submodules, and its attribute that may be an int in that line."""
LONGEST = 64  # tuples and lists with more entries are data, not settings
ATTEMPTS = 40
"""So many choices of attributes are tried for groups whose ints are in the same lines; most fail early."""


def ints(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Every int that a submodule holds, with the attribute's path, also in tuples, lists and settings objects."""
    return ((path, value) for path, value in entries(module) if value is not None)


def entries(module: nn.Module) -> Iterator[tuple[str, int | None]]:
    """The same, and every entry of a settings object that is None: what reads it computes a value of its own."""
    for name, value in vars(module).items():
        yield from _entries(name, value, depth=2)


def _entries(path: str, value: Any, depth: int) -> Iterator[tuple[str, int | None]]:
    if type(value) is int:
        yield path, value
    elif depth and isinstance(value, tuple | list) and len(value) <= LONGEST:
        for index, entry in enumerate(value):
            yield from _entries(f"{path}.{index}", entry, depth - 1)
    elif depth and is_settings(value):
        for name, entry in vars(value).items():
            if entry is None:
                yield f"{path}.{name}", None
            else:
                yield from _entries(f"{path}.{name}", entry, depth - 1)


def can_become(before: int | None, value: int) -> bool:
    """Whether an int that counts channels can become this value when some of them leave."""
    return value > 0 and (before is None or value <= before)


def is_settings(value: Any) -> bool:
    """Whether a value holds attributes, and can be replaced by a copy of itself."""
    if not hasattr(value, "__dict__") or isinstance(value, nn.Module | Tensor | type) or callable(value):
        return False
    try:
        return copy.copy(value) is not value  # an Enum, for one, has no copies
    except Exception:  # a copy may fail in any way
        return False


def assign(module: nn.Module, path: str, value: int) -> None:
    """Sets an int that a submodule holds. Its tuple or object is replaced by a changed copy, as others may share it.

    What is inside the submodule and holds the same settings object gets the same copy.
    """
    name, *rest = path.split(".")
    copies: dict[int, Any] = {}
    vars(module)[name] = changed(vars(module)[name], rest, value, copies)
    for part in module.modules() if copies else ():
        vars(part).update({key: copies[id(held)] for key, held in vars(part).items() if id(held) in copies})


def changed(holder: Any, path: Sequence[str], value: int | None, copies: dict[int, Any]) -> Any:
    """A copy with another value at the end of a path.

    Args:
        holder: A tuple, a list or a settings object.
        path: Names of attributes and indices of entries.
        value: The value.
        copies: Receives the copies of settings objects, by the id of the old one.
    """
    if not path:
        return value
    name, *rest = path
    if isinstance(holder, tuple | list):
        parts = list(holder)
        parts[int(name)] = changed(parts[int(name)], rest, value, copies)
        return type(holder)(*parts) if hasattr(holder, "_fields") else type(holder)(parts)
    new = copies[id(holder)] = copy.copy(holder)
    object.__setattr__(new, name, changed(vars(holder)[name], rest, value, copies))  # frozen dataclasses too
    return new


def choices(model: nn.Module, group: ChannelGroup) -> Iterator[frozenset[Role]]:
    """Sets of attributes that may count a group's channels, in the order to try them; at most ``ATTEMPTS``.

    First none; then all attributes of the submodules whose forwards have the ints (the inner ones); all inner ones
    except one, which may be equal by coincidence; one inner one; all, including those of the enclosing submodules; one
    of all; two inner ones.
    """
    distance = {role: distance for role, _, _, distance in reversed(list(_holders(model, group)))}
    every = sorted(distance, key=distance.__getitem__)
    inner = [role for role in every if distance[role] == 0]
    sizes = (
        (inner, 0),
        (inner, len(inner)),
        (inner, len(inner) - 1),
        (inner, 1),
        (every, len(every)),
        (every, 1),
        (inner, 2),
    )
    sets = (frozenset(some) for roles, size in sizes if size >= 0 for some in combinations(roles, size))
    yield from islice(dict.fromkeys(sets), ATTEMPTS)


def with_attributes(model: nn.Module, group: ChannelGroup, chosen: frozenset[Role]) -> ChannelGroup:
    """The group, with these attributes added to what changes when its channels leave."""
    attributes: dict[tuple[str, str], tuple[int, Tensor]] = {}
    for role, name, held, _ in _holders(model, group):
        if role in chosen:
            attributes.setdefault((name, role[2]), (held.value, held.per_channel))
    return replace(group, attributes=attributes)


def with_counts(model: nn.Module, group: ChannelGroup, known: tuple[type[nn.Module], ...]) -> ChannelGroup:
    """The group, with the ints of the user's own layers that only tell how many of its channels a tensor has.

    No operation needs such an int, so no trial misses it: ``num_features`` of a batch norm written by hand. It is an
    int, or an entry of a tuple, that the layer holds under one of the names in `COUNTS`, and that equals a dimension
    of the layer's own parameters or buffers that shrinks. Names that begin with ``in_`` count what the layer reads,
    those with ``out_`` what it makes. All other names count neither if a dimension of that size stays whole. A
    submodule around projections to heads may count these, under one of the names in `HEADS`, or what they make.

    Args:
        model: The model.
        group: The group.
        known: Classes whose ints follow from the shapes of their parameters.
    """
    read = {(consumer.weight, consumer.dim) for consumer in (*group.consumers, *group.training)}
    found: dict[tuple[str, str], tuple[int, Tensor]] = {}
    for name in dict.fromkeys(weight.rpartition(".")[0] for weight, _ in group.slots):
        module = model.get_submodule(name)
        own = {
            f"{name}.{leaf}".lstrip("."): tensor for leaf, tensor in named_tensors(module).items() if "." not in leaf
        }
        for path, value in () if isinstance(module, known) else ints(module):
            root = path.partition(".")[0]
            sides = {(of, dim) for of, tensor in own.items() for dim, size in enumerate(tensor.shape) if size == value}
            if root.startswith(("in_", "out_")):
                sides &= read if root.startswith("in_") else group.slots.keys() - read
            if root not in COUNTS or is_settings(vars(module)[root]) or not sides or sides - group.slots.keys():
                continue
            lost = [group.slots[side] for side in sides]
            per_channel = [channels[channels >= 0].bincount(minlength=group.size) for channels in lost]
            if all(torch.equal(each, per_channel[0]) for each in per_channel):
                found[name, path] = value, per_channel[0]
    for name, channels in _projections(group):
        around = model.get_submodule(name)
        for path, value in () if isinstance(around, known) else ints(around):
            if path in HEADS and value % group.size == 0 < value:
                found[name, path] = value, torch.full((group.size,), value // group.size)
            elif path in INNER and value == len(channels):
                found[name, path] = value, channels.bincount(minlength=group.size)
    return replace(group, attributes={**found, **group.attributes}) if found else group


def _projections(group: ChannelGroup) -> Iterator[tuple[str, Tensor]]:
    """The submodules around the layers that make heads, and the head of every output of one of these layers."""
    for weight, dim in group.rows:
        layer, channels = weight.rpartition(".")[0], group.slots[weight, dim]
        if layer and len(channels) > group.size and bool((channels >= 0).all()):
            yield layer.rpartition(".")[0], channels


def _holders(model: nn.Module, group: ChannelGroup) -> Iterator[tuple[Role, str, HeldInt, int]]:
    """Attributes equal to one of the group's ints, from its own submodule outwards; the last entry is how far out."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for held in group.held:
        parts = held.module.split(".") if held.module else []
        for distance in range(len(parts) + 1):
            name = ".".join(parts[: len(parts) - distance])
            for path, value in ints(modules[name]) if name in modules else ():
                if value == held.value:
                    yield (held.line, type(modules[name]), path), name, held, distance
