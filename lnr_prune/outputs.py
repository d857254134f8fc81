"""A model's outputs, to compare with another's: in float64, in evaluation or training mode."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lnr_prune.calibration import Call, run
from lnr_prune.errors import CalibrationError
from lnr_prune.graph import in_mode, unfused_attention
from lnr_prune.multihead import visible_attention


def outputs_of(
    model: nn.Module, weights: Mapping[str, Tensor], example: Call, *, wide: bool, training: bool
) -> list[Tensor]:
    """The tensors that the model returns with some of its own replaced.

    Args:
        model: The model, in any mode.
        weights: Tensors to run with in place of the model's own.
        example: Arguments of the forward pass.
        wide: Whether everything that is floating-point is made float64.
        training: Whether to run in training mode; dropout lets everything through then, and statistics stay.

    Raises:
        CalibrationError: If the model does not run.
    """
    tensors = {name: weights.get(name, tensor) for name, tensor in own_tensors(model).items()}
    if wide:
        tensors, example = {name: _wide(tensor) for name, tensor in tensors.items()}, tree_map(_wide, example)
    outputs = _run_training(model, example, tensors) if training else run(model, example, tensors)
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _run_training(model: nn.Module, call: Call, tensors: Mapping[str, Tensor]) -> Any:
    """``model(*args, **kwargs)`` in training mode, without dropout; its statistics stay as they are."""
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    devices = range(torch.cuda.device_count())
    with (
        torch.random.fork_rng(devices), torch.no_grad(), in_mode(model, True), unfused_attention(),
        visible_attention(model), _NoDropout(),
    ):  # fmt: skip
        torch.manual_seed(0)  # stochastic depth draws the same layers
        try:
            return functional_call(model, copies, *call)
        except Exception as error:  # a forward raises errors of any kind
            raise CalibrationError(f"{type(model).__name__} does not run in training mode: {error}") from error


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
