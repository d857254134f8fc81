"""Plain columns: a linear layer that reads one column of each channel and keeps its bias."""

import torch
from torch import Tensor

from lnr_prune.calibration.watch import LayerCall
from lnr_prune.graph.groups import Consumer


class Columns:
    """``y = W x``: every column of W is its own group; the layer's bias is left as it is."""

    name = "columns"

    def matches(self, consumer: Consumer) -> bool:
        """Linear layers whose bias is not refitted."""
        return consumer.op == "linear" and consumer.bias is None and one_column_each(consumer)

    def inputs(self, consumer: Consumer, call: LayerCall, rows: Tensor | None = None) -> Tensor:
        """The layer's input, all leading axes flattened."""
        x = call.input.reshape(-1, call.input.shape[-1])
        return x if rows is None else x[rows]

    def outputs(self, consumer: Consumer, call: LayerCall, rows: Tensor | None = None) -> Tensor:
        """The layer's output without its bias."""
        y = call.output.reshape(-1, call.output.shape[-1])
        y = y if rows is None else y[rows]
        return y if call.bias is None else y - call.bias

    def groups(self, consumer: Consumer, weight: Tensor) -> Tensor:
        """The channel that each column reads."""
        return consumer.channels

    def matrix(self, consumer: Consumer, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The weight itself, transposed if the layer stores it the other way round."""
        return weight if consumer.dim == 1 else weight.T

    def write(self, consumer: Consumer, M: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """M is the weight."""
        return M if consumer.dim == 1 else M.T, None


def one_column_each(consumer: Consumer) -> bool:
    """Whether no channel owns more than one column."""
    return int(torch.bincount(consumer.channels[consumer.channels >= 0]).max()) == 1
