"""Rules for recurrent layers and cells: a hidden unit leaves with its rows of every gate.

Unit h of a layer owns the rows ``h, h + H, h + 2H, ...`` of both matrices and both biases, and column h of the
recurrent matrix, which reads it in the next step. One module has the same number of units in all its layers and
directions, so unit h of one leaves with unit h of all others.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lnr_prune.graph.nodes import SAME, UNIFORM, argument, describe, op_name, shape_of
from lnr_prune.graph.owners import along
from lnr_prune.graph.rules import Ids, Propagation, Site, rule

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
AS_WIDE = SAME | {"alias", "clone", "contiguous", "detach", "zeros_like", "ones_like", "full_like"}


@rule(*GATES)
def _layers(state: Propagation, node: fx.Node) -> Ids | None:
    """Reads the last axis; a hidden unit leaves with its rows of every gate, in all layers and directions at once."""
    x, initial, weights, biases = _arguments(node)[:4]
    if not isinstance(biases, bool) or any(weight not in state.trace.names for weight in weights):
        return None  # a packed sequence, or computed weights
    sides = 1 + bool(argument(node, 7, "bidirectional"))
    count = argument(node, 4, "num_layers") * sides
    size = len(weights) // count
    ids, units = state.of(x), list[Tensor]()
    for index in range(count):
        own = weights[index * size : (index + 1) * size]
        units.append(_units(state, node, ids, own if biases else [*own[:2], None, None, *own[2:]]))
        if index % sides == sides - 1:
            ids = _last_axis(torch.cat(units[-sides:]), x)
    return [ids, *_states(state, node, initial, units)]


@rule(*(f"{kind}_cell" for kind in GATES))
def _cell(state: Propagation, node: fx.Node) -> Ids | None:
    """Reads the last axis; a hidden unit leaves with its rows of every gate."""
    x, initial, *weights = _arguments(node)
    if any(weight is not None and weight not in state.trace.names for weight in weights):
        return None
    units = _units(state, node, state.of(x), [*weights, None, None][:4])
    states = _states(state, node, initial, [units])
    return states[0] if isinstance(initial, fx.Node) else states


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _units(state: Propagation, node: fx.Node, x: Tensor, weights: Sequence[Any]) -> Tensor:
    """The units of one layer and direction that reads x, (H,); 0 if they cannot leave."""
    (w_ih, w_hh, b_ih, b_hh), projection, owners, reason = weights[:4], weights[4:], state.owners, describe(node)
    rows = _read(state, node, x, w_ih, b_ih)
    of_gates = rows.view(GATES[op_name(node).removesuffix("_cell")], -1)
    if projection:
        projected = f"{reason} projects its hidden units (proj_size)"
        owners.freeze(rows, projected)
        for weight in (w_hh, *projection):
            owners.freeze_parameter(state.trace.names[weight], projected)
        return rows.new_zeros(shape_of(projection[0])[0])
    units = of_gates[0]
    again = _read(state, node, units.view([1] * (x.dim() - 1) + [-1]), w_hh, b_hh, repeats=op_name(node) in GATES)
    owners.couple(torch.cat([of_gates, again.view(of_gates.shape)]), units, reason)
    return units


def _read(state: Propagation, node: fx.Node, x: Tensor, weight: fx.Node, bias: Any, *, repeats: bool = False) -> Tensor:
    """``W x + b``, for all tokens: x's channels are the columns of W. Returns its rows."""
    name, owners, reason = state.trace.names[weight], state.owners, describe(node)
    owners.couple_axis(x, x.dim() - 1, owners.slot(name, 1), f"input of {reason}")
    rows = owners.rows(name, 0)
    if bias is not None:
        owners.couple(rows, state.of(bias).expand(len(rows)), reason)
    state.sites.append(Site(name, state.trace.names.get(bias), "linear", (name, 0), (name, 1), repeats=repeats))
    state.macs[name] += math.prod(shape_of(_arguments(node)[0])[:-1]) * state.trace.tensors[name].numel()
    return rows


def _states(state: Propagation, node: fx.Node, initial: Any, units: Sequence[Tensor]) -> list[Tensor]:
    """The states after the last step, which are as wide as those before the first: layers and directions are tied."""
    states = [initial] if isinstance(initial, fx.Node) else initial
    state.owners.couple(torch.stack(list(units)), units[0], f"the one hidden size of {describe(node)}")
    for value in states:
        _start(state, node, value, units[0])
    return [_last_axis(units[0], value) for value in states]


def _start(state: Propagation, node: fx.Node, value: fx.Node, units: Tensor) -> None:
    """The state before the first step: zeros shrink with the units; any other is theirs, or keeps them."""
    reason, made = f"initial state of {describe(node)}", [value]
    while op_name(made[-1]) in AS_WIDE:
        made.append(argument(made[-1], 0, "self"))
    ids = state.of(made[-1])
    if bool(ids.any()):
        state.owners.couple_axis(ids, ids.dim() - 1, units, reason)
    elif op_name(made[-1]) in UNIFORM:
        state.ids.update({each: _last_axis(units, each) for each in made})  # its size counts them
    else:
        state.owners.freeze(units, f"the {reason} is given, with a fixed number of units")


def _last_axis(units: Tensor, value: fx.Node) -> Tensor:
    shape = shape_of(value)
    return along(units, len(shape) - 1, shape)
