"""Model -> channel groups. Knows nothing of solvers or adapters."""

from lnr_prune.graph.flow import INPUT, OUTPUT
from lnr_prune.graph.groups import ChannelGroup, Consumer, Graph, find_groups, layer_name
from lnr_prune.graph.owners import Slot, along
from lnr_prune.graph.sizes import HeldInt
from lnr_prune.graph.trace import evaluating, in_mode, named_tensors, unfused_attention, without_caches

__all__ = [
    "INPUT",
    "OUTPUT",
    "ChannelGroup",
    "Consumer",
    "Graph",
    "HeldInt",
    "Slot",
    "along",
    "evaluating",
    "find_groups",
    "in_mode",
    "layer_name",
    "named_tensors",
    "unfused_attention",
    "without_caches",
]
