"""Verification: the smaller model must equal the masked model, numerically."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lnr_prune.calibration import Call, run
from lnr_prune.collapse import collapse, restore_point
from lnr_prune.errors import CalibrationError, GraphError, VerificationError
from lnr_prune.graph import ChannelGroup, along, named_tensors
from lnr_prune.plan import make_plan

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""Largest difference allowed, relative to the largest output; rounding grows with depth."""


def masked_weights(groups: list[tuple[ChannelGroup, Tensor]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The consumers' weights with the columns of dropped channels set to zero, at full size."""
    masked: dict[str, Tensor] = {}
    for group, support in groups:
        keep = torch.cat([support.cpu(), torch.ones(1, dtype=torch.bool)])
        for consumer in group.consumers:
            weight = masked.get(consumer.weight, tensors[consumer.weight])
            columns = along(keep[consumer.channels], consumer.dim, weight.shape).to(weight)
            masked[consumer.weight] = weight.detach() * columns
    return masked


class Reference:
    """Outputs of the masked model, in float64 where it runs in float64, to compare a pruned one with."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor], example: Call) -> None:
        """Runs the model with these full-size tensors in place of its own."""
        self.example = example
        try:
            self.wide, self.outputs = True, _outputs(model, weights, example, wide=True)
        except CalibrationError:  # the forward insists on its own dtype
            self.wide, self.outputs = False, _outputs(model, weights, example, wide=False)

    def check(self, pruned: nn.Module) -> None:
        """Compares the pruned model with the masked one.

        Raises:
            VerificationError: If the pruned model does not run, or differs by more than rounding.
        """
        try:
            outputs = _outputs(pruned, {}, self.example, wide=self.wide)
        except CalibrationError as error:
            raise VerificationError(f"the pruned model does not run: {error}") from error
        if [out.shape for out in outputs] != [out.shape for out in self.outputs]:
            raise VerificationError(
                f"the pruned model's outputs have shapes {[tuple(out.shape) for out in outputs]}, the masked "
                f"model's {[tuple(out.shape) for out in self.outputs]}"
            )
        for got, expected in zip(outputs, self.outputs, strict=True):
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


def shrinkable(
    model: nn.Module, groups: tuple[ChannelGroup, ...], example: Call
) -> tuple[tuple[ChannelGroup, ...], dict[str, str]]:
    """The groups that the module itself can lose channels of, found out by trying with random weights.

    A forward that holds sizes (``x.view(-1, 800)``) fails the trial; its groups are left out, with the reason.

    Args:
        model: The module that is to be shrunk; it is as before when the function returns.
        groups: Candidates.
        example: Arguments of one forward pass.

    Returns:
        The groups that pass, and name of a producer -> reason for those that do not.
    """
    reason = _trial(model, groups, example)
    if reason is None:
        return groups, {}
    if len(groups) == 1:
        return (), dict.fromkeys(groups[0].producers, reason)
    half = len(groups) // 2
    first, refused = shrinkable(model, groups[:half], example)
    second, refused_too = shrinkable(model, groups[half:], example)
    return first + second, {**refused, **refused_too}


def _trial(model: nn.Module, groups: tuple[ChannelGroup, ...], example: Call) -> str | None:
    """Why the model does not survive losing a third of the channels of each group; None if it does."""
    generator = torch.Generator().manual_seed(0)
    weights = random_weights(model)
    restore = restore_point(model)
    for end in (0, -1) if groups else ():  # a forward that names positions often names the first or the last
        supports = []
        for group in groups:
            support = torch.rand(group.size, generator=generator) > 0.3
            support[end], support[group.size // 2] = False, True
            supports.append((group, support))
        masked = {**weights, **masked_weights(supports, weights)}
        reference = Reference(model, masked, example)
        try:
            collapse(model, make_plan(supports), masked)
            reference.check(model)
        except VerificationError as error:
            return f"its sizes or positions are fixed in the model's forward ({error})".splitlines()[0]
        finally:
            restore()
    return None


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


def _outputs(model: nn.Module, weights: Mapping[str, Tensor], example: Call, *, wide: bool) -> list[Tensor]:
    if wide:
        tensors = {name: _wide(weights.get(name, tensor)) for name, tensor in _unique(model).items()}
        example = tree_map(_wide, example)
    else:
        tensors = dict(weights)
    return [leaf for leaf in tree_leaves(run(model, example, tensors)) if isinstance(leaf, Tensor)]


def _unique(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _wide(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point() and value.device.type != "mps"
    return value.detach().double() if floating else value


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    """Values that hide nothing: gates and scales away from zero, variances positive."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in _unique(model).items():
        if not tensor.is_floating_point():
            continue
        value = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
        if tensor.dim() > 1:
            sign = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
            value = value * sign / max(1, tensor[0].numel()) ** 0.5
        weights[name] = value.to(tensor)
    return weights
