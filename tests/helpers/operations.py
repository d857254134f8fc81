"""The operations that the oracle probes, see `tests.helpers.nan_probe`."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.nan_probe import Operation, Run


def _whole(y: Tensor, axis: int) -> int:
    return y.shape[axis]


def _fixed(y: Tensor, tokens: int, size: int) -> Tensor:
    positions = torch.arange(tokens)[:, None] * 7 + torch.arange(size)
    return positions.to(y).cos().expand(*y.shape[:-2], tokens, size)


def _shuffled(y: Tensor, axis: int) -> Tensor:
    return y.unflatten(axis, (2, -1)).transpose(axis, axis + 1).flatten(axis, axis + 1)


def _overwritten(y: Tensor, axis: int) -> Tensor:
    y = y.clone()
    y.narrow(axis, y.shape[axis] // 2, y.shape[axis] // 2).zero_()
    return y


def _rows(y: Tensor, axis: int, write: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Every other position of an axis is written, by a function of the axis in front and of the positions."""
    return write(y.movedim(axis, 0), torch.arange(0, y.shape[axis], 2)).movedim(0, axis)


def _column(y: Tensor, axis: int, column: Tensor) -> Tensor:
    """A value for each position of an axis, as an index of y's shape."""
    return column.view([-1] + [1] * (y.dim() - axis - 1)).expand(y.shape)


def _alternating(y: Tensor, axis: int) -> Tensor:
    return _column(y, axis, torch.arange(y.shape[axis]) % 2)


def _given(y: Tensor) -> Tensor:
    """Indices that come from elsewhere, though nobody knows what they are."""
    return torch.zeros_like(y, dtype=torch.long).flatten()[:2]


def _places(y: Tensor, rank: int) -> Tensor:
    """A grid, another for every sample."""
    size = (y.shape[0], *[3] * (rank - 2), rank - 2)
    return torch.arange(math.prod(size)).to(y).cos().view(size)


def _masked(y: Tensor) -> Tensor:
    y = y.clone()
    y[y < 0] = 0
    return y


def _one_place(y: Tensor, axis: int) -> Tensor:
    y = y.clone()
    y.select(axis, 0).fill_(0.5)
    return y


def _column_written(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, :, [0, 1]] = y[:, :, [1, 0]].tanh()
    return y


def _copied(y: Tensor) -> Tensor:
    """Some rows of the last axis are replaced by others, in the order of both."""
    mask = (torch.arange(y.numel() // y.shape[-1]) % 3 == 0).view(*y.shape[:-1], 1)
    return y.masked_scatter(mask, y.tanh().flatten(0, -2))


def _constants(y: Tensor) -> Tensor:
    return torch.linspace(1, 2, y.shape[-1], dtype=y.dtype).expand(y.shape)


def _filter(y: Tensor, *sizes: int) -> Tensor:
    """One filter of these sizes, expanded to all channels."""
    return torch.ones(1, 1, *sizes, dtype=y.dtype).expand(y.shape[-1 - len(sizes)], -1, *sizes)


def _plain(run: Callable[[Tensor, int], Tensor], *ranks: int) -> Operation:
    return Operation(lambda y, a, p: run(y, a), ranks=ranks or (2, 3, 4))


def _norm(run: Run, *ranks: int) -> Operation:
    return Operation(run, lambda shape: {"w": (shape[1],), "b": (shape[1],)}, ranks or (2, 3, 4))


def _gates(columns: int, gates: int, suffix: str = "") -> dict[str, tuple[int, ...]]:
    sizes = {"w_ih": (2 * gates, columns), "w_hh": (2 * gates, 2), "b_ih": (2 * gates,), "b_hh": (2 * gates,)}
    return {f"{name}{suffix}": size for name, size in sizes.items()}


def _zeros(y: Tensor, sides: int, count: int) -> list[Tensor]:
    return [y.new_zeros(sides, len(y), 2) for _ in range(count)]


OPERATIONS: dict[str, Operation] = {
    "pointwise": _plain(lambda y, a: F.gelu(y) * 2 + y.tanh()),
    "flip and add": _plain(lambda y, a: y + y.flip(a)),
    "add transposed": _plain(lambda y, a: y + y.transpose(a, 0)),
    "outer product": _plain(lambda y, a: y.unsqueeze(a) * y.unsqueeze(a + 1)),
    "gate": _plain(lambda y, a: y * y.mean(a, keepdim=True).sigmoid()),
    "gate of one": _plain(lambda y, a: y * y.narrow(a, 0, 1)),
    "softmax": _plain(lambda y, a: y.softmax(a)),
    "log_softmax": _plain(lambda y, a: F.log_softmax(y, a)),
    "cumsum": _plain(lambda y, a: y.cumsum(a)),
    "sum": _plain(lambda y, a: y.sum(a)),
    "mean": _plain(lambda y, a: y.mean(a, keepdim=True)),
    "amax": _plain(lambda y, a: y.amax(a)),
    "max": _plain(lambda y, a: y.max(a).values),
    "std": _plain(lambda y, a: y.std(a)),
    "logsumexp": _plain(lambda y, a: y.logsumexp(a)),
    "normalize": _plain(lambda y, a: F.normalize(y, dim=a)),
    "sort": _plain(lambda y, a: y.sort(a).values),
    "prod": _plain(lambda y, a: y.prod(a)),
    "cumprod": _plain(lambda y, a: y.cumprod(a)),
    "layer_norm": _plain(lambda y, a: F.layer_norm(y, y.shape[a:])),
    "rms_norm": _plain(lambda y, a: F.rms_norm(y, y.shape[a:])),
    "glu": _plain(lambda y, a: F.glu(y, a)),
    "swap halves": _plain(lambda y, a: torch.cat(y.chunk(2, a)[::-1], a)),
    "split": _plain(lambda y, a: torch.cat([part.tanh() for part in y.split(_whole(y, a) // 2, a)], a)),
    "half": _plain(lambda y, a: y.narrow(a, 0, _whole(y, a) // 2)),
    "other half": _plain(lambda y, a: y.narrow(a, _whole(y, a) // 2, _whole(y, a) // 2)),
    "every other": _plain(lambda y, a: y.transpose(0, a)[::2]),
    "stack": _plain(lambda y, a: torch.stack([y, y.relu()], a)),
    "concatenate": _plain(lambda y, a: torch.cat([y, y.relu()], a)),
    "roll": _plain(lambda y, a: y.roll(1, a)),
    "transpose": _plain(lambda y, a: y.transpose(0, a).contiguous()),
    "flatten": _plain(lambda y, a: y.flatten(max(0, a - 1), a)),
    "unflatten": _plain(lambda y, a: y.unflatten(a, (2, -1))),
    "shuffle": _plain(_shuffled),
    "overwrite": _plain(_overwritten),
    "repeat": _plain(lambda y, a: y.repeat([1] * a + [2] + [1] * (y.dim() - a - 1))),
    "repeat_interleave": _plain(lambda y, a: y.repeat_interleave(2, a)),
    "expand": _plain(lambda y, a: y.unsqueeze(a).expand(*y.shape[:a], 3, *y.shape[a:])),
    "pad": _plain(lambda y, a: F.pad(y, [0, 0] * (y.dim() - a - 1) + [1, 2])),
    "crop": _plain(lambda y, a: F.pad(y, [0, 0] * (y.dim() - a - 1) + [-1, 0])),
    "reflect": _plain(lambda y, a: F.pad(y, (1, 1), "reflect"), 2, 3),
    "circular": _plain(lambda y, a: F.pad(y, (1, 1), "circular"), 2, 3),
    "select": _plain(lambda y, a: y.select(a, -1)),
    "index": _plain(lambda y, a: y.transpose(0, a)[torch.tensor([1, 0])]),
    "gather": _plain(lambda y, a: y.gather(a, torch.zeros_like(y, dtype=torch.long))),
    "unbind": _plain(lambda y, a: torch.stack(y.unbind(a)[::-1], a)),
    "triangle": _plain(lambda y, a: y.tril()),
    "diff": _plain(lambda y, a: y.diff(dim=a)),
    "mask": _plain(lambda y, a: y.masked_fill(torch.arange(y.shape[-1]) > 1, 0.0)),
    "constant": _plain(lambda y, a: y * torch.linspace(1, 2, y.shape[-1], dtype=y.dtype)),
    "uniform": _plain(lambda y, a: y * torch.full((y.shape[a],), 3.0).view([-1] + [1] * (y.dim() - a - 1))),
    "matmul": _plain(lambda y, a: y @ y.mT),
    "gram": _plain(lambda y, a: y.mT @ y),
    "einsum": _plain(lambda y, a: torch.einsum("bij,bkj->bki", y, y), 3),
    "einsum heads": _plain(lambda y, a: torch.einsum("bihd,bjhd->bhij", y, y), 4),
    "cdist": _plain(lambda y, a: torch.cdist(y, y), 2, 3),
    "attention": _plain(lambda y, a: F.scaled_dot_product_attention(y, y.flip(-2), y), 3, 4),
    "attention values": _plain(
        lambda y, a: F.scaled_dot_product_attention(_fixed(y, 3, 5), _fixed(y, y.shape[-2], 5), y), 3, 4
    ),
    "attention queries": _plain(
        lambda y, a: F.scaled_dot_product_attention(y, _fixed(y, 3, y.shape[-1]), _fixed(y, 3, 5)), 3, 4
    ),
    "unfold": _plain(lambda y, a: y.unfold(a, 2, 1)),
    "im2col": _plain(lambda y, a: F.unfold(y, 2), 4),
    "pixel_shuffle": _plain(lambda y, a: F.pixel_shuffle(y, 2), 4),
    "pixel_unshuffle": _plain(lambda y, a: F.pixel_unshuffle(y, 2), 4),
    "channel_shuffle": _plain(lambda y, a: F.channel_shuffle(y, 2), 4),
    "max_pool": _plain(lambda y, a: F.max_pool2d(y, 2, 1), 3, 4),
    "avg_pool": _plain(lambda y, a: F.avg_pool1d(y, 2, 1), 2, 3),
    "adaptive": _plain(lambda y, a: F.adaptive_avg_pool2d(y, 1), 3, 4),
    "interpolate": _plain(lambda y, a: F.interpolate(y, scale_factor=2.0, mode="bilinear"), 4),
    "group_norm": _norm(lambda y, a, p: F.group_norm(y, y.shape[1] // 2, p["w"], p["b"])),
    "instance_norm": _norm(lambda y, a, p: F.instance_norm(y, weight=p["w"], bias=p["b"]), 3, 4),
    "batch_norm": _norm(lambda y, a, p: F.batch_norm(y, p["b"], p["w"])),
    "batch_norm in training": _plain(lambda y, a: F.batch_norm(y, None, None, training=True)),
    "prelu": Operation(lambda y, a, p: F.prelu(y, p["w"]), lambda shape: {"w": (shape[1],)}),
    "scale": Operation(lambda y, a, p: y * p["w"], lambda shape: {"w": (shape[-1],)}),
    "scale a row": Operation(lambda y, a, p: y * p["w"], lambda shape: {"w": (shape[-2], 1)}),
    "scale of one": Operation(lambda y, a, p: y * p["w"], lambda shape: {"w": (1,)}),
    "table": Operation(lambda y, a, p: y + p["w"], lambda shape: {"w": shape[-2:]}),
    "linear": Operation(lambda y, a, p: F.linear(y, p["w"], p["b"]), lambda shape: {"w": (6, shape[-1]), "b": (6,)}),
    "product with a weight": Operation(lambda y, a, p: y @ p["w"], lambda shape: {"w": (shape[-1], 6)}),
    "transposed weight": Operation(lambda y, a, p: y @ p["w"].T, lambda shape: {"w": (6, shape[-1])}),
    "weight on the left": Operation(lambda y, a, p: p["w"] @ y, lambda shape: {"w": (6, shape[-2])}),
    "einsum with a weight": Operation(
        lambda y, a, p: torch.einsum("...i,oi->...o", y, p["w"]), lambda shape: {"w": (6, shape[-1])}
    ),
    "part of a stack": Operation(lambda y, a, p: F.linear(y, p["w"][1]), lambda shape: {"w": (3, 6, shape[-1])}),
    "stack of weights": Operation(
        lambda y, a, p: y @ p["w"].mT, lambda shape: {"w": (shape[-3], 6, shape[-1])}, (3, 4)
    ),
    "computed weight": Operation(
        lambda y, a, p: F.linear(y, F.layer_norm(p["w"], p["w"].shape[1:])), lambda shape: {"w": (6, shape[-1])}
    ),
    "conv1d": Operation(lambda y, a, p: F.conv1d(y, p["w"]), lambda shape: {"w": (4, shape[-2], 2)}, (2, 3)),
    "conv2d": Operation(
        lambda y, a, p: F.conv2d(y, p["w"], padding=1), lambda shape: {"w": (4, shape[-3], 2, 2)}, (3, 4)
    ),
    "grouped": Operation(
        lambda y, a, p: F.conv1d(y, p["w"], groups=y.shape[-2] // 2), lambda shape: {"w": (shape[-2], 2, 1)}, (3,)
    ),
    "depthwise": Operation(
        lambda y, a, p: F.conv1d(y, p["w"], groups=y.shape[-2]), lambda shape: {"w": (2 * shape[-2], 1, 1)}, (3,)
    ),
    "lstm": Operation(
        lambda y, a, p: torch.lstm(y, _zeros(y, 2, 2), [*p.values()][1:], True, 1, 0.0, False, True, True)[0],
        lambda shape: {**_gates(shape[-1], 4), **_gates(shape[-1], 4, "_reverse")},
        (3,),
    ),
    "lstm of channels": Operation(
        lambda y, a, p: torch.lstm(
            y.transpose(1, 2), _zeros(y, 2, 2), [*p.values()][1:], True, 1, 0.0, False, True, True
        )[2],
        lambda shape: {**_gates(shape[1], 4), **_gates(shape[1], 4, "_reverse")},
        (3,),
    ),
    "gru": Operation(
        lambda y, a, p: torch.gru(
            y.transpose(1, 2), _zeros(y, 1, 1)[0], [*p.values()][1:], True, 1, 0.0, False, False, True
        )[0],
        lambda shape: _gates(shape[1], 3),
        (3,),
    ),
    "gru cell": Operation(
        lambda y, a, p: torch.gru_cell(y, y.new_zeros(len(y), 2), *[*p.values()][1:]),
        lambda shape: _gates(shape[1], 3),
        (2,),
    ),
    "transposed": Operation(
        lambda y, a, p: F.conv_transpose1d(y, p["w"]), lambda shape: {"w": (shape[-2], 4, 2)}, (3,)
    ),
    "transposed in groups": Operation(
        lambda y, a, p: F.conv_transpose1d(y, p["w"], groups=y.shape[-2] // 2),
        lambda shape: {"w": (shape[-2], 3, 2)},
        (3,),
    ),
    # images and other grids
    "interpolate linear": _plain(lambda y, a: F.interpolate(y, scale_factor=2.0, mode="linear"), 3),
    "trilinear": _plain(lambda y, a: F.interpolate(y, scale_factor=2.0, mode="trilinear"), 5),
    "nearest": _plain(lambda y, a: F.interpolate(y, scale_factor=2.0), 3, 4, 5),
    "nearest-exact": _plain(lambda y, a: F.interpolate(y, scale_factor=1.5, mode="nearest-exact"), 3, 4, 5),
    "antialias": _plain(lambda y, a: F.interpolate(y, size=(3, 3), mode="bicubic", antialias=True), 4),
    "grid_sample": _plain(
        lambda y, a: F.grid_sample(y, y.new_zeros(y.shape[0], *[3] * (y.dim() - 2), y.dim() - 2), align_corners=False),
        4,
        5,
    ),
    "grid_sample at places": _plain(lambda y, a: F.grid_sample(y, _places(y, y.dim()), align_corners=False), 4, 5),
    "grid_sample at its own": _plain(
        lambda y, a: F.grid_sample(y, y[:, :2].movedim(1, -1).tanh(), align_corners=False), 4
    ),
    "max_unpool": _plain(lambda y, a: F.max_unpool1d(*F.max_pool1d(y, 2, return_indices=True), [2]), 2, 3),
    "max_unpool2d": _plain(lambda y, a: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), [2, 2]), 3, 4),
    "max_unpool3d": _plain(lambda y, a: F.max_unpool3d(*F.max_pool3d(y, 2, return_indices=True), [2, 2, 2]), 5),
    "max_unpool of others": _plain(
        lambda y, a: F.max_unpool2d(F.avg_pool2d(y.flip(1), 2), F.max_pool2d(y, 2, return_indices=True)[1], [2, 2]), 4
    ),
    "indices of max_pool": _plain(lambda y, a: F.max_pool2d(y, 2, return_indices=True)[1].to(y), 3, 4),
    "reflect 3d": _plain(lambda y, a: F.pad(y, (1, 1, 1, 1, 1, 1), "reflect"), 5),
    "fold": _plain(lambda y, a: F.fold(y, (3, 3), 2), 3),
    "local_response_norm": _plain(lambda y, a: F.local_response_norm(y, 3), 3, 4),
    "rot90": _plain(lambda y, a: y.rot90(1, (a, y.dim() - 1))),
    "flipud": _plain(lambda y, a: y.transpose(0, a).flipud()),
    # the same filters for all channels
    "blur": _plain(lambda y, a: F.conv1d(y, _filter(y, 2) / 2, groups=y.shape[-2]), 2, 3),
    "blur 2d": _plain(lambda y, a: F.conv2d(y, _filter(y, 2, 2), padding=1, groups=y.shape[-3]), 3, 4),
    "blur with biases": _plain(
        lambda y, a: F.conv1d(y, _filter(y, 2), torch.ones(y.shape[-2]).to(y), groups=y.shape[-2]), 3
    ),
    "blur with unlike biases": _plain(
        lambda y, a: F.conv1d(y, _filter(y, 2), torch.arange(y.shape[-2]).to(y), groups=y.shape[-2]), 3
    ),
    "blur of pairs": _plain(
        lambda y, a: F.conv1d(y, torch.ones(1, 2, 2).to(y).expand(y.shape[-2] // 2, -1, -1), groups=y.shape[-2] // 2), 3
    ),
    "learned blur": Operation(
        lambda y, a, p: F.conv1d(y, p["w"].expand(y.shape[-2], -1, -1), p["b"], groups=y.shape[-2]),
        lambda shape: {"w": (1, 1, 2), "b": (shape[-2],)},
        (3,),
    ),
    "wavelets": _plain(
        lambda y, a: F.conv2d(
            y, torch.arange(16).to(y).view(4, 1, 2, 2).repeat(y.shape[-3], 1, 1, 1), stride=2, groups=y.shape[-3]
        ),
        4,
    ),
    "unlike filters": _plain(
        lambda y, a: F.conv1d(y, torch.arange(y.shape[-2]).to(y).view(-1, 1, 1), groups=y.shape[-2]), 3
    ),
    "transposed blur": _plain(lambda y, a: F.conv_transpose1d(y, _filter(y, 2), stride=2, groups=y.shape[-2]), 3),
    # reductions, sorting, Fourier transforms
    "var_mean": _plain(lambda y, a: torch.stack(torch.var_mean(y, a))),
    "std_mean": _plain(lambda y, a: torch.std_mean(y, (a, y.dim() - 1), keepdim=True)[0]),
    "aminmax": _plain(lambda y, a: sum(torch.aminmax(y, dim=a), torch.zeros(1).to(y))),
    "argmax": _plain(lambda y, a: y.argmax(a).to(y)),
    "median": _plain(lambda y, a: y.median(a).values),
    "kthvalue": _plain(lambda y, a: y.kthvalue(2, a, True).values),
    "indices of max": _plain(lambda y, a: y.max(a).indices.to(y)),
    "max of all": _plain(lambda y, a: y * y.max()),
    "larger of two": _plain(lambda y, a: torch.max(y, y.flip(a))),
    "nansum": _plain(lambda y, a: y.nansum(a)),
    "count_nonzero": _plain(lambda y, a: y.relu().count_nonzero(a).to(y)),
    "quantile": _plain(lambda y, a: y.quantile(0.4, a, keepdim=True)),
    "quantiles": _plain(lambda y, a: y.quantile(torch.tensor([0.2, 0.4]).to(y), a, keepdim=True)),
    "norm": _plain(lambda y, a: torch.linalg.norm(y, dim=a)),
    "matrix_norm": _plain(lambda y, a: torch.linalg.matrix_norm(y), 3, 4),
    "matrix_exp": _plain(lambda y, a: torch.linalg.matrix_exp(y), 3, 4),
    "argsort": _plain(lambda y, a: y.argsort(a).to(y)),
    "topk": _plain(lambda y, a: y.topk(2, a).values),
    "cummax": _plain(lambda y, a: y.cummax(a).values),
    "fft": _plain(lambda y, a: torch.fft.fft(y, dim=a).abs()),
    "rfft2": _plain(lambda y, a: torch.fft.irfft2(torch.fft.rfft2(y), s=y.shape[-2:])),
    "fftn": _plain(lambda y, a: torch.fft.fftn(y).real),
    "fftn of some": _plain(lambda y, a: torch.fft.fftn(y, s=(4,)).imag),
    "fftshift": _plain(lambda y, a: torch.fft.fftshift(y, dim=a)),
    "complex": _plain(lambda y, a: torch.complex(y, y.flip(a)).abs()),
    "view_as_real": _plain(lambda y, a: torch.view_as_real(torch.complex(y, y.tanh()))),
    "view_as_complex": _plain(lambda y, a: torch.view_as_complex(torch.stack([y, y.tanh()], -1)).abs()),
    "cosine_similarity": _plain(lambda y, a: F.cosine_similarity(y, y.flip(a).tanh(), a)),
    "pairwise_distance": _plain(lambda y, a: F.pairwise_distance(y, y.tanh())),
    "vecdot": _plain(lambda y, a: torch.linalg.vecdot(y, y.tanh(), dim=a)),
    "vecdot with constants": _plain(lambda y, a: torch.linalg.vecdot(y, _constants(y), dim=a)),
    # joining
    "zeros": _plain(lambda y, a: torch.cat([y.new_zeros(y.narrow(a, 0, 1).shape), y], a)),
    "zeros and both": _plain(lambda y, a: torch.cat([y, y.new_zeros(y.narrow(a, 0, 1).shape), y.tanh()], a)),
    "ones": _plain(lambda y, a: torch.stack([y, torch.ones_like(y)], a)),
    "constants": _plain(lambda y, a: torch.cat([y, _constants(y).narrow(a, 0, 1)], a)),
    "hstack": _plain(lambda y, a: torch.hstack([y, y.tanh()])),
    "vstack": _plain(lambda y, a: torch.vstack([y, y.tanh()])),
    "dstack": _plain(lambda y, a: torch.dstack([y, y.tanh()]), 3, 4),
    # positions that an index or a mask names
    "index_select": _plain(lambda y, a: y.index_select(a, _given(y))),
    "index by a table": _plain(lambda y, a: y.movedim(a, 0)[torch.tensor([[1, 0], [0, 1]])]),
    "index by given": _plain(lambda y, a: y.movedim(a, 0)[_given(y)]),
    "index of two axes": _plain(lambda y, a: y.movedim(a, 0)[_given(y), :, _given(y)], 3, 4),
    "index by its own": _plain(lambda y, a: y.movedim(a, 0)[y.flatten()[:2].argsort()]),
    "index by channels": _plain(lambda y, a: y.movedim(a, 0)[y.argmax(a)], 3),
    "gather its own": _plain(lambda y, a: y.gather(a, y.argsort(a))),
    "gather some": _plain(lambda y, a: y.gather(a, torch.zeros([2] * y.dim(), dtype=torch.long))),
    "gather anywhere": _plain(lambda y, a: y.gather(a, torch.arange(y.numel()).view(y.shape) % 2)),
    "take_along_dim": _plain(lambda y, a: y.take_along_dim(_alternating(y, a).narrow(0, 0, 1), a)),
    "scatter": _plain(lambda y, a: torch.zeros_like(y).scatter(a, y.argsort(a), y)),
    "scatter a value": _plain(lambda y, a: y.scatter(a, torch.zeros_like(y, dtype=torch.long), 3.0)),
    "scatter some": _plain(lambda y, a: y.scatter(a, torch.zeros([2] * y.dim(), dtype=torch.long), 3.0)),
    "scatter anywhere": _plain(lambda y, a: y.scatter_add(a, torch.arange(y.numel()).view(y.shape) % 2, y)),
    "scatter_add": _plain(lambda y, a: torch.zeros_like(y).scatter_add(a, _alternating(y, a), y)),
    "scatter_reduce": _plain(lambda y, a: y.scatter_reduce(a, _alternating(y, a), y.tanh(), "amax")),
    "scatter constants": _plain(lambda y, a: y.scatter_add(a, _alternating(y, a), _constants(y))),
    "index_add": _plain(lambda y, a: torch.zeros_like(y).index_add(a, _given(y), y.narrow(a, 0, 2))),
    "index_add all": _plain(lambda y, a: torch.zeros_like(y).index_add(a, torch.arange(y.shape[a]) % 2, y)),
    "index_copy": _plain(lambda y, a: y.index_copy(a, torch.tensor([1]), _constants(y).narrow(a, 0, 1))),
    "index_fill": _plain(lambda y, a: y.index_fill(a, torch.tensor([0, 1]), 2.0)),
    "index_reduce": _plain(lambda y, a: y.index_reduce(a, torch.arange(y.shape[a]) % 2, y.tanh(), "amin")),
    "select_scatter": _plain(lambda y, a: y.select_scatter(y.select(a, 0).tanh(), a, 1)),
    "one place": _plain(_one_place),
    "masked write": _plain(lambda y, a: _masked(y)),
    "masked write of rows": _plain(
        lambda y, a: _rows(y, a, lambda z, i: z.index_put((torch.arange(len(z)) > 0,), torch.zeros(()).to(z)))
    ),
    "masked write of columns": _plain(
        lambda y, a: _rows(y, a, lambda z, i: z.index_put((z[..., 0] > 0,), z.new_ones(z.shape[-1:])))
    ),
    "masked write of many": _plain(
        lambda y, a: _rows(y, a, lambda z, i: z.index_put((torch.arange(len(z)) % 2 == 0,), z[i].tanh()))
    ),
    "write a value": _plain(lambda y, a: _rows(y, a, lambda z, i: z.index_put((i,), z.new_ones(())))),
    "write rows": _plain(lambda y, a: _rows(y, a, lambda z, i: z.index_put((i,), z[i].tanh(), True))),
    "write constants": _plain(lambda y, a: _rows(y, a, lambda z, i: z.index_put((i,), _constants(z)[0]))),
    "write columns": _plain(lambda y, a: _column_written(y), 3, 4),
    "write in two axes": _plain(lambda y, a: _rows(y, a, lambda z, i: z.index_put((i[:2], i[:2]), z[0, 0].tanh())), 3),
    "masked_scatter": _plain(lambda y, a: y.masked_scatter(y > 0, torch.zeros_like(y))),
    "masked_scatter of rows": _plain(lambda y, a: _copied(y)),
    "masked_scatter anywhere": _plain(lambda y, a: y.masked_scatter(y > 0, y.tanh())),
}
