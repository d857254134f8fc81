"""Small attention layers in the layouts of real networks, for the random networks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PackedAttention(nn.Module):
    """Attention over tokens with q, k and v in one matrix, and optionally a relative-position bias per head."""

    index: Tensor

    def __init__(self, c: int, heads: int, tokens: int = 0) -> None:
        super().__init__()
        self.size = c // heads
        self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.table = nn.Parameter(torch.zeros(2 * tokens - 1, heads)) if tokens else None
        self.register_buffer("index", torch.arange(tokens)[:, None] - torch.arange(tokens) + tokens - 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, c) -> the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.size)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None if self.table is None else self.table[self.index].permute(2, 0, 1)
        return self.out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class WindowAttention(nn.Module):
    """As in Swin: attention inside shifted windows of two by two tokens, with a relative-position bias."""

    def __init__(self, c: int, heads: int, side: int) -> None:
        super().__init__()
        self.side, self.attention = side, PackedAttention(c, heads, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(n, side^2, c) -> the same shape."""
        n, half = x.shape[0], self.side // 2
        x = x.unflatten(1, (self.side, self.side)).roll((1, 1), (1, 2))
        windows = x.reshape(n, half, 2, half, 2, -1).transpose(2, 3).reshape(n * half**2, 4, -1)
        x = (
            self.attention(windows)
            .reshape(n, half, half, 2, 2, -1)
            .transpose(2, 3)
            .reshape(n, self.side, self.side, -1)
        )
        return x.roll((-1, -1), (1, 2)).flatten(1, 2)


class GroupedQueries(nn.Module):
    """As in Llama: two query heads for each key-value head, rotary positions, a norm shared by the heads."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(2)
        self.q, self.k, self.v = (nn.Linear(c, 2 * n, bias=False) for n in (2 * heads, heads, heads))
        self.out = nn.Linear(4 * heads, c, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """(n, tokens, 2 heads) -> (n, heads, tokens, 2)."""
        return x.unflatten(-1, (-1, 2)).transpose(1, 2)  # type: ignore[no-any-return]

    def rotate(self, x: Tensor) -> Tensor:
        """Rotates every pair by its position."""
        angle = torch.arange(x.shape[2]).to(x)[:, None]
        return x * angle.cos() + torch.cat([-x[..., 1:], x[..., :1]], -1) * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, c) -> the same shape."""
        q, k = self.rotate(self.norm(self.heads(self.q(x)))), self.rotate(self.heads(self.k(x)))
        k, v = (part.repeat_interleave(2, 1) for part in (k, self.heads(self.v(x))))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Tokens attend to every fourth token; scores and softmax written out, keys and values in one matrix."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.size = c // heads
        self.q, self.kv, self.out = nn.Linear(c, c), nn.Linear(c, 2 * c), nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, c) -> the same shape."""
        q = self.q(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
        k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in self.kv(x[:, ::4]).chunk(2, -1))
        weights = (q @ k.transpose(-1, -2) / self.size**0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class ChannelAttention(nn.Module):
    """As in XCiT: channels of a head attend to one another, with one temperature per head."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.size, self.temperature = c // heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, c) -> the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.size)).permute(2, 0, 3, 4, 1).unbind(0)
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * self.temperature).softmax(-1)
        return self.out((weights @ v).permute(0, 3, 1, 2).flatten(2))  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    """The feed-forward layer of Llama."""

    def __init__(self, c: int, d: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(c, d), nn.Linear(c, d), nn.Linear(d, c)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, c) -> the same shape."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]
