"""Patterns of real networks: each makes a block that maps one image to another."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lnr_prune.testing.attention import (
    ChannelAttention,
    CrossAttention,
    GatedMLP,
    GroupedQueries,
    PackedAttention,
    WindowAttention,
)
from lnr_prune.testing.layers import (
    SIDE,
    Block,
    Cells,
    Experts,
    Picked,
    Recurrent,
    Standardised,
    Written,
    conv,
    tokens,
)
from lnr_prune.testing.operations import CHANNELWISE, FREEZING, SHARED_NOISE, Operation

Pattern = Callable[[int, int], tuple[nn.Module, int]]
"""A function of the input channels and the wanted width; it gives a block and its output channels."""


def _shuffle(x: Tensor, groups: int = 2) -> Tensor:
    """ShuffleNet's interleaving of channel groups."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _scaled(layer: nn.Conv2d) -> nn.Conv2d:
    layer.scale = nn.Parameter(torch.ones(layer.out_channels, 1, 1))
    return layer


def _stepped(layer: nn.Conv2d) -> nn.Conv2d:
    layer.register_buffer("step", torch.ones(1))
    return layer


def _attend(x: Tensor, norm: nn.Module, attention: nn.MultiheadAttention) -> Tensor:
    def mix(t: Tensor) -> Tensor:
        t = norm(t)
        return attention(t, t, t, need_weights=False)[0]  # type: ignore[no-any-return]

    return x + tokens(x, mix)


def _on_tokens(make: Callable[[int, int], nn.Module]) -> Pattern:
    """A convolution to two channels per head, and a layer for tokens on a residual stream."""

    def pattern(c: int, d: int) -> tuple[nn.Module, int]:
        return nn.Sequential(conv(c, 2 * d, 1), Block(lambda x, a: x + tokens(x, a), a=make(2 * d, d))), 2 * d

    return pattern


def _then(operation: Operation) -> Pattern:
    """A convolution, and an operation without parameters on what it gives."""
    return lambda c, d: (Block(lambda x, a: operation(a(x)), a=conv(c, d)), d)


def _written(apply: Callable[[Tensor, Tensor], Tensor], *, turned: bool = False) -> Pattern:
    """Two linear layers, of which each is written as a product."""

    def layer(c: int, d: int) -> Written:
        return Written(apply, *((c, d) if turned else (d, c)))

    return lambda c, d: (
        Block(lambda x, a, b: tokens(x, lambda t: b(a(t).relu())), a=layer(c, 2 * d), b=layer(2 * d, d)),
        d,
    )


PATTERNS: dict[str, Pattern] = {
    "conv": lambda c, d: (nn.Sequential(conv(c, d), nn.BatchNorm2d(d), nn.ReLU()), d),
    "linear": lambda c, d: (
        Block(lambda x, a: a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).tanh(), a=nn.Linear(c, d)),
        d,
    ),
    "residual": lambda c, d: (Block(lambda x, a, b: x + b(a(x).relu()), a=conv(c, d), b=conv(d, c, 1)), c),
    "concat": lambda c, d: (Block(lambda x, a: torch.cat([a(x), x], 1), a=conv(c, d)), c + d),
    "split": lambda c, d: (
        Block(lambda x, a: torch.cat([x.chunk(2, 1)[0], a(x.chunk(2, 1)[1])], 1), a=conv(c // 2, d)),
        (c + 1) // 2 + d,
    ),
    "slice": lambda c, d: (Block(lambda x, a: a(x[:, 1:]) + x[:, :1], a=conv(c - 1, d)), d),
    "shuffle": lambda c, d: (Block(lambda x, a: _shuffle(a(x)), a=conv(c, 2 * d)), 2 * d),
    "gate": lambda c, d: (
        Block(
            lambda x, a, b: x * b(a(x.mean((2, 3), keepdim=True)).relu()).sigmoid(), a=conv(c, d, 1), b=conv(d, c, 1)
        ),
        c,
    ),
    "depthwise": lambda c, d: (nn.Sequential(conv(c, c, groups=c), nn.Hardswish(), conv(c, d, 1)), d),
    "grouped": lambda c, d: (nn.Sequential(conv(c, 2 * d, 1), conv(2 * d, 4 * d, groups=d), nn.SiLU()), 4 * d),
    "group norm": lambda c, d: (nn.Sequential(conv(c, 2 * d), nn.GroupNorm(d, 2 * d), nn.GELU()), 2 * d),
    "glu": lambda c, d: (nn.Sequential(conv(c, 2 * d), nn.GLU(1)), d),
    "transposed": lambda c, d: (nn.Sequential(nn.ConvTranspose2d(c, d, 3, padding=1), nn.PReLU(d)), d),
    "pool": lambda c, d: (nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(c, d), nn.AvgPool2d(3, 1, 1)), d),
    "shared": lambda c, d: (Block(lambda x, a: a(a(x).relu()), a=conv(c, c)), c),
    "pad": lambda c, d: (Block(lambda x, a: F.pad(x, (0, 0, 0, 0, 1, 1)) + a(x), a=conv(c, c + 2)), c + 2),
    "attention": _on_tokens(PackedAttention),
    "relative bias": _on_tokens(lambda c, heads: PackedAttention(c, heads, SIDE**2)),
    "windows": _on_tokens(lambda c, heads: WindowAttention(c, heads, SIDE)),
    "grouped queries": _on_tokens(GroupedQueries),
    "cross attention": _on_tokens(CrossAttention),
    "channel attention": _on_tokens(ChannelAttention),
    "gated mlp": _on_tokens(lambda c, d: GatedMLP(c, 3 * d)),
    "lstm": _on_tokens(Recurrent),
    "gru": _on_tokens(lambda c, d: Recurrent(c, d, nn.GRU, num_layers=2, bidirectional=True)),
    "rnn": _on_tokens(lambda c, d: Recurrent(c, d, nn.RNN)),
    "cells": _on_tokens(Cells),
    "experts": _on_tokens(Experts),
    "dense experts": _on_tokens(lambda c, d: Experts(c, d, dense=True)),
    "picked tokens": _on_tokens(Picked),
    "matmul": _written(lambda x, w: x @ w.T),
    "mm": _written(lambda x, w: torch.mm(x.flatten(0, 1), w.t()).unflatten(0, x.shape[:2])),
    "product with einsum": _written(lambda x, w: torch.einsum("...i,oi->...o", x, w)),
    "weight first": _written(lambda x, w: (w @ x.mT).mT),
    "turned weight": _written(lambda x, w: x @ w, turned=True),
    "token mixing": lambda c, d: (
        Block(lambda x, a, b: x + b(a(x.flatten(2)).relu()).view(x.shape), a=nn.Linear(SIDE**2, d), b=nn.Linear(d, 16)),
        c,
    ),
    "layer scale": lambda c, d: (
        Block(lambda x, a, b: x + b(a(x)) * b.scale, a=conv(c, d), b=_scaled(conv(d, c, 1))),
        c,
    ),
    "positions": lambda c, d: (
        Block(
            lambda x, a, e: a(x) + e(torch.arange(SIDE**2, device=x.device)).T.reshape(1, -1, SIDE, SIDE),
            a=conv(c, d),
            e=nn.Embedding(SIDE**2, d),
        ),
        d,
    ),
    "standardised": lambda c, d: (nn.Sequential(Standardised(c, d, 3, padding=1), nn.BatchNorm2d(d), nn.ReLU()), d),
    "weight norm": lambda c, d: (nn.Sequential(nn.utils.parametrizations.weight_norm(conv(c, d)), nn.ReLU()), d),
    "instance norm": lambda c, d: (nn.Sequential(conv(c, d), nn.InstanceNorm2d(d, affine=True), nn.ELU()), d),
    "pixel shuffle": lambda c, d: (nn.Sequential(conv(c, 4 * d, 1), nn.PixelShuffle(2), nn.MaxPool2d(2)), d),
    "interpolate": lambda c, d: (
        Block(lambda x, a: F.interpolate(F.avg_pool2d(a(x), 2), scale_factor=2.0, mode="bilinear"), a=conv(c, d)),
        d,
    ),
    "spatial gate": lambda c, d: (Block(lambda x, a, g: a(x) * g(x).sigmoid(), a=conv(c, d), g=conv(c, 1)), d),
    "einsum": lambda c, d: (
        Block(lambda x, a: torch.einsum("nchw,nchv->nvcw", a(x), a(x)).transpose(1, 2) / 9, a=conv(c, d)),
        d,
    ),
    "multihead": lambda c, d: (
        nn.Sequential(
            conv(c, 2 * d, 1),
            Block(_attend, norm=nn.LayerNorm(2 * d), attention=nn.MultiheadAttention(2 * d, d, batch_first=True)),
        ),
        2 * d,
    ),
    "sample": lambda c, d: (
        Block(lambda x, m, s: m(x) + s(x).tanh().exp() * torch.randn_like(m(x)), m=conv(c, d), s=conv(c, d)),
        d,
    ),
    "number": lambda c, d: (Block(lambda x, a: a(x) * float(a.step), a=_stepped(conv(c, d))), d),
    **{name: _then(operation) for name, operation in (CHANNELWISE | SHARED_NOISE | FREEZING).items()},
}
"""Name -> pattern."""
