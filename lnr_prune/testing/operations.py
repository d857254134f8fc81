"""Operations of real networks on a map: channel by channel, at random, across channels."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Operation = Callable[[Tensor], Tensor]


def _masked_write(y: Tensor) -> Tensor:
    y[y < 0] = 0.1
    return y


def _unpooled(y: Tensor) -> Tensor:
    values, indices = F.max_pool2d(y, 2, return_indices=True)
    return F.max_unpool2d(values.tanh(), indices, [2, 2])


def _sampled(y: Tensor) -> Tensor:
    theta = torch.tensor([[0.8, 0.2, 0.0], [-0.2, 0.8, 0.1]]).to(y).expand(y.shape[0], -1, -1)
    return F.grid_sample(y, F.affine_grid(theta, [*y.shape], align_corners=False), align_corners=False)


def _resized(y: Tensor) -> Tensor:
    y = F.interpolate(y, scale_factor=2.0, mode="nearest-exact")
    return F.interpolate(y, scale_factor=0.5, mode="bilinear", antialias=True)


def _blurred(y: Tensor) -> Tensor:
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]).to(y) / 16
    return F.conv2d(y, kernel.expand(y.shape[1], 1, -1, -1), padding=1, groups=y.shape[1])


def _wavelets(y: Tensor) -> Tensor:
    haar = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[1.0, -1.0], [1.0, -1.0]]]).to(y)[:, None] / 2
    parts = F.conv2d(y, haar.repeat(y.shape[1], 1, 1, 1), stride=2, groups=y.shape[1])
    low, high = parts[:, ::2], parts[:, 1::2]
    return F.interpolate(low + high.abs(), scale_factor=2.0)


def _normalised(y: Tensor) -> Tensor:
    variance, mean = torch.var_mean(y, (2, 3), keepdim=True)
    return (y - mean) / (variance + 1).sqrt()


def _spectral(y: Tensor) -> Tensor:
    z: Tensor = torch.fft.rfft2(y, norm="ortho")
    x: Tensor = torch.fft.irfft2(torch.complex(z.real.relu(), z.imag), s=y.shape[-2:], norm="ortho")
    return x


def _sorted(y: Tensor) -> Tensor:
    rows = y.flatten(2)
    return (rows.sort(2).values + rows.gather(2, rows.argsort(2, descending=True))).view(y.shape)


def _messages(y: Tensor) -> Tensor:
    """As in a graph network: every second position sends what it holds to its neighbour."""
    nodes, source = y.flatten(2).transpose(1, 2), torch.arange(0, y[0, 0].numel(), 2, device=y.device)
    sent = nodes[:, source].relu()
    index = (source + 1).view(1, -1, 1).expand(y.shape[0], -1, y.shape[1])
    received = torch.zeros_like(nodes).scatter_add(1, index, sent).index_add(1, source, sent)
    return received.transpose(1, 2).reshape(y.shape)


CHANNELWISE: dict[str, Operation] = {
    "masked write": _masked_write,
    "max unpool": _unpooled,
    "grid sample": _sampled,
    "resize": _resized,
    "zeros in space": lambda y: torch.cat([y[:, :, 1:], y.new_zeros(y.shape[0], y.shape[1], 1, y.shape[3])], 2),
    "blur": _blurred,
    "wavelets": _wavelets,
    "variance": _normalised,
    "spectrum": _spectral,
    "quarter turn": lambda y: y.rot90(1, (2, 3)),
    "sorted": _sorted,
    "messages": _messages,
}
"""Each channel of the result depends on the same channel of the map only."""

SHARED_NOISE: dict[str, Operation] = {
    "noise of positions": lambda y: y + 0.3 * torch.randn(y.shape[0], 1, *y.shape[2:]).to(y),
    "stochastic depth": lambda y: y * y.new_empty(y.shape[0], 1, 1, 1).bernoulli_(0.8),
    "shuffled positions": lambda y: y.flatten(2)[:, :, torch.randperm(y[0, 0].numel(), device=y.device)].view(y.shape),
}
"""All channels meet the same random numbers."""

FREEZING: dict[str, Operation] = {
    "noise": lambda y: y + 0.3 * torch.randn_like(y),
    "dropout": lambda y: F.dropout(y, 0.2, training=True),
    "dropped channels": lambda y: F.dropout2d(y, 0.2, training=True),
    "similarity": lambda y: y * F.cosine_similarity(y, y.roll(1, 2), 1).unsqueeze(1),
}
"""What goes through stays: random numbers are drawn for each channel, or all channels are mixed."""
