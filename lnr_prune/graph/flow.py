"""Which layer feeds which: a trace that leaves out everything between the layers."""

from collections.abc import Iterable

from torch import fx

from lnr_prune.graph.nodes import op_name
from lnr_prune.graph.rules import Propagation

INPUT, OUTPUT = "<input>", "<output>"


def name_of(state: Propagation, value: fx.Node) -> str | None:
    """Name of the parameter that a value is, or is a view of."""
    return state.views[value].name if value in state.views else state.trace.names.get(value)


def data_flow(traces: Iterable[Propagation]) -> tuple[tuple[str, str], ...]:
    """Pairs of names, each once, in order of execution: what the first computes goes into the second.

    Layers are linear layers, convolutions and embeddings, under the names of their weights. Names in angle brackets
    are not layers: ``INPUT``, ``OUTPUT``, and operations such as ``<add_3>`` where several layers' outputs meet.

    Args:
        traces: Ownership of every value, in evaluation and perhaps in training.
    """
    pairs: dict[tuple[str, str], None] = {}
    meetings: dict[tuple[str, ...], str] = {}
    for state in traces:
        layers = {name for name, _ in state.owners.produced} | set(state.macs)
        source: dict[fx.Node, str] = {}
        for node in state.trace.nodes:
            if state.is_view(node):
                continue
            sources = dict.fromkeys(source[value] for value in node.all_input_nodes if value in source)
            names = (name_of(state, value) for value in node.all_input_nodes)
            weight = next((name for name in names if name in layers), None)
            if node.op == "placeholder":
                if node not in state.trace.names and node not in state.trace.constants:
                    source[node] = INPUT
            elif node.op == "output" or weight is not None or len(sources) > 1:
                meeting = meetings.setdefault((op_name(node), *sources), f"<{op_name(node)}_{len(meetings)}>")
                target = OUTPUT if node.op == "output" else weight or meeting
                pairs.update(dict.fromkeys((each, target) for each in sources))
                source[node] = target
            elif sources:
                source[node] = next(iter(sources))
    return tuple(pairs)
