"""Verification: the smaller model must equal the masked model, numerically."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lnr_prune.attributes import Role, choices, with_attributes
from lnr_prune.calibration import Call, run
from lnr_prune.collapse import collapse, restore_point
from lnr_prune.errors import CalibrationError, GraphError, VerificationError
from lnr_prune.graph import ChannelGroup, along, named_tensors
from lnr_prune.outputs import outputs_of, own_tensors
from lnr_prune.plan import make_plan

Groups = tuple[ChannelGroup, ...]

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""Largest difference allowed, relative to the largest output; rounding grows with depth."""


def masked_weights(groups: Sequence[tuple[ChannelGroup, Tensor]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The consumers' weights with the columns of dropped channels set to zero, at full size."""
    masked: dict[str, Tensor] = {}
    for group, support in groups:
        keep = torch.cat([support.cpu(), torch.ones(1, dtype=torch.bool)])
        for consumer in (*group.consumers, *group.training):
            weight = masked.get(consumer.weight, tensors[consumer.weight])
            columns = along(keep[consumer.channels], consumer.dim, weight.shape).to(weight)
            masked[consumer.weight] = weight.detach() * columns
    return masked


class Reference:
    """Outputs of the masked model, in float64 where it runs in float64, to compare a pruned one with."""

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        example: Call,
        *,
        training: bool = False,
        wide: bool = True,
    ) -> None:
        """Runs the model with these full-size tensors in place of its own.

        In float64, see `outputs_of`, where the model runs in it; else in its own dtype, with the tolerance of that.

        Args:
            model: The whole model.
            weights: The tensors.
            example: Arguments of one forward pass.
            training: Whether to compare in training mode too; dropout lets everything through then, as its
                choice depends on the number of channels.
            wide: Whether to try float64.
        """
        self.example, self.wide = example, wide
        self.modes = (False, True) if training else (False,)
        try:
            self.outputs = [outputs_of(model, weights, example, wide=wide, training=mode) for mode in self.modes]
        except CalibrationError:  # the forward insists on its own dtype
            if not wide:
                raise
            self.wide = False
            self.outputs = [outputs_of(model, weights, example, wide=False, training=mode) for mode in self.modes]

    def check(self, pruned: nn.Module) -> None:
        """Compares the pruned model with the masked one.

        Raises:
            VerificationError: If the pruned model does not run, or differs by more than rounding.
        """
        for training, expected in zip(self.modes, self.outputs, strict=True):
            try:
                outputs = outputs_of(pruned, {}, self.example, wide=self.wide, training=training)
            except CalibrationError as error:
                raise VerificationError(f"the pruned model does not run: {error}") from error
            _compare(outputs, expected)


def _compare(outputs: list[Tensor], references: list[Tensor]) -> None:
    if [out.shape for out in outputs] != [out.shape for out in references]:
        raise VerificationError(
            f"the pruned model's outputs have shapes {[tuple(out.shape) for out in outputs]}, the masked "
            f"model's {[tuple(out.shape) for out in references]}"
        )
    for got, expected in zip(outputs, references, strict=True):
        if not got.is_floating_point():
            equal = torch.equal(got, expected)
            difference, scale, tolerance = (0.0 if equal else 1.0), 1.0, 0.0
        else:
            difference = float((got - expected).abs().max()) if got.numel() else 0.0
            scale = max(float(expected.abs().max()) if got.numel() else 0.0, 1e-30)
            tolerance = TOLERANCE[got.dtype]
        if not difference <= tolerance * scale:
            raise VerificationError(
                f"the pruned model differs from the masked one by {difference / scale:.1e} of the largest "
                f"output, expected at most {tolerance:.0e}: its forward uses the removed channels in a way "
                "that the graph did not show. Your model is untouched; exclude layers with keep={...}, "
                "and please report the model"
            )


def shrinkable(model: nn.Module, groups: Groups, example: Call) -> tuple[Groups, dict[str, str]]:
    """The groups that the module itself can lose channels of, found out by trying with random weights.

    A forward that holds a size (``view(-1, 800)``, ``self.num_heads``) fails the trial. Where submodules hold
    it in an attribute, the trial is repeated with the attribute changed, once for all that run the same line
    of code; groups that still fail are left out, with the reason.

    Args:
        model: The module that is to be shrunk; it is as before when the function returns.
        groups: Candidates.
        example: Arguments of one forward pass.

    Returns:
        The groups that pass, with the attributes that change with them, and name of a producer -> reason for
        those that do not.
    """
    if not groups:
        return (), {}
    try:
        trial = _trial(model, groups, example)
    except CalibrationError as error:
        evaluated = tuple(group for group in groups if not group.training)
        if len(evaluated) == len(groups):
            raise
        reason = f"read in training mode too, in which the example cannot be run ({error})".splitlines()[0]
        passed, refused = shrinkable(model, evaluated, example)
        return passed, {**refused, **{name: reason for group in groups if group.training for name in group.producers}}
    if trial(groups) is None:
        return groups, {}
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
    return passed, {**refused, **failed}


Trial = Callable[[Groups], str | None]


def _choose(model: nn.Module, group: ChannelGroup, trial: Trial) -> tuple[frozenset[Role], str | None]:
    """The attributes that must change for the group to pass, and none besides; if there are none, why not."""
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


def _trial(model: nn.Module, groups: Groups, example: Call) -> Trial:
    """Tells why the model does not survive losing a third of the channels of some groups; None if it does.

    The channels are masked in all groups, so one reference serves every trial: to remove what is masked
    changes nothing. A forward that names positions often names the first or the last: these go.
    """
    generator = torch.Generator().manual_seed(0)
    supports = {}
    for group in groups:
        support = torch.rand(group.size, generator=generator) > 0.3
        support[[0, -1]], support[group.size // 2] = False, True
        supports[group.name] = support
    masked = random_weights(model)
    masked |= masked_weights([(group, supports[group.name]) for group in groups], masked)
    reference = Reference(model, masked, example, training=any(group.training for group in groups))

    def trial(candidates: Groups) -> str | None:
        restore = restore_point(model)
        try:
            collapse(model, make_plan([(group, supports[group.name]) for group in candidates]), masked)
            reference.check(model)
        except VerificationError as error:
            return (
                "its sizes or positions are fixed in the model's forward; as_graph=True can remove them "
                f"({error})".splitlines()[0]
            )
        finally:
            restore()
        return None

    return trial


def copied(model: nn.Module, example: Call) -> nn.Module:
    """A deep copy whose forward runs on its own parameters.

    Raises:
        GraphError: If the copy's forward still uses the original's parameters, as functions stored on the
            model do when they close over it, or if it cannot be copied.
    """
    try:
        copy_ = copy.deepcopy(model)
    except Exception as error:  # deepcopy raises whatever the model's attributes raise
        raise GraphError(
            f"{type(model).__name__} cannot be deep-copied ({error}); prune it with inplace=True"
        ) from error
    originals = {id(tensor): name for name, tensor in named_tensors(model).items()}
    own = {id(tensor) for tensor in named_tensors(copy_).values()}
    seen = _Seen()
    with seen:
        run(copy_, example)
    foreign = sorted(originals[ref] for ref in seen.tensors if ref in originals and ref not in own)
    if foreign:
        raise GraphError(
            f"a deep copy of {type(model).__name__} runs on the original's parameters ({', '.join(foreign[:3])}...): "
            "its forward calls functions, such as lambdas in a list, that close over the original. Prune it with "
            "inplace=True, or turn these functions into methods"
        )
    return copy_


class _Seen(TorchFunctionMode):
    """Remembers every tensor that a torch function is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.tensors.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter))
        return func(*args, **(kwargs or {}))


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    """Values that hide nothing: gates and scales away from zero, variances positive."""
    generator = torch.Generator().manual_seed(0)
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
