"""Passes that wait in front of a network's last layer: little is kept, and little is left to compute."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lnr_prune.calibration.calls import Call
from lnr_prune.calibration.functions.pause import Manner, Pause, Replay, begin, go_on


def before_last(model: nn.Module, call: Call, tensors: Iterable[Tensor]) -> Pause | None:
    """A pass that waits before the last function that reads one of the model's tensors; None if there is none.

    The caller has put the model into evaluation mode. This takes two forward passes.
    """
    own, number, last = {id(tensor) for tensor in tensors}, 0, 0

    def note(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        nonlocal number, last
        number += 1
        if any(id(leaf) in own for leaf in tree_leaves((args, kwargs))):
            last = number
        return False

    def stops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        nonlocal number
        number += 1
        return number == last

    start = begin(call)
    go_on(model, start, Replay(start, before=note), Manner())
    number, start = 0, begin(call)
    return go_on(model, start, Replay(start, before=stops), Manner())[0]
