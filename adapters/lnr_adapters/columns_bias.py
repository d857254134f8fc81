"""Columns with a bias: the bias is one more column, of a constant input 1, and is not penalised."""

import torch
from torch import Tensor

from lnr_adapters.columns import Columns, one_column_each
from lnr_prune.calibration.watch import LayerCall
from lnr_prune.graph.groups import Consumer


class ColumnsBias(Columns):
    """``y = [W b] [x; 1]``: every column of W is its own group; the last column, the bias, is never removed."""

    name = "columns_bias"
    channel_axis = -1  # of the layer's output

    def matches(self, consumer: Consumer) -> bool:
        """Linear layers whose bias is refitted."""
        return consumer.op == "linear" and consumer.bias is not None and one_column_each(consumer)

    def samples(self, consumer: Consumer, call: LayerCall, rows: Tensor | None) -> Tensor:
        """X without the constant, (n, d)."""
        return super().inputs(consumer, call, rows)

    def inputs(self, consumer: Consumer, call: LayerCall, rows: Tensor | None = None) -> Tensor:
        """The samples and, if the bias is refitted, a constant 1."""
        x = self.samples(consumer, call, rows)
        return x if consumer.bias is None else torch.cat([x, x.new_ones(len(x), 1)], 1)

    def outputs(self, consumer: Consumer, call: LayerCall, rows: Tensor | None = None) -> Tensor:
        """The layer's output, with its bias if that is refitted."""
        y = call.output.movedim(self.channel_axis, -1)
        y = y.reshape(-1, y.shape[-1]) if rows is None else y[torch.unravel_index(rows, y.shape[:-1])]
        return y - call.bias if consumer.bias is None and call.bias is not None else y

    def groups(self, consumer: Consumer, weight: Tensor) -> Tensor:
        """The channel that each column reads; -1 for the bias."""
        kernel = weight.shape[2:].numel()
        channels = consumer.channels.repeat_interleave(kernel)
        return channels if consumer.bias is None else torch.cat([channels, channels.new_tensor([-1])])

    def matrix(self, consumer: Consumer, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[W b]``."""
        W = weight.movedim(consumer.dim, 1).flatten(1)
        return W if bias is None else torch.cat([W, bias[:, None]], 1)

    def write(self, consumer: Consumer, M: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """``M = [W b]``."""
        W, bias = (M, None) if consumer.bias is None else (M[:, :-1], M[:, -1])
        return W.reshape(weight.movedim(consumer.dim, 1).shape).movedim(1, consumer.dim), bias
