"""The settings that a model was made from, ``model.config``, become those of the smaller model.

Which of their entries count channels is found out by trying: models are made from changed settings, without values, and
compared with what the plan leaves.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune.collapse.attributes import can_become, changed, entries, is_settings
from lnr_prune.collapse.collapse import ATTRIBUTES
from lnr_prune.collapse.fingerprint import fingerprint
from lnr_prune.collapse.plan import Plan, kept_shape
from lnr_prune.graph.groups import ChannelGroup
from lnr_prune.graph.module import named_tensors
from lnr_prune.runtime import noise

ATTEMPTS = 40  # so many changed settings are tried
SETTINGS = "config"  # the attribute that holds them

Change = tuple[str, int]
"""An entry of the settings, by its path from the model, and its new value."""
Shapes = Mapping[str, tuple[int, ...]]


def described(model: nn.Module, plan: Plan, supports: Mapping[ChannelGroup, Tensor]) -> Iterator[Plan]:
    """Plans that keep the same, and change what the settings and the submodules made from them say of it.

    An entry of the settings changes only if everything that a model made from them then has in another size, it has in
    the size that the plan leaves. So one that is true for some layers only stays as it was. Two entries may both fit,
    if only one of them is meant; then the second plan is the other one's.

    Args:
        model: The whole model.
        plan: What is kept.
        supports: The same: True for every channel of a group that is kept.
    """
    if not plan or not is_settings(vars(model).get(SETTINGS)):
        return
    uniform = _uniform(supports)
    changes, wanted = _candidates(model, uniform), {name for group in uniform for name, _ in group.slots}
    for ordered in (changes, changes[::-1]):
        if found := _found(model, plan, ordered, wanted):
            attributes = {**found, **plan.attributes}
            for name in found.keys() & plan.attributes.keys():
                attributes[name] = {**found[name], **plan.attributes[name]}
            yield replace(plan, attributes=attributes, original=fingerprint(model, attributes))


def settings_with(model: nn.Module, changes: Mapping[str, int | None]) -> Any:
    """A copy of the model's settings with other entries."""
    settings = copy.copy(vars(model)[SETTINGS])
    for path, value in changes.items():
        settings = changed(settings, path.split(".")[1:], value, {})
    return settings


def made_from(kind: type[nn.Module], settings: Any, **arguments: Any) -> nn.Module:
    """A new model without values, from settings as they are after they were written to a file and read again."""
    before = noise.states()
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            if callable(getattr(settings, "to_dict", None)):
                settings = type(settings).from_dict(settings.to_dict())
            return kind(settings, **arguments)
    finally:
        noise.restore(before)


def _uniform(supports: Mapping[ChannelGroup, Tensor]) -> dict[ChannelGroup, int]:
    """The groups that lose channels, where all of their kind keep as many, and this number."""
    kept: dict[Any, set[int]] = {}
    for group, support in supports.items():
        kept.setdefault(group.kind, set()).add(int(support.sum()))
    return {group: min(some) for group in supports if len(some := kept[group.kind]) == 1 and some != {group.size}}


def _candidates(model: nn.Module, uniform: Mapping[ChannelGroup, int]) -> list[Change]:
    """Entries that may count the channels of these groups, likely ones first.

    An entry may count something of which every channel has several: query heads of a key-value group, say.
    """
    found: dict[Change, int] = {}
    for path, value in entries(model):
        if path.startswith(f"{SETTINGS}."):
            for size, left in dict.fromkeys((group.size, left) for group, left in uniform.items()):
                each = 1 if value is None else value // size
                if value is None or value == each * size > 0:
                    found.setdefault((path, each * left), each + (value is None))
    return sorted(found, key=lambda change: found[change])


def _found(model: nn.Module, plan: Plan, changes: Sequence[Change], wanted: set[str]) -> dict[str, dict[str, int]]:
    """Ints of submodules that differ in a model made from better settings: submodule -> attribute -> new value.

    Args:
        model: The whole model.
        plan: What is kept.
        changes: Changes of the settings, in the order to try them: alone, and then two together.
        wanted: Tensors that should get their new sizes.
    """
    kind, attempts, chosen = type(model), 0, dict[str, int]()
    left, fixed = _left(model, plan)
    first = now = _tried(kind, settings_with(model, chosen))
    for some in (*combinations(changes, 1), *combinations(changes, 2)):
        together = dict(some)
        if len(together) < len(some) or together.keys() & chosen.keys():
            continue
        if now is None or attempts == ATTEMPTS or all(_shapes(now).get(name) == left[name] for name in wanted):
            break
        attempts += 1
        new = _tried(kind, settings_with(model, {**chosen, **together}))
        if new is not None and _fits(now, new, left, fixed):
            now, chosen = new, {**chosen, **together}
    return {} if first is None or now is None else _differences(model, first, now)


def _tried(kind: type[nn.Module], settings: Any) -> nn.Module | None:
    try:
        return made_from(kind, settings)
    except Exception:  # the settings and the model may refuse them in any way
        return None


def _left(model: nn.Module, plan: Plan) -> tuple[Shapes, set[str]]:
    """What is left of every tensor; and those that no file has: they are computed when a model is made."""
    tensors = named_tensors(model)
    dims = {id(tensors[name]): dims for name, dims in plan.indices.items()}
    left = {name: kept_shape(tuple(tensor.shape), dims.get(id(tensor), {})) for name, tensor in tensors.items()}
    return left, tensors.keys() - model.state_dict().keys()


def _fits(before: nn.Module, after: nn.Module, left: Shapes, fixed: set[str]) -> bool:
    """Whether what differs between two models is right in the second one; only ints and sizes may differ."""
    old, new = _shapes(before), _shapes(after)
    differ = {name for name, shape in new.items() if old.get(name) != shape}
    right = all(name not in fixed and new[name] == left.get(name, new[name]) for name in differ)
    return bool(differ) and right and old.keys() == new.keys() and _floats(before) == _floats(after)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}


def _floats(model: nn.Module) -> dict[tuple[str, str], float]:
    """Numbers that a forward may compute with, such as the scale of attention scores."""
    return {
        (name, attribute): value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if type(value) is float
    }


def _differences(model: nn.Module, before: nn.Module, after: nn.Module) -> dict[str, dict[str, int]]:
    """Ints that are not the same in two models made from settings, where the model has those of the first one."""
    old, new = dict(before.named_modules()), dict(after.named_modules())
    found: dict[str, dict[str, int]] = {}
    seen: set[int] = set()  # settings that an outer module holds, too, and changes for its parts
    for name, module in model.named_modules():
        if name in old and name in new and not isinstance(module, tuple(ATTRIBUTES)):
            held, was = dict(entries(module)), dict(entries(old[name]))
            for path, value in entries(new[name]):
                same = path in held and path in was and held[path] == was[path] != value
                root = vars(module).get(path.split(".")[0])
                if same and value is not None and id(root) not in seen and can_become(held[path], value):
                    found.setdefault(name, {})[path] = value
        seen.update(id(each) for value in vars(module).values() for each in _settings_in(value))
    return found


def _settings_in(value: Any) -> Iterator[Any]:
    if is_settings(value):
        yield value
        yield from (entry for entry in vars(value).values() if is_settings(entry))
