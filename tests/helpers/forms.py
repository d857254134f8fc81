"""Two linear layers, written in all the ways that forwards write them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Form = Callable[[Tensor, Tensor], Tensor]

FORMS: dict[str, Form] = {
    "linear": F.linear,
    "x @ w.T": lambda x, w: x @ w.T,
    "x @ w.t()": lambda x, w: x @ w.t(),
    "x @ w.mT": lambda x, w: x @ w.mT,
    "x @ w.transpose": lambda x, w: x @ w.transpose(0, 1),
    "x @ w.permute": lambda x, w: x @ w.permute(1, 0),
    "matmul": lambda x, w: torch.matmul(x, w.T),
    "mm": lambda x, w: torch.mm(x.flatten(0, -2), w.t()).unflatten(0, x.shape[:-1]),
    "addmm": lambda x, w: torch.addmm(x.new_zeros(len(w)), x.flatten(0, -2), w.t()).unflatten(0, x.shape[:-1]),
    "contiguous": lambda x, w: x @ w.T.contiguous(),
    "w @ x": lambda x, w: (w @ x.mT).mT,
    "einsum": lambda x, w: torch.einsum("...i,oi->...o", x, w),
    "einsum, weight first": lambda x, w: torch.einsum("oi,...i->...o", w, x),
    "einsum of a transpose": lambda x, w: torch.einsum("...i,io->...o", x, w.T),
}


class TwoLayers(nn.Module):
    """``w2 relu(w1 x)``; the parameters are the same for every form."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form, generator = form, torch.Generator().manual_seed(0)
        self.w1 = nn.Parameter(torch.randn(16, 8, generator=generator) / 3)
        self.w2 = nn.Parameter(torch.randn(6, 16, generator=generator) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(torch.relu(self.form(x, self.w1)), self.w2)


class FalconLinear(nn.Linear):
    """A linear layer as transformers' Falcon writes it."""

    def forward(self, input: Tensor) -> Tensor:
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class Residual(nn.Module):
    """Two layers with a norm before them and a shortcut around them."""

    def __init__(self, layer: type[nn.Linear], *, bias: bool) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 4)
        self.a, self.b = layer(8, 32, bias=bias), layer(32, 8, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x + self.b(torch.relu(self.a(self.norm(x))))))
