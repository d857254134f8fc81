"""Tensors that take the place of others in a module, and are like them in all but values and sizes."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def twin(value: Tensor, like: Tensor) -> Tensor:
    """These values as a new tensor, in all else like another one, whose size may differ.

    It has its device (unless that is "meta"), memory format and ``requires_grad``, the class of a parameter, and its
    Python attributes. The dtype is that of the values.
    """
    value = _laid_out(value.detach().to(value.device if like.is_meta else like.device), like)
    if isinstance(like, nn.Parameter):
        own = type(like) if issubclass(type(like), nn.Parameter) else nn.Parameter
        plain = own is nn.Parameter
        made: Any = nn.Parameter(value) if plain else torch.Tensor._make_subclass(own, value)  # without its __init__
    else:
        made = value
    vars(made).update(vars(like))
    return made.requires_grad_(like.requires_grad)  # type: ignore[no-any-return]


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """A copy whose axes follow each other in memory as those of the other tensor do: channels_last, for one."""
    if like.layout != torch.strided or value.dim() != like.dim():
        return value.clone()
    order = sorted(range(like.dim()), key=lambda dim: -like.stride()[dim])
    back = sorted(range(like.dim()), key=order.__getitem__)
    return value.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def replace_tensors(model: nn.Module, new: Mapping[int, Tensor]) -> list[nn.Module]:
    """Replaces parameters and buffers, id of the old one -> new one; returns the modules that changed."""
    changed = []
    for module in model.modules():
        registries: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for tensors in registries:
            for leaf, old in tensors.items():
                if id(old) in new:
                    tensors[leaf] = new[id(old)]
                    changed.append(module)
    return list(dict.fromkeys(changed))


def deep_copy(model: Module) -> Module:
    """A deep copy whose parameters keep their class and their attributes, which copy.deepcopy drops."""
    plain = nn.Parameter.__deepcopy__
    kept = [p for p in model.parameters() if getattr(type(p), "__deepcopy__", None) is plain and not p.is_sparse]
    return copy.deepcopy(model, {id(parameter): twin(parameter, parameter) for parameter in kept})


@contextmanager
def ordinary(model: nn.Module) -> Iterator[None]:
    """Replaces tensors that were made in inference mode, which can be neither traced nor trained, by ordinary ones."""
    own = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_inference()}
    new = {of: twin(tensor, tensor) for of, tensor in own.items()}
    replace_tensors(model, new)
    try:
        yield
    finally:
        replace_tensors(model, {id(new[of]): tensor for of, tensor in own.items()})
