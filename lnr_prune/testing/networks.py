"""Random networks made of the patterns of real ones, to test the graph core with."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lnr_prune.errors import LnrPruneError
from lnr_prune.testing.attention import (
    ChannelAttention,
    CrossAttention,
    GatedMLP,
    GroupedQueries,
    PackedAttention,
    WindowAttention,
)

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

SIDE = 4  # height and width of the images


class Block(nn.Module):
    """Layers by name, and a function that applies them: maps (n, c, h, w) to (n, c', h, w)."""

    def __init__(self, apply: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.apply_layers = apply
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Calls the function with x and the layers."""
        return self.apply_layers(x, **self.layers)


def conv(c: int, d: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(c, d, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


def tokens(x: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies a function of tokens (n, h w, c) to a map."""
    return mix(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def shuffle(x: Tensor, groups: int = 2) -> Tensor:
    """ShuffleNet's interleaving of channel groups."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _scaled(layer: nn.Conv2d) -> nn.Conv2d:
    layer.scale = nn.Parameter(torch.ones(layer.out_channels, 1, 1))
    return layer


def _attend(x: Tensor, norm: nn.Module, attention: nn.MultiheadAttention) -> Tensor:
    def mix(t: Tensor) -> Tensor:
        t = norm(t)
        return attention(t, t, t, need_weights=False)[0]  # type: ignore[no-any-return]

    return x + tokens(x, mix)


def _attention(make: Callable[[int, int], nn.Module]) -> Callable[[int, int], tuple[nn.Module, int]]:
    """A convolution to two channels per head, and attention on a residual stream."""

    def pattern(c: int, d: int) -> tuple[nn.Module, int]:
        return nn.Sequential(conv(c, 2 * d, 1), Block(lambda x, a: x + tokens(x, a), a=make(2 * d, d))), 2 * d

    return pattern


class Standardised(nn.Conv2d):
    """A convolution whose filters are standardised in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Conv2d.forward."""
        flat = self.weight.flatten(1)
        weight = ((flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-3)).view_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class Recurrent(nn.Module):
    """An LSTM over tokens."""

    def __init__(self, c: int, d: int) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(c, d, batch_first=True), nn.Linear(d, c)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, c) -> the same shape."""
        return self.out(self.lstm(x)[0])  # type: ignore[no-any-return]


# Name -> function of the input channels and the wanted width; it gives a block and its output channels.
PATTERNS: dict[str, Callable[[int, int], tuple[nn.Module, int]]] = {
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
    "shuffle": lambda c, d: (Block(lambda x, a: shuffle(a(x)), a=conv(c, 2 * d)), 2 * d),
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
    "attention": _attention(PackedAttention),
    "relative bias": _attention(lambda c, heads: PackedAttention(c, heads, SIDE**2)),
    "windows": _attention(lambda c, heads: WindowAttention(c, heads, SIDE)),
    "grouped queries": _attention(GroupedQueries),
    "cross attention": _attention(CrossAttention),
    "channel attention": _attention(ChannelAttention),
    "gated mlp": _attention(lambda c, d: GatedMLP(c, 3 * d)),
    "recurrent": _attention(Recurrent),
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
}
Recipe = tuple[str, int, list["Recipe"]]
"""A pattern, its width, and for "branches" the recipes of one of its two branches."""


def build(recipes: list[Recipe], channels: int) -> tuple[nn.Sequential, int]:
    """A module of patterns in sequence, and its number of output channels."""
    blocks: list[nn.Module] = []
    for name, width, inside in recipes:
        if name == "branches":
            left, left_channels = build(inside, channels)
            right = conv(channels, width, 1)
            blocks.append(Block(lambda x, a, b: torch.cat([b(x), a(x)], 1), a=left, b=right))
            channels = left_channels + width
        else:
            block, channels = PATTERNS[name](channels, width)
            blocks.append(block)
    return nn.Sequential(*blocks), channels


def make_network(recipes: list[Recipe], channels: int, flat: bool, seed: int) -> tuple[nn.Module, Tensor]:
    """An image classifier made of patterns, in evaluation mode, and a batch of two inputs for it.

    Weights, scales and batch-norm statistics are random and away from zero, so that they hide no mistake.
    """
    body, last = build(recipes, channels)
    head = [nn.Flatten(), nn.Linear(last * SIDE**2, 3)] if flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(conv(3, channels), *body, *head, *([] if flat else [nn.Linear(last, 3)])).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                value = torch.rand(tensor.shape, generator=generator) + 0.5
                if tensor.dim() > 1:
                    value = (value - 1) * 3 / max(1, tensor[0].numel()) ** 0.5
                tensor.copy_(value * (0.2 if name.endswith("bias") else 1))
    return model, torch.randn(2, 3, SIDE, SIDE, generator=generator)


def random_network(seed: int, depth: int = 5) -> tuple[nn.Module, Tensor]:
    """`make_network` of ``depth`` random patterns.

    Example:
        >>> model, x = random_network(seed=0)
        >>> model(x).shape
        torch.Size([2, 3])
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def recipe(depth: int) -> Recipe:
        name = [*PATTERNS, "branches"][draw(0, len(PATTERNS) + 1)]
        return name, draw(2, 6), [recipe(depth - 1) for _ in range(draw(1, 3))] if name == "branches" and depth else []

    return make_network([recipe(2) for _ in range(depth)], draw(3, 7), bool(draw(0, 2)), seed)


def networks(max_patterns: int = 6) -> "SearchStrategy[tuple[nn.Module, Tensor]]":
    """A hypothesis strategy: random image classifiers, in evaluation mode, with a batch of two inputs.

    A network is a sequence of patterns of real networks: convolutions, residual and dense blocks, channel
    shuffles, gates, every layout of attention, shared and computed weights, branches of patterns ... A failing
    example shrinks to the few patterns that matter. ``make_network`` is called with what was drawn.

    Args:
        max_patterns: Largest number of patterns in sequence.

    Raises:
        LnrPruneError: If hypothesis is not installed.
    """
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        raise LnrPruneError("networks() needs hypothesis: pip install hypothesis") from error

    def rows(inside: "SearchStrategy[list[Recipe]]", size: int) -> "SearchStrategy[list[Recipe]]":
        plain = st.tuples(st.sampled_from(list(PATTERNS)), st.integers(2, 5), none)
        branches = st.tuples(st.just("branches"), st.integers(2, 5), inside)
        return st.lists(plain | branches, min_size=1, max_size=size)

    none: SearchStrategy[list[Recipe]] = st.builds(list)
    recipes = rows(rows(none, 2), max_patterns)
    return st.builds(make_network, recipes, st.integers(3, 6), st.booleans(), st.integers(0, 2**16))
