"""Forwards that hold sizes: in attributes, in settings, in literals, or worked out from others."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attend(qkv: Tensor, heads: int, size: int) -> Tensor:
    """(n, p, 3 heads size) -> (n, heads, p, size)."""
    n, p, _ = qkv.shape
    q, k, v = qkv.reshape(n, p, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v)


class HeldHeads(nn.Module):
    """timm's: the number of heads and their common width are attributes; others are equal by coincidence."""

    def __init__(self, d: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.unused = heads, d // heads, heads
        self.attn_dim, self.qkv_dim = d, 3 * d
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).view(*x.shape[:2], self.qkv_dim)
        y = attend(qkv, self.num_heads, self.head_dim)
        return x + self.proj(y.transpose(1, 2).reshape(x.shape[0], -1, self.attn_dim))


@dataclass(frozen=True)
class Settings:
    heads: int
    width: int


class HeldBySettings(nn.Module):
    """Hugging Face's: blocks read the settings that they share."""

    class Block(nn.Module):
        def __init__(self, settings: Settings | SimpleNamespace) -> None:
            super().__init__()
            self.settings, d = settings, settings.width
            self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

        def forward(self, x: Tensor) -> Tensor:
            y = attend(self.qkv(x), self.settings.heads, 3)
            return x + self.proj(y.transpose(1, 2).reshape(*x.shape[:2], -1))

    def __init__(self, settings: Settings | SimpleNamespace) -> None:
        super().__init__()
        self.settings, self.blocks = settings, nn.Sequential(self.Block(settings), self.Block(settings))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class HeldByParts(nn.Module):
    """Two branches share a layer, cut at sizes that a tuple holds; the outer module gives the inner one a size."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(6, 2)

        def forward(self, x: Tensor, width: int) -> Tensor:
            return self.down(x.view(-1, width))

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.outer = (8, 4), 6
        self.both, self.left, self.right = nn.Linear(4, 12), nn.Linear(8, 2), nn.Linear(4, 2)
        self.up, self.inner = nn.Linear(4, 6), self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.both(x).split(self.sizes, 1)
        return self.left(left.relu()) + self.right(right.relu()) + self.inner(self.up(x).relu(), self.outer)


class DerivedSizes(nn.Module):
    """torchvision's Swin: the size of a head is worked out from the width of the input, which stays."""

    def __init__(self, d: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 7), nn.Linear(7, d)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor | tuple[Tensor, ...]]:
        y = attend(self.qkv(x), self.heads, x.shape[-1] // self.heads)
        y = self.proj(y.transpose(1, 2).reshape(x.shape))
        y = y + self.down(self.up(y).relu())
        return {"y": y if scale is None else y * scale, "last": (y[:, -1],)}


class UniformBias(nn.Module):
    """T5's: two layers add one bias, the same for every head, of a size that one of them holds."""

    def __init__(self, d: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.first, self.second = heads, nn.Linear(d, 3 * d), nn.Linear(d, 3 * d)
        self.down, self.out = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        bias = x.new_zeros(1, self.heads, x.shape[1], x.shape[1]) - torch.arange(x.shape[1])
        return self._attended(self.second(self._attended(self.first(x), bias, self.down)), bias, self.out)

    def _attended(self, qkv: Tensor, bias: Tensor, out: nn.Linear) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        return out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))


class MergedHeads(nn.Module):
    """Older attention: heads and samples share an axis."""

    def __init__(self, d: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.size = heads, d // heads
        self.q, self.k, self.v, self.proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, p, d = x.shape
        q, k, v = (
            f(x).view(n, p, self.heads, d // 3).transpose(1, 2).reshape(n * self.heads, p, self.size)
            for f in (self.q, self.k, self.v)
        )
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return self.proj(y.view(n, self.heads, p, self.size).transpose(1, 2).reshape(n, p, d))
