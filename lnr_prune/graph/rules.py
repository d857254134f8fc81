"""How ownership passes through ATen operations; an operation without a rule freezes what it touches."""

import logging
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lnr_prune.graph.nodes import SAME, UNIFORM, argument, describe, draws, is_pointwise, op_name, shape_of
from lnr_prune.graph.owners import Owners, Slot, collapse_axes, nobody, varying_axes
from lnr_prune.graph.trace import Trace
from lnr_prune.graph.weights import View, computed_weights, views_in

logger = logging.getLogger("lnr_prune")

Ids = Tensor | list[Tensor]
"""The ids of a value; one tensor for each output of an operation that has several."""


@dataclass(frozen=True)
class Site:
    """A place where a weight is applied to an activation: ``y = W x``.

    Attributes:
        weight: Name of the weight.
        bias: Name of the bias, if any.
        op: ATen name of the operation, such as "linear" or "conv2d".
        rows: The weight's output dimension.
        columns: The weight's input dimension.
        repeats: Whether the operation applies it several times: a recurrence, once a step.
        parts: Numbers of the parts of a stack of weights that are applied; () if the weight is none.
        multiple: What its numbers of rows and columns must be multiples of.
    """

    weight: str
    bias: str | None
    op: str
    rows: Slot
    columns: Slot
    repeats: bool = False
    parts: tuple[int, ...] = ()
    multiple: int = 1


@dataclass(eq=False)
class Propagation:
    """Ownership of every value in a trace, and the multiply-accumulates that each weight takes part in."""

    trace: Trace
    owners: Owners
    ids: dict[fx.Node, Ids] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    known: dict[fx.Node, Any] = field(default_factory=dict)
    macs: Counter[str] = field(default_factory=Counter)
    estimated: set[str] = field(default_factory=set)  # weights of which the macs depend on the data
    products: list[tuple[int, Tensor]] = field(default_factory=list)  # of two activations, with the ids of one of them
    moving: set[fx.Node] = field(default_factory=set)  # values that are not the same in every call
    drawn: set[fx.Node] = field(default_factory=set)  # values made of random numbers that belong to no channel
    extents: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    views: dict[fx.Node, View] = field(default_factory=dict)  # parameters, transposed or in parts

    def is_view(self, node: fx.Node) -> bool:
        """Whether a value is a view of a weight. It has owners only if it is used as a value."""
        return node in self.views and node not in self.trace.names

    def of(self, node: fx.Node) -> Tensor:
        """The ids of a value; a parameter that is used as a value owns itself."""
        if node not in self.ids and self.is_view(node):
            visit(self, node)
        if node not in self.ids:
            name = self.trace.names.get(node)
            floating = name is not None and self.trace.tensors[name].is_floating_point()
            self.ids[node] = collapse_axes(self.owners.value(name)) if name and floating else nobody(shape_of(node))
        ids = self.ids[node]
        if isinstance(ids, list):
            raise TypeError(f"{op_name(node)} has several outputs")
        return ids

    def extent(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a value; if nobody owns the value, 1 along the axes on which it is uniform."""
        if node not in self.extents:
            owned = node.op != "call_function" or bool(self.of(node).any())
            self.extents[node] = shape_of(node) if owned else self._uniform_extent(node)
        return self.extents[node]

    def _uniform_extent(self, node: fx.Node) -> tuple[int, ...]:
        shape = shape_of(node)
        if op_name(node) in UNIFORM:
            return (1,) * len(shape)
        spread = ("expand", "expand_as", "broadcast_to", *(["repeat"] if node in self.moving else []))
        if op_name(node) in spread:
            source = self.extent(argument(node, 0, "self"))
            varying = (1,) * (len(shape) - len(source)) + source
            return tuple(1 if part == 1 else size for part, size in zip(varying, shape, strict=True))
        if is_pointwise(node):
            return tuple(torch.broadcast_shapes(*(self.extent(value) for value in node.all_input_nodes)))
        return shape if node in self.moving else tuple(collapse_axes(self.constant(node)).shape)

    def constant(self, node: fx.Node) -> Any:
        """The actual value of a node that does not depend on the model's inputs, such as an index table.

        Raises:
            ValueError: If it depends on them, or is drawn at random.
        """
        if node in self.moving:
            raise ValueError(f"{node.name} is not the same in every call")
        if node not in self.known:
            if node in self.trace.names:
                self.known[node] = self.trace.tensors[self.trace.names[node]]
            elif node in self.trace.constants:
                self.known[node] = self.trace.constants[node]
            elif node.op == "get_attr":
                self.known[node] = getattr(self.trace.module, str(node.target))
            else:
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.constant)
                target: Any = node.target
                with torch.no_grad():
                    self.known[node] = target(*args, **kwargs)
        return self.known[node]


Rule = Callable[[Propagation, fx.Node], Ids | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of some ATen operations; it returns None where it does not apply."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def propagate(trace: Trace, owners: Owners | None = None) -> Propagation:
    """Walks the graph once and returns the ownership of every value; owners of another trace can be extended."""
    state = Propagation(trace, Owners(trace.tensors) if owners is None else owners)
    for node in trace.nodes:
        given = node.op == "placeholder" and node not in trace.names and node not in trace.constants
        given = given or draws(node) or "unknown" in node.meta
        if given or not state.moving.isdisjoint(node.all_input_nodes):
            state.moving.add(node)
    state.views.update(views_in(trace))
    state.owners.by_row.update(computed_weights(trace, state.views, state.moving))
    for node in trace.nodes:
        if node.op == "output":
            for value in node.all_input_nodes:
                state.owners.freeze(all_ids(state, value), "output of the model")
        elif state.is_view(node):
            for index in (value for value in node.all_input_nodes if value not in state.views):
                state.owners.freeze(all_ids(state, index), f"picks among parts by their number in {describe(node)}")
        elif node.op == "call_function":
            visit(state, node)
    for node in state.views:
        if state.is_view(node):
            state.ids.setdefault(node, nobody(shape_of(node)))
    return state


def visit(state: Propagation, node: fx.Node) -> None:
    """Finds the owners of an operation's result."""
    outputs = state.ids[node] = _ids_of(state, node)
    noisy = draws(node) or not state.drawn.isdisjoint(node.all_input_nodes)
    if noisy and not bool(all_ids(state, node).any()):
        state.drawn.add(node)
    for ids in outputs if isinstance(outputs, list) else [outputs]:
        if len(varying_axes(ids)) > 1:
            state.owners.grids.append(ids)


def _ids_of(state: Propagation, node: fx.Node) -> Ids:
    value = node.meta.get("val")
    shapes = [getattr(part, "shape", ()) for part in value] if isinstance(value, list | tuple) else None
    untouched: Ids = nobody(shape_of(node)) if shapes is None else [nobody(shape) for shape in shapes]
    touches_parameter = any(value in state.trace.names or value in state.views for value in node.all_input_nodes)
    if not touches_parameter and not any(bool(all_ids(state, value).any()) for value in node.all_input_nodes):
        return untouched
    try:
        ids = _apply_rule(state, node)
    except Exception:  # a rule that does not expect this use of its operation: less is pruned
        logger.debug("the rule of %s failed", describe(node), exc_info=True)
        ids = None
    if ids is None:
        if not op_name(node).startswith(("_assert", "sym_")):
            _freeze_inputs(state, node)
        return untouched
    for axis in node.meta.get("unknown", ()):
        if isinstance(ids, Tensor) and ids.shape[axis] > 1:
            state.owners.freeze(ids, f"their number depends on the data in {describe(node)}")
    if shapes is not None and isinstance(ids, Tensor):
        # indices that come with the result belong to the same channels; statistics, of another shape, to nobody
        return [ids if shape == shapes[0] else nobody(shape) for shape in shapes]
    return ids


def _apply_rule(state: Propagation, node: fx.Node) -> Ids | None:
    name = op_name(node)
    if node.target is operator.getitem:
        outputs = state.ids[argument(node, 0, "self")]
        return outputs[argument(node, 1, "index")] if isinstance(outputs, list) else None
    if name in RULES:
        return RULES[name](state, node)
    if name in SAME:
        return state.of(argument(node, 0, "self"))
    if name in UNIFORM:
        return nobody(shape_of(node))
    if is_pointwise(node):
        _freeze_what_meets_noise(state, node)
        return meet(state, node, [(state.of(value), state.extent(value)) for value in node.all_input_nodes])
    return None


def _freeze_what_meets_noise(state: Propagation, node: fx.Node) -> None:
    """Channels for each of which a random number is drawn stay: others would be drawn if there were fewer."""
    for noise in state.drawn.intersection(node.all_input_nodes):
        ahead = len(shape_of(node)) - len(shape_of(noise))
        axes = {ahead + axis for axis, size in enumerate(state.extent(noise)) if size > 1}
        for value in node.all_input_nodes:
            ids, lead = state.of(value), len(shape_of(node)) - len(shape_of(value))
            if axes.intersection(lead + axis for axis in varying_axes(ids)):
                state.owners.freeze(ids, f"random numbers are drawn for each of its channels in {describe(node)}")


def _freeze_inputs(state: Propagation, node: fx.Node) -> None:
    reason = f"no rule for {describe(node)}"
    for value in node.all_input_nodes:
        if value in state.trace.names or state.is_view(value):
            name = state.trace.names.get(value) or state.views[value].name
            state.owners.freeze_parameter(name, reason)
        else:
            state.owners.freeze(all_ids(state, value), reason)


def all_ids(state: Propagation, node: fx.Node) -> Tensor:
    """The ids of a value, of all its outputs if it has several."""
    ids = state.ids.get(node)
    if isinstance(ids, list):
        return torch.cat([part.reshape(-1) for part in ids]) if ids else nobody(())
    return state.of(node)


def meet(
    state: Propagation,
    node: fx.Node,
    operands: list[tuple[Tensor, tuple[int, ...]]],
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """Pointwise: ids that meet are coupled; ids that meet an unowned value that varies with them cannot leave.

    Args:
        state: The propagation.
        node: The operation.
        operands: Ids and true shape of each operand.
        shape: What they broadcast to; default: the operation's own shape.
    """
    shape, reason, owners = shape_of(node) if shape is None else shape, describe(node), state.owners
    padded = []
    for ids, size in operands:
        lead = [1] * (len(shape) - len(size))
        padded.append((ids.reshape(lead + list(ids.shape)), (*lead, *size)))
    owned = _without_singles(owners, [(ids, size) for ids, size in padded if bool(ids.any())], reason)
    if not owned:
        return nobody(shape)
    # any operand may come first: take one that a weight produces, and the smallest of these
    owned.sort(key=lambda operand: (not owners.is_produced(operand[0]), operand[0].numel()))
    met, produced = owned[0][0], owners.is_produced(owned[0][0])
    for ids, size in owned[1:]:
        shared = {axis for axis in varying_axes(met) if size[axis] > 1}
        if produced and not owners.is_produced(ids) and shared != set(varying_axes(met)):
            # a parameter that several slabs share (a rotary table, a norm per head) stays; slabs leave as a whole
            met = owners.mix(met, sorted(shared), reason)
            owners.freeze(ids, f"shared by several channels in {reason}")
        else:
            owners.couple(met, ids, reason)
            # if one of them does not vary along an axis, all ids of the other there are tied to the same owner
            both = set(varying_axes(met)) & set(varying_axes(ids))
            met = owners.mix(met, sorted(set(varying_axes(met)) - both), reason)
            ids = owners.mix(ids, sorted(set(varying_axes(ids)) - both), reason)
            met = torch.where(met != 0, met, ids)
    for ids, size in padded:
        if not bool(ids.any()):
            shared = {axis for axis in varying_axes(met) if size[axis] > 1}
            if shared and shared == set(varying_axes(met)):
                owners.freeze(met, f"meets a value that belongs to no known channel in {reason}")
            elif shared:
                met = owners.mix(met, sorted(shared), reason)
    return met


Operand = tuple[Tensor, tuple[int, ...]]
"""Ids and true shape of what an operation reads."""


def _without_singles(owners: Owners, owned: list[Operand], reason: str) -> list[Operand]:
    """Leaves out operands with one entry for all channels of the others, such as one gate per position: they stay."""
    varying = {axis for ids, _ in owned for axis in varying_axes(ids)}
    single = [ids.numel() == 1 and all(size[axis] == 1 for axis in varying) for ids, size in owned]
    if all(single):
        return owned
    for (ids, _), alone in zip(owned, single, strict=True):
        if alone:
            owners.freeze(ids, f"one channel that meets many in {reason}")
    return [operand for operand, alone in zip(owned, single, strict=True) if not alone]
