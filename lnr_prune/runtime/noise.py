"""Random numbers of forward passes: the same call draws the same ones, in whatever network and whenever it is made.

Networks may draw random numbers even in evaluation (a VAE's sample, injected noise, Monte Carlo dropout). A comparison
of two networks means something only if both draw the same ones. Functions that take a tensor draw in the order of its
memory, which need not be that of its axes, and which a map with a single channel leaves open; see `InOrder`.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

PROBED = 64  # values of a tensor that its seed depends on

DRAW_LIKE = {
    "alpha_dropout", "bernoulli", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout",
    "feature_dropout", "normal", "poisson", "rand_like", "randint_like", "randn_like", "rrelu",
}  # fmt: skip
"""Names of functions that draw a random number for each element of a tensor."""

States = tuple[Tensor, list[Tensor]]
"""States of torch's generators, on the CPU and on every accelerator."""


def states() -> States:
    """The states of torch's generators."""
    accelerator = _accelerator()
    return torch.get_rng_state(), [] if accelerator is None else accelerator.get_rng_state_all()


def restore(saved: States) -> None:
    """Puts torch's generators into these states."""
    torch.set_rng_state(saved[0])
    if saved[1]:
        _accelerator().set_rng_state_all(saved[1])


def differ(before: States, after: States) -> bool:
    """Whether random numbers were drawn between the two."""
    return not all(map(torch.equal, (before[0], *before[1]), (after[0], *after[1])))


@contextmanager
def seeded(call: Any) -> Iterator[None]:
    """Within, torch's random numbers depend on the call only; afterwards, its generators are as they were."""
    before, seed, accelerator = states(), _seed_of(call), _accelerator()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed does this, after much else
    if accelerator is not None:
        accelerator.manual_seed_all(seed)
    try:
        yield
    finally:
        restore(before)


class InOrder(TorchFunctionMode):
    """Within this, random numbers are drawn in the order of the axes, whatever the order in memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").partition(".")[0] in DRAW_LIKE and not kwargs.get("inplace"):
            args, kwargs = tree_map(_in_order, (args, kwargs))
        return func(*args, **kwargs)


def _in_order(leaf: Any) -> Any:
    return leaf.contiguous() if isinstance(leaf, Tensor) else leaf


def _seed_of(call: Any) -> int:
    """A number that depends on some values of every tensor of a call."""
    seed = 0
    with torch._C.DisableTorchFunction():  # nobody who watches the forward pass sees this
        for leaf in tree_leaves(call):
            if isinstance(leaf, Tensor) and leaf.numel() and not leaf.is_meta:
                real = leaf.detach().real if leaf.is_complex() else leaf.detach()
                probed = real.flatten()[:: max(1, leaf.numel() // PROBED)][:PROBED].double().cpu()
                seed = zlib.crc32(probed.numpy().tobytes(), seed)
    return seed


def _accelerator() -> Any:
    """torch.cuda, or the module of another accelerator; None if there is none, or if it has not been used."""
    device = torch.accelerator.current_accelerator()
    module: Any = None if device is None else torch.get_device_module(device)
    return module if module is not None and getattr(module, "is_initialized", lambda: True)() else None
