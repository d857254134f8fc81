"""Collapse: take the planned channels physically out of an nn.Module."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune.calibration.visible.attention import shrink_attention
from lnr_prune.collapse.attributes import assign
from lnr_prune.collapse.plan import Plan
from lnr_prune.graph.module import named_tensors
from lnr_prune.graph.modules.twins import replace_tensors, twin


def collapse(model: nn.Module, plan: Plan, weights: Mapping[str, Tensor] | None = None) -> None:
    """Replaces every planned parameter of the model by its kept part, and updates its layers' attributes.

    No tensor is written to: parameters are replaced by new ones, so `restore_point` can undo it all.

    Args:
        model: The model, changed in place.
        plan: What is kept.
        weights: Full-size values to use instead of the model's own, such as those of the refit.
    """
    weights = weights or {}
    new: dict[int, Tensor] = {}  # tied parameters stay tied
    for name, old in named_tensors(model).items():
        if id(old) not in new and (name in plan.indices or name in weights):
            new[id(old)] = _kept(weights.get(name, old), old, plan.indices.get(name, {}))
    for module in replace_tensors(model, new):
        for kind, update in ATTRIBUTES.items():
            if isinstance(module, kind):
                update(module)
    for name, entries in plan.attributes.items():
        for path, value in entries.items():
            assign(model.get_submodule(name), path, value)


def restore_point(model: nn.Module) -> Callable[[], None]:
    """Remembers every submodule's attributes and parameters; the returned function puts them back."""
    saved = [
        (module, type(module), dict(vars(module)), [dict(entries) for entries in _registries(module)])
        for module in model.modules()
    ]

    def restore() -> None:
        for module, kind, attributes, registries in saved:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for entries, before in zip(_registries(module), registries, strict=True):
                entries.clear()
                entries.update(before)

    return restore


def _registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


def _kept(value: Tensor, old: Tensor, indices: Mapping[int, tuple[int, ...]]) -> Tensor:
    value = value.detach().to(old)
    for dim, kept in indices.items():
        value = value.index_select(dim, torch.tensor(kept, device=value.device))
    return twin(value, old)


def _linear(module: nn.Linear) -> None:
    module.out_features, module.in_features = module.weight.shape


def _conv(module: nn.modules.conv._ConvNd) -> None:
    rows, whole = len(module.weight), module.in_channels if module.transposed else module.out_channels
    module.groups = module.groups * rows // whole if module.groups > 1 else 1
    sides = rows, module.weight.shape[1] * module.groups
    module.out_channels, module.in_channels = reversed(sides) if module.transposed else sides


def _batch_norm(module: nn.modules.batchnorm._NormBase) -> None:
    entries = [tensor for tensor in (module.weight, module.running_mean) if tensor is not None]
    module.num_features = len(entries[0])


def _layer_norm(module: nn.LayerNorm | nn.RMSNorm) -> None:
    module.normalized_shape = tuple(module.weight.shape)


def _group_norm(module: nn.GroupNorm) -> None:
    module.num_groups = module.num_groups * len(module.weight) // module.num_channels
    module.num_channels = len(module.weight)


def _embedding(module: nn.Embedding) -> None:
    module.embedding_dim = module.weight.shape[1]


def _prelu(module: nn.PReLU) -> None:
    module.num_parameters = len(module.weight)


def _recurrent(module: nn.RNNBase) -> None:
    module.input_size = module.get_parameter("weight_ih_l0").shape[1]
    if not module.proj_size:
        module.hidden_size = module.get_parameter("weight_hh_l0").shape[1]
    module._init_flat_weights()  # a list of its parameters


def _recurrent_cell(module: nn.RNNCellBase) -> None:
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


ATTRIBUTES: dict[type[nn.Module], Callable[..., None]] = {
    nn.Linear: _linear,
    nn.modules.conv._ConvNd: _conv,
    nn.modules.batchnorm._NormBase: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    nn.MultiheadAttention: shrink_attention,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent_cell,
}
