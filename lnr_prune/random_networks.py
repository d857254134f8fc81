"""Random networks out of the patterns of real ones, to test the graph core with."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 4  # height and width of the images


class Block(nn.Module):
    """Layers by name, and what to do with them: maps (n, c, h, w) to (n, c', h, w)."""

    def __init__(self, apply: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.apply_layers = apply
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Calls the function with x and the layers."""
        return self.apply_layers(x, **self.layers)


class PackedAttention(nn.Module):
    """Attention over positions with q, k and v in one matrix."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.size = c // heads
        self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        """(n, positions, c) -> the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.size)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


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


def _attend(x: Tensor, norm: nn.Module, attention: nn.MultiheadAttention) -> Tensor:
    def mix(t: Tensor) -> Tensor:
        t = norm(t)
        return attention(t, t, t, need_weights=False)[0]  # type: ignore[no-any-return]

    return x + tokens(x, mix)


# Name -> given the channels that come in and that are wanted, a block and the channels that it gives.
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
    "attention": lambda c, d: (
        nn.Sequential(conv(c, 2 * d, 1), Block(lambda x, a: x + tokens(x, a), a=PackedAttention(2 * d, d))),
        2 * d,
    ),
    "multihead": lambda c, d: (
        nn.Sequential(
            conv(c, 2 * d, 1),
            Block(_attend, norm=nn.LayerNorm(2 * d), attention=nn.MultiheadAttention(2 * d, d, batch_first=True)),
        ),
        2 * d,
    ),
}


def random_network(seed: int, depth: int = 5) -> tuple[nn.Module, Tensor]:
    """A network of ``depth`` random patterns and a batch of two inputs for it, in evaluation mode.

    Weights, scales and batch-norm statistics are random and away from zero, so that they hide nothing.

    Example:
        >>> model, x = random_network(seed=0)
        >>> model(x).shape
        torch.Size([2, 3])
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    names, channels = list(PATTERNS), draw(3, 7)
    blocks: list[nn.Module] = [conv(3, channels)]
    for _ in range(depth):
        block, channels = PATTERNS[names[draw(0, len(names))]](channels, draw(2, 6))
        blocks.append(block)
    flat = draw(0, 2)
    head = [nn.Flatten(), nn.Linear(channels * SIDE**2, 3)] if flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*blocks, *head, *([] if flat else [nn.Linear(channels, 3)])).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                value = torch.rand(tensor.shape, generator=generator) + 0.5
                if tensor.dim() > 1:
                    value = (value - 1) * 3 / max(1, tensor[0].numel()) ** 0.5
                tensor.copy_(value * (0.2 if name.endswith("bias") else 1))
    return model, torch.randn(2, 3, SIDE, SIDE, generator=generator)
