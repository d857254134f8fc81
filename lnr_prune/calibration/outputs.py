"""A model's outputs, to compare with those of another: in float64, in evaluation or training mode."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lnr_prune.calibration.calls import Call, forward, fresh, run
from lnr_prune.calibration.visible.attention import visible_attention
from lnr_prune.calibration.visible.recurrent import VisibleRecurrence
from lnr_prune.errors import CalibrationError
from lnr_prune.graph.module import evaluating, in_mode, unfused_attention
from lnr_prune.graph.modules.guard import users_device
from lnr_prune.runtime import noise

TOGETHER = 2**30  # bytes that float64 copies of all tensors may take; larger models get their copies one by one


def outputs_of(
    model: nn.Module, weights: Mapping[str, Tensor], example: Call, *, wide: bool, training: bool
) -> list[Tensor]:
    """The tensors that the model returns when some of its own are replaced.

    In float64, a model of more than `TOGETHER` bytes runs on its own tensors. Each function that it calls gets float64
    copies of them, which are freed before the next call: the outputs are the same, and only one layer's copies are in
    memory. This cannot be combined with training mode, or with functions that torch.jit has compiled.

    Args:
        model: The model, in any mode.
        weights: Tensors to run with in place of the model's own.
        example: Arguments of the forward pass.
        wide: Whether to convert everything floating-point to float64.
        training: Whether to run in training mode; dropout then lets everything through, and statistics stay.

    Raises:
        CalibrationError: If the model does not run, for example because it insists on its own dtype.
    """
    tensors = {name: weights.get(name, tensor) for name, tensor in own_tensors(model).items()}
    large = 8 * sum(tensor.numel() for tensor in tensors.values()) > TOGETHER
    if wide and large and not training:
        copies = _OneByOne({id(own): tensors[name] for name, own in own_tensors(model).items()})
        with evaluating(model), unfused_attention(), copies, noise.InOrder():
            outputs = forward(model, fresh(tree_map(_wide, example)))
    else:
        if wide:
            tensors, example = {name: _wide(tensor) for name, tensor in tensors.items()}, tree_map(_wide, example)
        with noise.InOrder():
            outputs = _run_training(model, example, tensors) if training else run(model, example, tensors)
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _run_training(model: nn.Module, call: Call, tensors: Mapping[str, Tensor]) -> Any:
    """``model(*args, **kwargs)`` in training mode, without dropout; its statistics stay as they are."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    with (
        noise.seeded(call),  # stochastic depth draws the same layers
        torch.no_grad(), in_mode(model, True), unfused_attention(), visible_attention(model), _NoDropout(),
        VisibleRecurrence(), users_device(),
    ):  # fmt: skip
        try:
            return functional_call(model, copies, *fresh(call))
        except Exception as error:  # a forward may raise anything
            raise CalibrationError(f"{type(model).__name__} does not run in training mode: {error}") from error


def judged(outputs: Any) -> Any:
    """What counts of a model's outputs: its logits, if one of several is named so; caches and hidden states do not."""
    return outputs["logits"] if named_logits(outputs) else outputs


def named_logits(outputs: Any) -> bool:
    """Whether one of a model's outputs is named logits, as transformers names those of classes and of tokens."""
    return isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), Tensor)


class _OneByOne(TorchFunctionMode):
    """Gives every function float64 copies of other tensors in place of some; only the last copy is kept."""

    def __init__(self, values: Mapping[int, Tensor]) -> None:
        """Takes the replacements: id of a tensor -> the tensor to use in its place."""
        super().__init__()
        self.values, self.last = values, (-1, torch.empty(0))

    def _replaced(self, leaf: Any) -> Any:
        if id(leaf) in self.values and self.last[0] != id(leaf):
            self.last = (-1, torch.empty(0))  # freed before the next is made
            self.last = id(leaf), _wide(self.values[id(leaf)])
        return self.last[1] if id(leaf) in self.values else leaf

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(self._replaced, (args, kwargs or {}))
        return func(*args, **kwargs)


class _NoDropout(TorchFunctionMode):
    """Dropout that lets everything through."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        if "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _wide(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point() and value.device.type != "mps"
    return value.detach().double() if floating else value
