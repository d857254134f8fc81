"""Operations that work channel by channel between two convolutions: half of the channels leave, and nothing changes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import lnr_prune as lnr

CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
KERNEL = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])[None, None] / 16


class Between(nn.Module):
    """An operation between two convolutions, with a kernel that is a buffer and one that is learned."""

    kernel: Tensor

    def __init__(self, dims: int, operation: Callable[["Between", Tensor], Tensor]) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[dims - 1]
        self.a, self.b = convolution(3, 12, 3, padding=1), convolution(12, 4, 1)
        self.operation, self.learned = operation, nn.Parameter(torch.rand(1, 1, 3, 3))
        self.register_buffer("kernel", KERNEL)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.operation(self, self.a(x)))


def masked_write(model: Between, y: Tensor) -> Tensor:
    y = y.clone()
    y[y < 0] = 0
    return y


def masked_columns(model: Between, y: Tensor) -> Tensor:
    y[:, :, torch.arange(y.shape[2]) % 3 == 0] = 0.5
    return y


def pooled_and_back(model: Between, y: Tensor) -> Tensor:
    values, indices = F.max_pool2d(y, 2, return_indices=True)
    return F.max_unpool2d(values.tanh(), indices, [2, 2])


def sampled(model: Between, y: Tensor) -> Tensor:
    theta = torch.tensor([[0.8, 0.2, 0.0], [-0.2, 0.8, 0.1]]).expand(y.shape[0], -1, -1)
    return F.grid_sample(y, F.affine_grid(theta, [*y.shape], align_corners=False), align_corners=False)


def spectral(model: Between, y: Tensor) -> Tensor:
    z = torch.fft.rfft2(y, norm="ortho")
    return torch.fft.irfft2(torch.complex(z.real.relu(), z.imag), s=y.shape[-2:], norm="ortho")


def blurred(model: Between, y: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(y, kernel.expand(y.shape[1], -1, -1, -1), padding=1, groups=y.shape[1])


def messages(model: Between, y: Tensor) -> Tensor:
    """A graph network's: every second position sends what it holds to its neighbour."""
    nodes, source = y.flatten(2).transpose(1, 2), torch.arange(0, y[0, 0].numel(), 2)
    sent = nodes[:, source].relu()
    index = (source + 1).view(1, -1, 1).expand(y.shape[0], -1, y.shape[1])
    received = torch.zeros_like(nodes).scatter_add(1, index, sent).index_add(1, source, sent)
    return received.transpose(1, 2).view_as(y)


def wavelets(model: Between, y: Tensor) -> Tensor:
    haar = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[1.0, -1.0], [1.0, -1.0]]])[:, None] / 2
    low, high = (
        F.conv2d(y, haar.repeat(y.shape[1], 1, 1, 1), stride=2, groups=y.shape[1]).unflatten(1, (-1, 2)).unbind(2)
    )
    return low + high.abs()


OPERATIONS: dict[str, tuple[int, Callable[[Between, Tensor], Tensor]]] = {
    "linear": (1, lambda m, y: F.interpolate(y, scale_factor=2.0, mode="linear")),
    "trilinear": (3, lambda m, y: F.interpolate(y, scale_factor=2.0, mode="trilinear")),
    "nearest 3d": (3, lambda m, y: F.interpolate(y, scale_factor=2.0)),
    "nearest-exact": (2, lambda m, y: F.interpolate(y, scale_factor=1.5, mode="nearest-exact")),
    "antialias": (2, lambda m, y: F.interpolate(y, scale_factor=0.5, mode="bilinear", antialias=True)),
    "grid_sample": (2, sampled),
    "masked write": (2, masked_write),
    "masked columns": (2, masked_columns),
    "masked_scatter": (2, lambda m, y: y.masked_scatter(y < 0, torch.zeros_like(y))),
    "a place": (2, lambda m, y: y.relu().index_fill(2, torch.tensor([0]), 0.3)),
    "zeros in space": (2, lambda m, y: torch.cat([y, y.new_zeros(y.shape[0], y.shape[1], 1, y.shape[3])], 2)),
    "zeros of the same kind": (1, lambda m, y: torch.cat([torch.zeros_like(y[..., :1]), y], 2).diff(dim=2)),
    "stacked": (2, lambda m, y: torch.stack([y, torch.ones_like(y)], 2).flatten(2, 3)),
    "blur": (2, lambda m, y: blurred(m, y, torch.ones(1, 1, 3, 3) / 9)),
    "blur by a buffer": (2, lambda m, y: blurred(m, y, m.kernel)),
    "learned blur": (2, lambda m, y: blurred(m, y, m.learned)),
    "blur, repeated": (2, lambda m, y: F.conv2d(y, m.kernel.repeat(y.shape[1], 1, 1, 1), groups=y.shape[1])),
    "wavelets": (2, wavelets),
    "var_mean": (2, lambda m, y: (y - torch.var_mean(y, (2, 3), keepdim=True)[1]) / (y.std((2, 3), keepdim=True) + 1)),
    "std_mean": (1, lambda m, y: y * sum(torch.std_mean(y, 2, keepdim=True))),
    "median": (1, lambda m, y: y - y.median(2, keepdim=True).values),
    "spectrum": (2, spectral),
    "fft": (1, lambda m, y: torch.fft.fft(y, dim=2).abs()),
    "rot90": (2, lambda m, y: y.rot90(1, (2, 3))),
    "max_unpool": (2, pooled_and_back),
    "rows by an index": (2, lambda m, y: y[torch.tensor([0, 0, 1])]),
    "gather": (1, lambda m, y: y.gather(2, torch.zeros(*y.shape[:2], 5, dtype=torch.long))),
    "sorted": (1, lambda m, y: y.sort(2).values + y.gather(2, y.argsort(2, descending=True))),
    "topk": (1, lambda m, y: y.topk(3, 2).values),
    "messages": (2, messages),
    "similarity": (1, lambda m, y: y * F.cosine_similarity(y, y.roll(1, 2), 2).unsqueeze(2)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_half_of_the_channels_leave(name: str) -> None:
    torch.manual_seed(0)
    dims, operation = OPERATIONS[name]
    model, x = Between(dims, operation).eval(), torch.randn(4, 3, *[8] * dims)
    pruned = lnr.prune(model, [x], lnr.Keep(0.5))
    assert [(group.size, group.kept) for group in pruned.report.groups] == [(12, 6)]
    for samples, size in ((4, 8), (3, 10), (2, 12)):
        x = torch.randn(samples, 3, *[size] * dims)
        torch.testing.assert_close(pruned.model(x), functional_call(model, dict(pruned.masked), (x,)))


@pytest.mark.parametrize("name", ["blur", "learned blur", "blur, repeated", "wavelets"])
def test_what_the_same_filters_compute_is_counted(name: str) -> None:
    dims, operation = OPERATIONS[name]
    model, x = Between(dims, operation).eval(), torch.randn(4, 3, 8, 8)
    (group,) = lnr.inspect(model, x).groups
    report = lnr.prune(model, [x], lnr.Keep(0.5), selector="norm", refit=None).report
    assert report.macs_before - report.macs_after == 6 * group.macs


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_graph_of_them(name: str) -> None:
    torch.manual_seed(0)
    dims, operation = OPERATIONS[name]
    model, x = Between(dims, operation).eval(), torch.randn(4, 3, *[8] * dims)
    pruned = lnr.prune(model, [x], lnr.Keep(0.5), into="graph")
    assert pruned.report.groups[0].kept == 6
    torch.testing.assert_close(pruned.model(x), functional_call(model, dict(pruned.masked), (x,)))


FROZEN: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "another filter for each channel": lambda m, y: F.conv2d(y, torch.rand(12, 1, 3, 3), groups=12),
    "other columns for each channel": lambda m, y: y.gather(3, torch.randint(8, (4, 12, 8, 8))),
    "constants joined": lambda m, y: torch.cat([y, torch.rand(4, 12, 1, 8)], 2),
    "some channels written": lambda m, y: (
        y.mT.transpose(0, 1).index_put((torch.tensor([1, 5]),), torch.zeros(())).transpose(0, 1)
    ),
    "a mask of channels": lambda m, y: (
        y.transpose(0, 1).index_put((torch.rand(12) > 0.5,), torch.zeros(())).transpose(0, 1)
    ),
    "sorted channels": lambda m, y: y.sort(1).values,
    "transformed channels": lambda m, y: torch.fft.fft(y, dim=1).abs(),
    "rows of its own": lambda m, y: y.masked_scatter(y < 0, y.tanh()),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_mixes_channels_keeps_them(name: str) -> None:
    model = Between(2, FROZEN[name]).eval()
    inspection = lnr.inspect(model, torch.randn(4, 3, 8, 8))
    assert not inspection.groups
    assert "a" in inspection.frozen
