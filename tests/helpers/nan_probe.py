"""An oracle for the rules of the graph: single operations, probed number by number.

A linear layer produces channels along one axis of y; one operation reads y. What the rules say about the result is
checked by running the operation: on NaN or noise in a unit's channels, and on a y without them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lnr_prune.graph.closure import close
from lnr_prune.graph.groups import labelled_slots
from lnr_prune.graph.owners import along
from lnr_prune.graph.rules import propagate
from lnr_prune.graph.trace import trace

Run = Callable[[Tensor, int, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Operation:
    """What is done to y, with an axis and with parameters of these shapes (sizes of y's axes may be named)."""

    run: Run
    parameters: Callable[[tuple[int, ...]], dict[str, tuple[int, ...]]] = lambda shape: {}
    ranks: tuple[int, ...] = (2, 3, 4)


class Single(nn.Module):
    """Channels along an axis, and the operation."""

    def __init__(self, operation: Operation, shape: tuple[int, ...], axis: int, along_axis: int) -> None:
        super().__init__()
        self.produce = nn.Parameter(torch.eye(shape[axis], dtype=torch.float64))
        self.operation, self.axis, self.along_axis = operation, axis, along_axis
        for name, sizes in operation.parameters(shape).items():
            self.register_parameter(name, nn.Parameter(torch.rand(sizes, dtype=torch.float64) + 0.5, False))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.produce).movedim(-1, self.axis)
        return self.operation.run(y, self.along_axis, dict(self.named_parameters()))


def is_defined(operation: Operation, shape: tuple[int, ...], axis: int) -> bool:
    """Whether the operation works on an input of this shape, along this axis."""
    if len(shape) not in operation.ranks or axis >= len(shape):
        return False
    try:
        parameters = {name: torch.rand(sizes) for name, sizes in operation.parameters(shape).items()}
        operation.run(torch.rand(shape), axis, parameters)
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


def probe(operation: Operation, shape: tuple[int, ...], axis: int, along_axis: int) -> int:
    """Checks what the rules say about one operation; returns the number of units that they let go.

    Raises:
        AssertionError: If a unit reaches elements that it does not own, or leaves a ragged or another result.
    """
    torch.manual_seed(0)
    model = Single(operation, shape, axis, along_axis)
    y = torch.randn(shape, dtype=torch.float64)
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    result = operation.run(y, along_axis, parameters)
    state = propagate(trace(model, (y.movedim(axis, -1),), {}))
    label = close(state.owners)
    stays = {0, *(i for ids, why in state.owners.frozen if why != "output of the model" for i in label[ids].tolist())}
    channels = label[state.owners.slots["produce", 0]]
    node = next(node for node in state.trace.nodes if node.op == "output").all_input_nodes[0]
    owners = label[state.of(node)].expand(result.shape)
    slots = {slot: units for slot, units in labelled_slots(state.owners, label).items() if slot[0] != "produce"}
    units = [unit for unit in torch.unique(channels).tolist() if unit not in stays]
    for unit in units:
        gone = channels == unit
        masked = dict(parameters)
        for site in state.sites:
            if site.weight != "produce":
                name, dim = site.columns
                masked[name] = masked[name] * along(slots[site.columns] != unit, dim, masked[name].shape)
        before = operation.run(y, along_axis, masked)
        for value in (torch.randn_like(y) * 9, *([] if len(state.sites) > 1 else [torch.full_like(y, math.nan)])):
            probed = torch.where(along(gone, axis, shape), value, y)
            after = operation.run(probed, along_axis, masked)
            reached = ~torch.isclose(before, after, rtol=1e-9, atol=1e-12)
            assert bool((owners[reached] == unit).all()), f"unit {unit} reaches elements of others"
        if bool(gone.all()):
            continue
        smaller = dict(masked)
        for (name, dim), labels in slots.items():
            smaller[name] = smaller[name].index_select(dim, (labels != unit).nonzero()[:, 0])
        left = operation.run(y.index_select(axis, (~gone).nonzero()[:, 0]), along_axis, smaller)
        expected = before[owners != unit]
        assert expected.numel() == left.numel(), f"unit {unit} leaves {tuple(left.shape)} of {tuple(result.shape)}"
        torch.testing.assert_close(left.reshape(-1), expected)
    return len(units)
