"""Weights that are computed in every forward pass: which there are, and plain weights in their place.

A layer may compute its weight from other tensors: a parametrization (``torch.nn.utils.parametrize``: weight norm,
spectral norm, orthogonal matrices, one's own), a hook of the older ``weight_norm`` and ``spectral_norm``, or a mask of
``torch.nn.utils.prune``. In evaluation the result is always the same, so a plain parameter with that value changes
nothing, and can be pruned and refitted as any other.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from lnr_prune.errors import GraphError
from lnr_prune.graph.module import evaluating, plain
from lnr_prune.graph.modules.reach import reaches
from lnr_prune.runtime import noise

HOOKS: dict[Any, tuple[Callable[..., Any], str, str]] = {
    WeightNorm: (remove_weight_norm, "name", "torch.nn.utils.remove_weight_norm"),
    SpectralNorm: (remove_spectral_norm, "name", "torch.nn.utils.remove_spectral_norm"),
    prune.BasePruningMethod: (prune.remove, "_tensor_name", "torch.nn.utils.prune.remove"),
}
"""Class of a hook -> the function that leaves a plain parameter, where the hook names it, and what to write."""


@dataclass(frozen=True)
class Computed:
    """A tensor of a layer that every forward pass computes.

    Attributes:
        layer: Name of the layer; "" is the model itself.
        tensor: What is computed, such as "weight".
        by: What computes it.
        remedy: The call that leaves a plain parameter.
        folds: Whether it can be folded.
    """

    layer: str
    tensor: str
    by: str
    remedy: str
    folds: bool = True

    @property
    def name(self) -> str:
        """Name of the plain parameter."""
        return f"{self.layer}.{self.tensor}".lstrip(".")

    def owns(self, parameter: str) -> bool:
        """Whether it is computed from this parameter, a name or a layer's name."""
        base = f"{self.layer}." if self.layer else ""
        return parameter.startswith((f"{base}parametrizations.{self.tensor}.", f"{base}{self.tensor}_"))


def computed_tensors(model: nn.Module) -> tuple[Computed, ...]:
    """What the layers of a model compute in every forward pass, of the kinds that are known."""
    return tuple(each for name, layer in model.named_modules() for each in _computed_by(name, layer))


def _computed_by(name: str, layer: nn.Module) -> Iterator[Computed]:
    path = f"model.{name}".rstrip(".")
    if parametrize.is_parametrized(layer):
        constant = _is_constant(layer)
        for tensor, chain in layer.parametrizations.items():  # type: ignore[operator, union-attr]
            by = " and ".join(type(part).__name__.strip("_") for part in chain)
            remedy = f"torch.nn.utils.parametrize.remove_parametrizations({path}, {tensor!r})"
            yield Computed(name, tensor, by, remedy, constant)
    for hook in layer._forward_pre_hooks.values():
        for kind, (_, attribute, remove) in HOOKS.items():
            if isinstance(hook, kind):
                tensor = getattr(hook, attribute)
                by = "a mask of torch.nn.utils.prune" if kind is prune.BasePruningMethod else kind.__name__
                yield Computed(name, tensor, by, f"{remove}({path}, {tensor!r})")


def _is_constant(layer: nn.Module) -> bool:
    """Whether all parametrized tensors of a layer have the same values in every forward pass."""
    names = list(layer.parametrizations)  # type: ignore[arg-type]
    with torch.no_grad(), evaluating(layer), noise.seeded(()):
        values = [(getattr(layer, name), getattr(layer, name)) for name in names]
    return all(first.is_meta or bool(torch.equal(first, second)) for first, second in values)


def frozen_reasons(model: nn.Module, frozen: Mapping[str, str]) -> dict[str, str]:
    """Layer -> why it is frozen; for those with computed weights a sentence that names the call that removes it."""
    found = computed_tensors(model)
    own = {name: next((each for each in found if each.owns(name) or each.layer == name), None) for name in frozen}
    reasons: dict[str, str] = {}
    for name, reason in frozen.items():
        each = own[name]
        if each is None or reason == "output of the model":
            reasons.setdefault(name, reason)
        else:
            reasons[each.layer] = f"its {each.tensor} is computed in every forward pass by {each.by}: {_advice(each)}"
    return reasons


def _advice(each: Computed) -> str:
    if each.folds:
        return f"call {each.remedy}, or prune lnr.fold(model)"
    return f"it changes from pass to pass, so it cannot be folded; call {each.remedy}"


def fold(model: nn.Module) -> nn.Module:
    """A copy of a model in which every weight that its layers compute is a plain parameter of the same value.

    Weight norm, spectral norm, orthogonal and other parametrizations, and masks of ``torch.nn.utils.prune`` are
    folded: in evaluation mode the copy computes the same. `prune`, `inspect`, `load` and `apply_plan` do this by
    themselves where they work on copies. The folded model is the original that the plan, ``Pruned.masked`` and errors
    then speak of.

    Raises:
        GraphError: If the model cannot be copied, or is wrapped, scripted or traced.

    Example:
        >>> import torch, lnr_prune as lnr
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 4))
        >>> lnr.fold(torch.nn.Sequential(layer, torch.nn.ReLU()))
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
          (1): ReLU()
        )
    """
    with plain(model) as module:
        return _folded(module, tuple(each for each in computed_tensors(module) if each.folds))


def folded(model: nn.Module, wanted: Mapping[str, Any] | None = None) -> tuple[nn.Module, dict[str, str]]:
    """The folded copy, and layer -> what was folded; the model itself if there is nothing to fold.

    Args:
        model: The model.
        wanted: If given, only tensors that have an entry here, under their plain name, are folded.
    """
    found = [each for each in computed_tensors(model) if each.folds and (wanted is None or each.name in wanted)]
    if not found:
        return model, {}
    said: dict[str, str] = {}
    for each in found:
        mask = "; a refit fills the zeros of its mask" if "mask" in each.by else ""
        text = f"its {each.tensor}, computed by {each.by}, is a plain parameter of the same value{mask}"
        said[each.layer] = f"{said[each.layer]}; {text}" if each.layer in said else text
    return _folded(model, tuple(found)), said


def _folded(model: nn.Module, found: tuple[Computed, ...]) -> nn.Module:
    # what a hook has computed with gradients is an attribute that cannot be copied
    held = [vars(model.get_submodule(each.layer)).get(each.tensor) for each in found]
    memo = {id(tensor): tensor.detach().clone() for tensor in held if isinstance(tensor, Tensor)}
    try:
        copy_ = copy.deepcopy(model, memo)
    except Exception as error:  # deepcopy raises whatever the model's attributes raise
        raise GraphError(f"{type(model).__name__} cannot be deep-copied ({error}) to fold its weights") from error
    if reaches(copy_, model):
        raise GraphError(
            f"a deep copy of {type(model).__name__} holds functions, such as lambdas in a list, that close over the "
            f"original, so its computed weights cannot be folded: call {found[0].remedy} first"
        )
    with torch.no_grad():
        for each in found:
            _fold_into(copy_.get_submodule(each.layer), each.tensor)
    return copy_


def _fold_into(layer: nn.Module, tensor: str) -> None:
    """Replaces a computed tensor by a plain one."""
    own = layer._parameters.get(f"{tensor}_orig", layer._parameters.get(f"{tensor}_v"))
    for hook in layer._forward_pre_hooks.values():
        for kind, (remove, attribute, _) in HOOKS.items():
            if isinstance(hook, kind) and getattr(hook, attribute) == tensor:
                remove(layer, tensor)
                layer.get_parameter(tensor).requires_grad_(own is None or own.requires_grad)
                _put_first(layer, tensor)
                return
    if parametrize.is_parametrized(layer):
        _without_parametrizations(layer)


def _without_parametrizations(layer: nn.Module) -> None:
    """Leaves the values of all parametrized tensors; the class is shared with the layer that this is a copy of."""
    chains: Any = layer.parametrizations
    originals = {name: list(chain.parameters(recurse=False)) for name, chain in chains.items()}
    with evaluating(layer):
        values = {name: getattr(layer, name).detach().clone() for name in originals}
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    for name, value in values.items():
        if originals[name]:
            trained = any(original.requires_grad for original in originals[name])
            setattr(layer, name, nn.Parameter(value, requires_grad=trained))
            _put_first(layer, name)
        else:
            layer.register_buffer(name, value)


def _put_first(layer: nn.Module, name: str) -> None:
    own = layer._parameters
    layer._parameters = {name: own[name], **own}
