"""Convolution filter groups: all weights of the filters that read one input channel."""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from lnr_adapters.autocorrelation import autocorrelation, sums_of_entries
from lnr_adapters.columns_bias import ColumnsBias
from lnr_prune.calibration.watch import LayerCall
from lnr_prune.graph.groups import Consumer


class ConvFilters(ColumnsBias):
    """``y = [W b] [patch; 1]`` at every position: the kernel entries of one input channel are one group.

    Any kernel, stride, padding and dilation, in one, two or three dimensions.
    """

    name = "conv_filters"
    channel_axis = 1

    def matches(self, consumer: Consumer) -> bool:
        """Convolutions and transposed convolutions that are not grouped (the graph offers no others)."""
        return consumer.op.startswith("conv")

    def samples(self, consumer: Consumer, call: LayerCall, rows: Tensor | None) -> Tensor:
        """The unfolded patches, (samples * positions, channels * kernel entries), or some of them."""
        kernel = call.weight.shape[2:]
        n = len(kernel)
        stride = per_axis(call.options.get("stride", 1), n)
        dilation = per_axis(call.options.get("dilation", 1), n)
        if consumer.op.startswith("conv_transpose"):
            x = _spread(call, kernel, stride, dilation)
            stride = (1,) * n
        else:
            x = F.pad(call.input, _padding(call.options.get("padding", 0), kernel, dilation))
        for axis in range(n):
            span = dilation[axis] * (kernel[axis] - 1) + 1
            x = x.unfold(2 + axis, span, stride[axis])[..., :: dilation[axis]]
        # (samples, channels, positions..., kernel...) -> (samples, positions..., channels, kernel...)
        x = x.movedim(1, 1 + n)
        x = x.flatten(0, n) if rows is None else x[torch.unravel_index(rows, x.shape[: 1 + n])]
        if consumer.op.startswith("conv_transpose"):
            x = x.flip(list(range(2, 2 + n)))
        return x.flatten(1)

    def second_moments(self, consumer: Consumer, calls: Sequence[LayerCall]) -> Tensor | None:
        """``sum x x^T`` over all patches, from shifted images, if there is a patch at every position."""
        call = calls[0]
        kernel, n = call.weight.shape[2:], call.weight.dim() - 2
        stride, dilation = (per_axis(call.options.get(option, 1), n) for option in ("stride", "dilation"))
        alike = len({each.input.shape[1:] for each in calls}) == 1
        if consumer.op.startswith("conv_transpose") or any(s > 1 for s in stride) or kernel.numel() == 1 or not alike:
            return None
        before = _padding(call.options.get("padding", 0), kernel, dilation)[-2::-2]
        offsets = [
            tuple(d * i - p for d, i, p in zip(dilation, entry, before, strict=True))
            for entry in product(*map(range, kernel))
        ]
        positions, images = call.output.shape[2:], [each.input for each in calls]
        xx = autocorrelation(images, offsets, positions)
        if consumer.bias is None:
            return xx
        x = sums_of_entries(images, offsets, positions)
        count = x.new_tensor([sum(map(len, images)) * positions.numel()])
        return torch.cat([torch.cat([xx, x[:, None]], 1), torch.cat([x, count])[None]])


def _spread(call: LayerCall, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """The input that a transposed convolution slides over: padded, with stride - 1 zeros between its entries."""
    n = len(kernel)
    sizes = [s * (size - 1) + 1 for s, size in zip(stride, call.input.shape[2:], strict=True)]
    x = call.input.new_zeros(*call.input.shape[:2], *sizes)
    entries = (slice(None), slice(None), *(slice(None, None, s) for s in stride))
    x[entries] = call.input
    padding = per_axis(call.options.get("padding", 0), n)
    before = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    after = [
        out + d * (k - 1) - size - b
        for out, size, b, d, k in zip(call.output.shape[2:], sizes, before, dilation, kernel, strict=True)
    ]
    return F.pad(x, [amount for side in reversed(list(zip(before, after, strict=True))) for amount in side])


def per_axis(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    """One number for each of n axes."""
    if isinstance(value, int):
        return (value,) * n
    return tuple(value) * n if len(value) == 1 else tuple(value)


def _padding(padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """What F.pad takes: before and after, last axis first."""
    n = len(kernel)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(amount // 2, amount - amount // 2) for amount in total]
    else:
        each = (0,) * n if padding == "valid" or isinstance(padding, str) else per_axis(padding, n)
        sides = [(amount, amount) for amount in each]
    return [amount for side in reversed(sides) for amount in side]
