"""The functions that a forward pass calls, recorded so that they can be called again."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lnr_prune.runtime import noise

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Recorded:
    """A recorded call.

    Attributes:
        function: What was called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        result: What it returned.
        writes: Whether it writes to its inputs.
        draws: Whether it draws random numbers.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any
    writes: bool
    draws: bool

    @property
    def inputs(self) -> list[Tensor]:
        """All tensors that it was given."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def again(self, replaced: Mapping[int, Tensor]) -> Any:
        """The result for other inputs (id of the recorded one -> tensor), which are left as they are."""

        def other(leaf: Value) -> Value | Tensor:
            if not isinstance(leaf, Tensor) or id(leaf) not in replaced:
                return leaf
            given = replaced[id(leaf)]
            return given.clone() if self.writes else given

        args, kwargs = tree_map(other, (self.args, dict(self.kwargs)))
        return self.function(*args, **kwargs)


class Recording(TorchFunctionMode):
    """Records the calls that are made within this mode.

    Attributes:
        calls: The calls, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Recorded] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before, generators = _versions(given), noise.states()
        result = func(*args, **(kwargs or {}))
        writes = before is None or before != _versions(given)
        self.calls.append(Recorded(func, args, kwargs or {}, result, writes, noise.differ(generators, noise.states())))
        return result


def _versions(tensors: Iterable[Tensor]) -> list[int] | None:
    """How often each was written to; None = not known."""
    tensors = list(tensors)
    return None if any(tensor.is_inference() for tensor in tensors) else [tensor._version for tensor in tensors]
