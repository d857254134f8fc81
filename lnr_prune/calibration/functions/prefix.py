"""Passes that share their beginning: what comes before the first changed tensor is computed once.

Many passes differ from the original one only from some layer on. A `Prefix` is an original pass that waits before the
first function that reads one of the changed tensors. It walks along the network: ask for changes in order of
execution, and everything is computed once. It begins again when it is asked for a change that it has passed.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lnr_prune.calibration.calls import Call
from lnr_prune.calibration.functions.pause import Manner, Pause, Replay, begin, go_on
from lnr_prune.calibration.functions.views import name_of

_OF_NO_VALUES = {
    "dim", "size", "numel", "stride", "storage_offset", "is_contiguous", "is_floating_point", "is_complex",
    "element_size", "__len__", "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "requires_grad",
    "get_device", "is_quantized", "is_sparse", "nbytes", "itemsize", "names",
}  # fmt: skip


class Prefix:
    """The beginning of one pass through the original network, see the module."""

    def __init__(self, model: nn.Module, call: Call, tensors: Mapping[str, Tensor], manner: Manner) -> None:
        """Takes the model, its arguments, its tensors by name, and how its passes are paused."""
        self._model, self._call, self._manner = model, call, manner
        self._tensors = {id(tensor): tensor for tensor in tensors.values()}
        self._pause: Pause | None = None  # begun, on a copy of the call, once it is asked for
        self._read, self._next = set[int](), frozenset[int]()

    def before(self, changed: Collection[int]) -> Pause | None:
        """A copy of the pass, which waits before the first function that reads one of these tensors.

        The caller has put the model into evaluation mode.

        Args:
            changed: Ids of tensors of the model.

        Returns:
            The copy; None if no function reads them.
        """
        changed = frozenset(changed)
        if self._read & changed:
            self._restart()
        if self._pause is None or not self._next & changed:
            start = self._pause or begin(self._call)
            replay = Replay(start, before=lambda *of: self._stops(changed, *of), keep=self._manner.keep)
            self._pause, _ = go_on(self._model, start, replay, self._manner)
        if self._pause is None:  # it has ended
            self._restart()
            return None
        return self._pause.copied(self._tensors.values())

    def _restart(self) -> None:
        self._pause, self._read, self._next = None, set(), frozenset()

    def _stops(self, changed: frozenset[int], func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a function reads a changed tensor; takes note of what it reads."""
        if name_of(func) in _OF_NO_VALUES:
            return False
        read = frozenset(id(leaf) for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._tensors)
        if read & changed:
            self._next = read
            return True
        self._read |= read
        return False
