"""The problems that solvers are compared on: six synthetic families, and second moments of real activations."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lnr_prune import Block, GroupLasso


def linear_toy(d: int, h: int, rank: int) -> GroupLasso:
    """The practical session's own test problem: ``x`` of low rank, ``y = W x``, second moments divided by d."""
    x = _randn(10_000, rank) @ _randn(rank, d)
    y = x @ _randn(d, h)
    n = len(x) * d
    return GroupLasso((Block(x.T @ x / n, y.T @ x / n, float(y.square().sum()) / n),))


def activations(
    channels: int, width: int, h: int, activation: Callable[[Tensor], Tensor], samples: int = 8192
) -> GroupLasso:
    """Activations of ``width`` columns a channel, driven by latent factors of falling size, with channel scales.

    Factor j has standard deviation j^-3/4; columns of a channel share half of their variance, and every column has
    noise of its own of 0.3 %, so that R is invertible, with a condition number of 1e5 and more.
    """
    d = channels * width
    factors = min(d, 512)
    z = _randn(samples, factors) / torch.arange(1, factors + 1, dtype=torch.float64) ** 0.75
    mixing = (_randn(factors, channels).repeat_interleave(width, 1) + _randn(factors, d)) / 2**0.5
    x = z @ mixing
    x = activation(x / x.std(0) + 0.5 * _randn(channels).repeat_interleave(width)) + 3e-3 * _randn(samples, d)
    x = x * (0.5 * _randn(channels)).exp().repeat_interleave(width)
    y = x @ _randn(d, h) / d**0.5
    groups = torch.arange(channels).repeat_interleave(width)
    return GroupLasso((Block(x.T @ x / samples, y.T @ x / samples, float(y.square().sum()) / samples, groups),))


def _randn(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


FAMILIES: dict[str, Callable[[], GroupLasso]] = {
    "A": lambda: linear_toy(100, 200, 80),
    "B": lambda: linear_toy(500, 200, 450),
    "C": lambda: activations(50, 16, 500, F.relu),
    "D": lambda: activations(256, 9, 256, F.relu),
    "E": lambda: activations(3072, 1, 768, F.gelu),
    "F": lambda: activations(768, 1, 192, F.gelu),
}
