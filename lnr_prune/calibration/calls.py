"""Calls of the model: one batch, one forward pass."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from lnr_prune.errors import CalibrationError, LnrPruneError, ran_out_of_memory
from lnr_prune.graph.module import evaluating, failing_layer, unfused_attention, without_caches
from lnr_prune.graph.modules.guard import users_device
from lnr_prune.runtime import noise

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one forward pass."""
Inputs = Callable[[Any], Call]


def _checked(call: Any) -> Call:
    """What ``inputs`` returned, once it is known to be a call."""
    if isinstance(call, tuple | list) and len(call) == 2:
        args, kwargs = call
        if isinstance(args, tuple | list) and isinstance(kwargs, Mapping):
            return tuple(args), dict(kwargs)
    got = f"a tuple of {len(call)}" if isinstance(call, tuple) else type(call).__name__
    raise CalibrationError(
        f"inputs() returned {got}, expected (args, kwargs): a tuple of forward's positional arguments and a dict of "
        "its keyword arguments, such as (batch['x'],), {}"
    )


def _moved(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.layout != torch.strided or (leaf.is_meta and device.type != "meta"):
        kind = "a meta tensor, which has no values" if leaf.is_meta else f"a tensor of layout {leaf.layout}"
        raise CalibrationError(f"a batch holds {kind}, expected dense values: make it dense (x.to_dense()) or real")
    return leaf.clone() if leaf.is_inference() else leaf.to(device)


def samples_in(batch: Any) -> int:
    """Number of samples in a batch or call: the length of the first tensor's first axis, or 1 if there is none."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 1)


def shortened(call: Call, size: int = 2) -> Call:
    """The call with its batch cut to ``size`` samples, if all tensors share a longer first axis."""
    leading = {leaf.shape[:1] for leaf in tree_leaves(call) if isinstance(leaf, Tensor)}
    if len(leading) != 1 or next(iter(leading), ()) == () or next(iter(leading))[0] <= size:
        return call
    cut: Call = tree_map(lambda leaf: leaf[:size] if isinstance(leaf, Tensor) else leaf, call)
    return cut


def fresh(call: Call) -> Call:
    """A copy of the call that a forward may write to: the user's batches stay as they are, for every later pass.

    It is always a copy, as a forward may write into some batches only; it costs little beside the pass.
    """
    leaves = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor | nn.Module)]
    return around_leaves(
        call, {id(leaf): leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves}
    )


def around_leaves(call: Call, leaves: Mapping[int, Any]) -> Call:
    """The call with lists, dicts and objects of its own around these leaves (id of a leaf of the call -> leaf)."""
    try:
        return copy.deepcopy(call, dict(leaves))
    except Exception:  # an object among the arguments has no copies
        return cast(Call, tree_map(lambda leaf: leaves.get(id(leaf), leaf), call))


def run(model: nn.Module, call: Call, weights: Mapping[str, Tensor] | None = None) -> Any:
    """`forward` in evaluation mode, on a copy of the call; afterwards the model is as it was before.

    Raises:
        CalibrationError: If the model does not accept the call; the message names the layer that failed.
    """
    with evaluating(model), unfused_attention():
        return forward(model, fresh(call), weights)


def forward(model: nn.Module, call: Call, weights: Mapping[str, Tensor] | None = None) -> Any:
    """``model(*args, **kwargs)`` without gradients, with some of its tensors replaced for this call.

    The forward may write to the call, so give it a `fresh` one. If it draws random numbers, they depend on the call
    only: every network draws the same ones. Key-value caches among the outputs are left out: they follow the layers
    that fill them.

    Raises:
        CalibrationError: If the model does not accept the call; the message names the layer that failed.
    """
    held = {name for name, _ in model.named_buffers(remove_duplicate=False)} if weights else set[str]()
    with torch._C.DisableTorchFunction():  # what watches the forward does not see this
        given = {name: value.clone() if name in held else value for name, value in (weights or {}).items()}
    try:
        with torch.no_grad(), users_device(), noise.seeded(call):
            args, kwargs = call
            return without_caches(functional_call(model, given, args, kwargs) if given else model(*args, **kwargs))
    except LnrPruneError:
        raise
    except Exception as error:  # a forward may raise anything
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(call) if isinstance(leaf, Tensor)]
        inputs = f"inputs of shape {', '.join(map(str, shapes))}" if shapes else "a call without tensors"
        if ran_out_of_memory(error):
            raise CalibrationError(
                f"{type(model).__name__} ran out of memory on {inputs}, {failing_layer(model, error)}: "
                "give smaller batches"
            ) from error
        raise CalibrationError(
            f"{type(model).__name__} does not accept {inputs}: "
            f"{failing_layer(model, error)}: {type(error).__name__}: {error}. Give batches as the model's forward "
            "takes them, or lnr_prune.Batches(data, inputs)"
        ) from error
