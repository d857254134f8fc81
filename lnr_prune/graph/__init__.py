"""Model -> channel groups. Knows nothing of solvers or adapters."""

from lnr_prune.graph.flow import INPUT, OUTPUT
from lnr_prune.graph.groups import ChannelGroup, Consumer, Graph, close, find_groups, layer_name
from lnr_prune.graph.owners import Slot, along
from lnr_prune.graph.rules import Propagation, propagate
from lnr_prune.graph.sizes import HeldInt, along_axis, counts
from lnr_prune.graph.trace import Trace, evaluating, export, in_mode, named_tensors, read, unfused_attention

__all__ = [
    "INPUT",
    "OUTPUT",
    "ChannelGroup",
    "Consumer",
    "Graph",
    "HeldInt",
    "Propagation",
    "Slot",
    "Trace",
    "along",
    "along_axis",
    "close",
    "counts",
    "evaluating",
    "export",
    "find_groups",
    "in_mode",
    "layer_name",
    "named_tensors",
    "propagate",
    "read",
    "unfused_attention",
]
