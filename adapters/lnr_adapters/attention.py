"""Attention output: every head, or group of heads that share keys and values, owns the columns of its values."""

from lnr_adapters.columns import one_column_each
from lnr_adapters.columns_bias import ColumnsBias
from lnr_prune.graph.groups import Consumer


class Attention(ColumnsBias):
    """``y = [W b] [concatenated heads; 1]``: the columns of one head are one group.

    It also fits other layers whose channels leave in blocks of rows. The graph has found out which columns those
    are (``consumer.channels``), as for `FcAfterConv`, where one row fills several columns.
    """

    name = "attention"

    def matches(self, consumer: Consumer) -> bool:
        """Linear layers that read several columns of a channel, from several rows of the producer."""
        return consumer.op == "linear" and not one_column_each(consumer) and consumer.blocks
