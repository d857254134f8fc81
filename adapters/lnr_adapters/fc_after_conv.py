"""Linear after a convolution: every channel owns the block of columns that its flattened map fills."""

from lnr_adapters.columns import one_column_each
from lnr_adapters.columns_bias import ColumnsBias
from lnr_prune.graph.groups import Consumer


class FcAfterConv(ColumnsBias):
    """``y = [W b] [flatten(map); 1]``: the H*W columns of a channel are one group.

    The graph has found out which columns those are (``consumer.channels``), so any flattening will do. Everything
    else is as for plain columns, with or without a bias.
    """

    name = "fc_after_conv"

    def matches(self, consumer: Consumer) -> bool:
        """Linear layers that read several columns of a channel, each from one row of the producer."""
        return consumer.op == "linear" and not one_column_each(consumer) and not consumer.blocks
