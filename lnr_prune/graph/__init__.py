"""Model -> channel groups. Knows nothing of solvers or adapters."""

from lnr_prune.graph.groups import ChannelGroup, Consumer, Graph, find_groups
from lnr_prune.graph.owners import Slot, along
from lnr_prune.graph.sizes import HeldInt
from lnr_prune.graph.trace import evaluating, in_mode, named_tensors, unfused_attention

__all__ = [
    "ChannelGroup",
    "Consumer",
    "Graph",
    "HeldInt",
    "Slot",
    "along",
    "evaluating",
    "find_groups",
    "in_mode",
    "named_tensors",
    "unfused_attention",
]
