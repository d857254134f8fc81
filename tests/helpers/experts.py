"""Small mixtures of experts, written in the ways that libraries write them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FORMS = ("picked", "picked transposed", "grouped", "all at once", "einsum", "one by one")


@torch.library.custom_op("lnr_tests::grouped_mm_fallback", mutates_args=())
def grouped_mm_fallback(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """What `F.grouped_mm` computes, for any dtype."""
    ends = [0, *offs.tolist()]
    return torch.cat([x[a:b] @ part for a, b, part in zip(ends, ends[1:], weight, strict=False)])


@grouped_mm_fallback.register_fake
def _(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[2])


class Experts(nn.Module):
    """A router picks two of the experts for every row; gated or not, each expert has a hidden layer."""

    def __init__(self, form: str, experts: int = 3, width: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.form, self.router = form, nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 2 * hidden, width) / width**0.5)
        self.up_bias = nn.Parameter(torch.randn(experts, 2 * hidden) / 4)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) / hidden**0.5)
        if form in ("picked transposed", "grouped"):
            self.up, self.down = (nn.Parameter(weight.data.mT.contiguous()) for weight in (self.up, self.down))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        if self.form == "grouped":
            return self.grouped(x, weights, chosen)
        if not self.form.startswith("picked"):
            gates = torch.zeros_like(self.router(x)).scatter(1, chosen, weights)
            return self.dense(x, gates)
        ids, rows = chosen.reshape(-1), x.repeat_interleave(2, 0)
        h = self.gated(self.applied(rows, self.up[ids]) + self.up_bias[ids])
        y = self.applied(h, self.down[ids]) * weights.reshape(-1, 1)
        return y.view(len(x), 2, -1).sum(1)

    def applied(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.form == "picked":
            return torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1)
        return torch.bmm(x.unsqueeze(1), weight).squeeze(1)

    def grouped(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        ids, order = torch.sort(chosen.reshape(-1), stable=True)
        ends = F.one_hot(ids, len(self.up)).sum(0).cumsum(0)
        h = self.gated(grouped_mm_fallback(x[order // 2], self.up, ends) + self.up_bias[ids])
        y = grouped_mm_fallback(h, self.down, ends) * weights.reshape(-1, 1)[order]
        back = torch.empty_like(order).index_put((order,), torch.arange(len(order)))
        return y[back].view(len(x), 2, -1).sum(1)

    def dense(self, x: Tensor, gates: Tensor) -> Tensor:
        if self.form == "one by one":
            y = x.new_zeros(x.shape)
            for expert in range(len(self.up)):
                h = self.gated(F.linear(x, self.up[expert], self.up_bias[expert]))
                y = y + gates[:, expert, None] * (h @ self.down[expert].T)
            return y
        rows = x.expand(len(self.up), *x.shape)
        if self.form == "einsum":
            h = torch.einsum("ebi,eoi->ebo", rows, self.up)
            y = torch.einsum("...eoi,...ebi->...ebo", self.down, self.gated(h + self.up_bias[:, None]))
        else:
            h = torch.bmm(rows, self.up.transpose(1, 2)) + self.up_bias[:, None]
            y = self.gated(h) @ self.down.permute(0, 2, 1)
        return (gates.T[..., None] * y).sum(0)

    def gated(self, h: Tensor) -> Tensor:
        if self.form == "picked transposed":
            return F.silu(h[..., ::2]) * h[..., 1::2]
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up


class Mixture(nn.Module):
    """Experts between two layers, as in a transformer's block."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.experts, self.last = nn.Linear(8, 8), Experts(form), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.experts(x))
