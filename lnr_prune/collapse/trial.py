"""Which channel groups of a module can lose channels, found out by trying."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from lnr_prune.calibration.calls import Call
from lnr_prune.collapse.attributes import Role, choices, with_attributes, with_counts
from lnr_prune.collapse.collapse import ATTRIBUTES, collapse, restore_point
from lnr_prune.collapse.masks import filled_up, masked_weights, random_weights
from lnr_prune.collapse.plan import make_plan
from lnr_prune.collapse.verify import Reference, copied
from lnr_prune.errors import CalibrationError, GraphError, VerificationError
from lnr_prune.graph.groups import ChannelGroup, Graph, find_groups
from lnr_prune.graph.module import Example
from lnr_prune.graph.weights import with_whole_stacks

Groups = tuple[ChannelGroup, ...]


def prunable(
    model: nn.Module, example: Call, into: str, also: Sequence[Example] = ()
) -> tuple[Graph, nn.Module | None]:
    """The channel groups that can really lose channels, and the module that will lose them.

    Args:
        model: The model; it is left as it is.
        example: Arguments of one forward pass.
        into: What will be shrunk: a "copy", the "model" itself, or a "graph" made of it (then there is no module).
        also: Other calls that must stay valid.

    Raises:
        GraphError: If the model cannot be traced or copied, or has no channel that can be pruned.
    """
    graph = find_groups(model, *example, also)
    target = copied(model, example) if into == "copy" else model if into == "model" else None
    if target is not None:
        groups, fixed = shrinkable(target, graph.groups, example, also)
        graph = replace(graph, groups=groups, frozen={**graph.frozen, **fixed})
    if not graph.groups:
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in graph.frozen.items())
        raise GraphError(f"{type(model).__name__} has no channel that can be pruned. {reasons or 'It has no layers'}")
    return graph, target


def shrinkable(
    model: nn.Module, groups: Groups, example: Call, also: Sequence[Example] = ()
) -> tuple[Groups, dict[str, str]]:
    """The groups whose channels the module itself can lose, found out by trying with random weights.

    A forward with a fixed size (``view(-1, 800)``, ``self.num_heads``) fails the trial. If submodules hold the size
    in an attribute, the trial is repeated with the attribute changed, once for all groups whose sizes are in the
    same lines of code. Groups that still fail are left out, with the reason.

    Args:
        model: The module that is to be shrunk; it is restored before the function returns.
        groups: Candidates.
        example: Arguments of one forward pass.
        also: Other calls that must stay valid.

    Returns:
        The groups that pass, with the attributes that change with them, and name of a producer -> reason for
        those that do not.
    """
    if not groups:
        return (), {}
    try:
        trial = _trial(model, groups, example, also)
    except CalibrationError as error:
        evaluated = tuple(group for group in groups if not group.training)
        if len(evaluated) == len(groups):
            raise
        reason = f"read in training mode too, but the example does not run in it ({error})".splitlines()[0]
        passed, refused = shrinkable(model, evaluated, example, also)
        return passed, {**refused, **{name: reason for group in groups if group.training for name in group.producers}}
    again = partial(_trial, model, groups, example, also, seed=1)
    if trial(groups) is None:
        return _counted(model, groups, trial, again), {}
    families: dict[frozenset[str], list[ChannelGroup]] = {}
    for group in groups:
        families.setdefault(frozenset(held.line for held in group.held), []).append(group)
    kept, refused = list(families.pop(frozenset(), ())), {}
    for family in families.values():
        chosen, why = _choose(model, family[0], trial)
        if why is None:
            kept += [with_attributes(model, group, chosen) for group in family]
        else:
            refused |= {producer: why for group in family for producer in group.producers}
    order = {group.name: index for index, group in enumerate(groups)}
    passed, failed = _bisect(tuple(sorted(kept, key=lambda group: order[group.name])), trial)
    return _counted(model, passed, trial, again), {**refused, **failed}


Trial = Callable[[Groups], str | None]


def _counted(model: nn.Module, groups: Groups, trial: Trial, again: Callable[[], Trial]) -> Groups:
    """The groups with the ints that count their channels, see `with_counts`, as far as the forward does not mind.

    Such an int may mean something else, which a trial does not see where random weights leave nothing behind a ReLU. So
    there is another trial, with other weights.
    """
    counted = tuple(with_counts(model, group, tuple(ATTRIBUTES)) for group in groups)
    changed = [group.attributes.keys() != whole.attributes.keys() for group, whole in zip(counted, groups, strict=True)]
    if not any(changed):
        return groups
    trials = (trial, again())

    def passes(some: Groups) -> bool:
        return all(each(some) is None for each in trials)

    if passes(counted):
        return counted
    return tuple(
        group if changes and passes((group,)) else whole
        for group, whole, changes in zip(counted, groups, changed, strict=True)
    )


def _choose(model: nn.Module, group: ChannelGroup, trial: Trial) -> tuple[frozenset[Role], str | None]:
    """The attributes that must change for the group to pass, and no others; if no choice passes, the reason."""
    results: dict[frozenset[tuple[str, str]], str | None] = {}

    def failure(roles: frozenset[Role]) -> str | None:
        candidate = with_attributes(model, group, roles)
        changed = frozenset(candidate.attributes)
        if changed not in results:
            results[changed] = trial((candidate,))
        return results[changed]

    chosen = next((roles for roles in choices(model, group) if failure(roles) is None), None)
    if chosen is None:
        return frozenset(), next(iter(results.values()))
    for role in sorted(chosen, key=str):
        if failure(chosen - {role}) is None:
            chosen -= {role}
    return chosen, None


def _bisect(groups: Groups, trial: Trial) -> tuple[Groups, dict[str, str]]:
    """The groups that pass, and name of a producer -> reason for those that do not."""
    reason = trial(groups) if groups else None
    if reason is None:
        return groups, {}
    if len(groups) == 1:
        return (), dict.fromkeys(groups[0].producers, reason)
    half = len(groups) // 2
    first, refused = _bisect(groups[:half], trial)
    second, refused_too = _bisect(groups[half:], trial)
    return first + second, {**refused, **refused_too}


def _trial(model: nn.Module, groups: Groups, example: Call, also: Sequence[Example], seed: int = 0) -> Trial:
    """A function of some groups: why the model fails if they lose a third of their channels; None if it works.

    The channels are masked in all groups, so one reference serves every trial: removing what is masked changes
    nothing. A forward that uses fixed positions often uses the first or the last one, so these are removed.
    """
    generator = torch.Generator().manual_seed(seed)
    supports = {}
    for group in groups:
        support = torch.rand(group.size, generator=generator) > 0.3
        support[[0, -1]], support[group.size // 2] = False, True
        support = filled_up(support, group.multiple, torch.arange(group.size))
        supports[group.name] = support
    masked = random_weights(model, seed)
    masked |= with_whole_stacks(masked_weights({group: supports[group.name] for group in groups}, masked), masked)
    training = any(group.training for group in groups)
    try:
        reference = Reference(model, masked, example, also=also, training=training)
    except CalibrationError:  # the forward may read sizes from its buffers
        masked = {name: value for name, value in masked.items() if name not in dict(model.named_buffers())}
        reference = Reference(model, masked, example, also=also, training=training)

    def trial(candidates: Groups) -> str | None:
        restore = restore_point(model)
        try:
            collapse(model, make_plan({group: supports[group.name] for group in candidates}), masked)
            reference.check(model)
        except VerificationError as error:
            return (
                "its sizes or positions are fixed in the model's forward; into='graph' can remove them "
                f"({error})".splitlines()[0]
            )
        finally:
            restore()
        return None

    return trial
