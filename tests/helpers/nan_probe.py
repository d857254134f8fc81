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


def _whole(y: Tensor, axis: int) -> int:
    return y.shape[axis]


def _fixed(y: Tensor, tokens: int, size: int) -> Tensor:
    positions = torch.arange(tokens)[:, None] * 7 + torch.arange(size)
    return positions.to(y).cos().expand(*y.shape[:-2], tokens, size)


def _shuffled(y: Tensor, axis: int) -> Tensor:
    return y.unflatten(axis, (2, -1)).transpose(axis, axis + 1).flatten(axis, axis + 1)


def _overwritten(y: Tensor, axis: int) -> Tensor:
    y = y.clone()
    y.narrow(axis, y.shape[axis] // 2, y.shape[axis] // 2).zero_()
    return y


def _plain(run: Callable[[Tensor, int], Tensor], *ranks: int) -> Operation:
    return Operation(lambda y, a, p: run(y, a), ranks=ranks or (2, 3, 4))


def _norm(run: Run, *ranks: int) -> Operation:
    return Operation(run, lambda shape: {"w": (shape[1],), "b": (shape[1],)}, ranks or (2, 3, 4))


OPERATIONS: dict[str, Operation] = {
    "pointwise": _plain(lambda y, a: F.gelu(y) * 2 + y.tanh()),
    "flip and add": _plain(lambda y, a: y + y.flip(a)),
    "add transposed": _plain(lambda y, a: y + y.transpose(a, 0)),
    "outer product": _plain(lambda y, a: y.unsqueeze(a) * y.unsqueeze(a + 1)),
    "gate": _plain(lambda y, a: y * y.mean(a, keepdim=True).sigmoid()),
    "gate of one": _plain(lambda y, a: y * y.narrow(a, 0, 1)),
    "softmax": _plain(lambda y, a: y.softmax(a)),
    "log_softmax": _plain(lambda y, a: F.log_softmax(y, a)),
    "cumsum": _plain(lambda y, a: y.cumsum(a)),
    "sum": _plain(lambda y, a: y.sum(a)),
    "mean": _plain(lambda y, a: y.mean(a, keepdim=True)),
    "amax": _plain(lambda y, a: y.amax(a)),
    "max": _plain(lambda y, a: y.max(a).values),
    "std": _plain(lambda y, a: y.std(a)),
    "logsumexp": _plain(lambda y, a: y.logsumexp(a)),
    "normalize": _plain(lambda y, a: F.normalize(y, dim=a)),
    "sort": _plain(lambda y, a: y.sort(a).values),
    "prod": _plain(lambda y, a: y.prod(a)),
    "cumprod": _plain(lambda y, a: y.cumprod(a)),
    "layer_norm": _plain(lambda y, a: F.layer_norm(y, y.shape[a:])),
    "rms_norm": _plain(lambda y, a: F.rms_norm(y, y.shape[a:])),
    "glu": _plain(lambda y, a: F.glu(y, a)),
    "swap halves": _plain(lambda y, a: torch.cat(y.chunk(2, a)[::-1], a)),
    "split": _plain(lambda y, a: torch.cat([part.tanh() for part in y.split(_whole(y, a) // 2, a)], a)),
    "half": _plain(lambda y, a: y.narrow(a, 0, _whole(y, a) // 2)),
    "other half": _plain(lambda y, a: y.narrow(a, _whole(y, a) // 2, _whole(y, a) // 2)),
    "every other": _plain(lambda y, a: y.transpose(0, a)[::2]),
    "stack": _plain(lambda y, a: torch.stack([y, y.relu()], a)),
    "concatenate": _plain(lambda y, a: torch.cat([y, y.relu()], a)),
    "roll": _plain(lambda y, a: y.roll(1, a)),
    "transpose": _plain(lambda y, a: y.transpose(0, a).contiguous()),
    "flatten": _plain(lambda y, a: y.flatten(max(0, a - 1), a)),
    "unflatten": _plain(lambda y, a: y.unflatten(a, (2, -1))),
    "shuffle": _plain(_shuffled),
    "overwrite": _plain(_overwritten),
    "repeat": _plain(lambda y, a: y.repeat([1] * a + [2] + [1] * (y.dim() - a - 1))),
    "repeat_interleave": _plain(lambda y, a: y.repeat_interleave(2, a)),
    "expand": _plain(lambda y, a: y.unsqueeze(a).expand(*y.shape[:a], 3, *y.shape[a:])),
    "pad": _plain(lambda y, a: F.pad(y, [0, 0] * (y.dim() - a - 1) + [1, 2])),
    "crop": _plain(lambda y, a: F.pad(y, [0, 0] * (y.dim() - a - 1) + [-1, 0])),
    "reflect": _plain(lambda y, a: F.pad(y, (1, 1), "reflect"), 2, 3),
    "circular": _plain(lambda y, a: F.pad(y, (1, 1), "circular"), 2, 3),
    "select": _plain(lambda y, a: y.select(a, -1)),
    "index": _plain(lambda y, a: y.transpose(0, a)[torch.tensor([1, 0])]),
    "gather": _plain(lambda y, a: y.gather(a, torch.zeros_like(y, dtype=torch.long))),
    "unbind": _plain(lambda y, a: torch.stack(y.unbind(a)[::-1], a)),
    "triangle": _plain(lambda y, a: y.tril()),
    "diff": _plain(lambda y, a: y.diff(dim=a)),
    "mask": _plain(lambda y, a: y.masked_fill(torch.arange(y.shape[-1]) > 1, 0.0)),
    "constant": _plain(lambda y, a: y * torch.linspace(1, 2, y.shape[-1], dtype=y.dtype)),
    "uniform": _plain(lambda y, a: y * torch.full((y.shape[a],), 3.0).view([-1] + [1] * (y.dim() - a - 1))),
    "matmul": _plain(lambda y, a: y @ y.mT),
    "gram": _plain(lambda y, a: y.mT @ y),
    "einsum": _plain(lambda y, a: torch.einsum("bij,bkj->bki", y, y), 3),
    "einsum heads": _plain(lambda y, a: torch.einsum("bihd,bjhd->bhij", y, y), 4),
    "cdist": _plain(lambda y, a: torch.cdist(y, y), 2, 3),
    "attention": _plain(lambda y, a: F.scaled_dot_product_attention(y, y.flip(-2), y), 3, 4),
    "attention values": _plain(
        lambda y, a: F.scaled_dot_product_attention(_fixed(y, 3, 5), _fixed(y, y.shape[-2], 5), y), 3, 4
    ),
    "attention queries": _plain(
        lambda y, a: F.scaled_dot_product_attention(y, _fixed(y, 3, y.shape[-1]), _fixed(y, 3, 5)), 3, 4
    ),
    "unfold": _plain(lambda y, a: y.unfold(a, 2, 1)),
    "im2col": _plain(lambda y, a: F.unfold(y, 2), 4),
    "pixel_shuffle": _plain(lambda y, a: F.pixel_shuffle(y, 2), 4),
    "pixel_unshuffle": _plain(lambda y, a: F.pixel_unshuffle(y, 2), 4),
    "channel_shuffle": _plain(lambda y, a: F.channel_shuffle(y, 2), 4),
    "max_pool": _plain(lambda y, a: F.max_pool2d(y, 2, 1), 3, 4),
    "avg_pool": _plain(lambda y, a: F.avg_pool1d(y, 2, 1), 2, 3),
    "adaptive": _plain(lambda y, a: F.adaptive_avg_pool2d(y, 1), 3, 4),
    "interpolate": _plain(lambda y, a: F.interpolate(y, scale_factor=2.0, mode="bilinear"), 4),
    "group_norm": _norm(lambda y, a, p: F.group_norm(y, y.shape[1] // 2, p["w"], p["b"])),
    "instance_norm": _norm(lambda y, a, p: F.instance_norm(y, weight=p["w"], bias=p["b"]), 3, 4),
    "batch_norm": _norm(lambda y, a, p: F.batch_norm(y, p["b"], p["w"])),
    "batch_norm in training": _plain(lambda y, a: F.batch_norm(y, None, None, training=True)),
    "prelu": Operation(lambda y, a, p: F.prelu(y, p["w"]), lambda shape: {"w": (shape[1],)}),
    "scale": Operation(lambda y, a, p: y * p["w"], lambda shape: {"w": (shape[-1],)}),
    "scale a row": Operation(lambda y, a, p: y * p["w"], lambda shape: {"w": (shape[-2], 1)}),
    "scale of one": Operation(lambda y, a, p: y * p["w"], lambda shape: {"w": (1,)}),
    "table": Operation(lambda y, a, p: y + p["w"], lambda shape: {"w": shape[-2:]}),
    "linear": Operation(lambda y, a, p: F.linear(y, p["w"], p["b"]), lambda shape: {"w": (6, shape[-1]), "b": (6,)}),
    "product with a weight": Operation(lambda y, a, p: y @ p["w"], lambda shape: {"w": (shape[-1], 6)}),
    "transposed weight": Operation(lambda y, a, p: y @ p["w"].T, lambda shape: {"w": (6, shape[-1])}),
    "weight on the left": Operation(lambda y, a, p: p["w"] @ y, lambda shape: {"w": (6, shape[-2])}),
    "einsum with a weight": Operation(
        lambda y, a, p: torch.einsum("...i,oi->...o", y, p["w"]), lambda shape: {"w": (6, shape[-1])}
    ),
    "part of a stack": Operation(lambda y, a, p: F.linear(y, p["w"][1]), lambda shape: {"w": (3, 6, shape[-1])}),
    "stack of weights": Operation(
        lambda y, a, p: y @ p["w"].mT, lambda shape: {"w": (shape[-3], 6, shape[-1])}, (3, 4)
    ),
    "computed weight": Operation(
        lambda y, a, p: F.linear(y, F.layer_norm(p["w"], p["w"].shape[1:])), lambda shape: {"w": (6, shape[-1])}
    ),
    "conv1d": Operation(lambda y, a, p: F.conv1d(y, p["w"]), lambda shape: {"w": (4, shape[-2], 2)}, (2, 3)),
    "conv2d": Operation(
        lambda y, a, p: F.conv2d(y, p["w"], padding=1), lambda shape: {"w": (4, shape[-3], 2, 2)}, (3, 4)
    ),
    "grouped": Operation(
        lambda y, a, p: F.conv1d(y, p["w"], groups=y.shape[-2] // 2), lambda shape: {"w": (shape[-2], 2, 1)}, (3,)
    ),
    "depthwise": Operation(
        lambda y, a, p: F.conv1d(y, p["w"], groups=y.shape[-2]), lambda shape: {"w": (2 * shape[-2], 1, 1)}, (3,)
    ),
    "transposed": Operation(
        lambda y, a, p: F.conv_transpose1d(y, p["w"]), lambda shape: {"w": (shape[-2], 4, 2)}, (3,)
    ),
    "transposed in groups": Operation(
        lambda y, a, p: F.conv_transpose1d(y, p["w"], groups=y.shape[-2] // 2),
        lambda shape: {"w": (shape[-2], 3, 2)},
        (3,),
    ),
}
