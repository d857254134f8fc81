"""Model -> channel groups. Knows nothing of solvers or adapters."""

from lnr_prune.graph.groups import ChannelGroup, Consumer, Graph, find_groups
from lnr_prune.graph.owners import Slot, along
from lnr_prune.graph.trace import evaluating, named_tensors, unfused_attention

__all__ = [
    "ChannelGroup",
    "Consumer",
    "Graph",
    "Slot",
    "along",
    "evaluating",
    "find_groups",
    "named_tensors",
    "unfused_attention",
]
