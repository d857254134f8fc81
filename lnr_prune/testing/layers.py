"""Small layers and blocks, written in the ways that real networks write them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    return mix(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])  # type: ignore[no-any-return]


class Standardised(nn.Conv2d):
    """A convolution whose filters are standardised in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Conv2d.forward."""
        flat = self.weight.flatten(1)
        weight = ((flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-3)).view_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class Written(nn.Module):
    """A linear layer that its forward writes as a product: a function of x and the weight."""

    def __init__(self, apply: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.apply_weight, self.weight = apply, nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, c) -> (n, tokens, c')."""
        return self.apply_weight(x, self.weight)


class Recurrent(nn.Module):
    """A recurrent layer over tokens, an LSTM by default."""

    def __init__(self, c: int, d: int, kind: Callable[..., nn.RNNBase] = nn.LSTM, **options: int) -> None:
        super().__init__()
        self.cells = kind(c, d, batch_first=True, **options)
        self.out = nn.Linear(d * (2 if self.cells.bidirectional else 1), c)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, c) -> the same shape."""
        return self.out(self.cells(x)[0])  # type: ignore[no-any-return]


class Cells(nn.Module):
    """A recurrent cell that the forward itself calls, for the first token of every row."""

    def __init__(self, c: int, d: int) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(c, d), nn.Linear(d, c)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, c) -> the same shape; all tokens get the last state."""
        state = None
        for token in x[:, ::SIDE].unbind(1):
            state = self.cell(token, state)
        return self.out(state[0]).unsqueeze(1).expand(x.shape)  # type: ignore[index, no-any-return]


class Experts(nn.Module):
    """As in Mixtral: for every token, a router picks two of three gated layers, whose weights are stacked.

    The tokens are sent to the experts that are picked; or, if ``dense``, to all of them, and the other results are
    multiplied by zero.
    """

    def __init__(self, c: int, d: int, *, dense: bool = False) -> None:
        super().__init__()
        self.dense, self.router = dense, nn.Linear(c, 3, bias=False)
        self.up, self.down = nn.Parameter(torch.zeros(3, 2 * d, c)), nn.Parameter(torch.zeros(3, c, d))

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, c) -> the same shape."""
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).softmax(-1).topk(2, -1)
        if self.dense:
            gates = torch.zeros_like(self.router(rows)).scatter(1, chosen, weights)
            h = torch.einsum("bi,eoi->ebo", rows, self.up)
            y = (gates.T[..., None] * torch.einsum("ebi,eoi->ebo", _gated(h), self.down)).sum(0)
        else:
            ids = chosen.flatten()
            h = torch.bmm(self.up[ids], rows.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1)
            y = torch.bmm(self.down[ids], _gated(h).unsqueeze(-1)).squeeze(-1) * weights.reshape(-1, 1)
            y = y.unflatten(0, (-1, 2)).sum(1)
        return y.view(x.shape)


def _gated(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


class Picked(nn.Module):
    """Only tokens with a positive score go through the layers; how many they are depends on the data."""

    def __init__(self, c: int, d: int) -> None:
        super().__init__()
        self.score, self.a, self.b = nn.Linear(c, 1), nn.Linear(c, d), nn.Linear(d, c)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, c) -> the same shape."""
        picked = self.score(x).squeeze(-1) > 0
        return torch.zeros_like(x).index_put((picked,), self.b(self.a(x[picked]).relu()))
