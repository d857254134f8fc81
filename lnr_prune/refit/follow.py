"""Where a layer's output goes, followed through one recorded forward pass.

A refit that looks only at a layer's output y misses something. Behind a batch norm and a ReLU, an error in an entry
that the ReLU cuts off costs nothing. Behind an addition, the layer could undo the error of the shortcut as well. So
each layer's output is followed to where it is mixed with others. In a residual block::

    y = conv2(x)                      the layer
    z = bn2(y) + s                    affine steps: z = alpha y + c + beta s, with s = shortcut
    out = relu(z)                     the activation phi
    ... = next.conv1(out)             what is read next

`wiring_of` records every function that a forward pass calls. It tries out what each one does to its input: whether it
is affine, or applies one function to every entry. Only the batch norm is known by name, as its running mean can take
up an intercept. `Replay` uses what was found in later passes, as long as they call the same functions in the same
order.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lnr_prune.calibration.calls import Call, forward, fresh
from lnr_prune.calibration.functions.application import applied
from lnr_prune.calibration.functions.views import Views
from lnr_prune.calibration.outputs import judged
from lnr_prune.calibration.visible.attention import visible_attention
from lnr_prune.calibration.visible.recurrent import VisibleRecurrence
from lnr_prune.graph.module import evaluating, named_tensors, unfused_attention
from lnr_prune.refit.downstream import Downstream, Shortcut, Step, Steps, Wiring
from lnr_prune.refit.recording import Recorded, Recording

LONGEST = 8  # calls between a result and the shortcut that is computed from it


@torch.no_grad()
def wiring_of(model: nn.Module, names: Iterable[str], example: Call) -> Wiring:
    """Follows every layer's output through one forward pass, as far as functions are elementwise.

    Each function is tried out: whether it is affine in its input and in what it adds, or else elementwise. A shortcut
    must be computed before the layer is called, so that its error is known by then. The path to the next layer may
    lead through any functions, as long as nothing else reads the results on it.

    Args:
        model: The model.
        names: Names of the layers' weights.
        example: Arguments of a forward pass.
    """
    record, call = Recording(), fresh(example)
    with evaluating(model), unfused_attention(), visible_attention(model), record, VisibleRecurrence():
        outputs = forward(model, call)
    names = list(names)
    trail = _Trail(record.calls, named_tensors(model), names)
    given = [leaf for leaf in tree_leaves(judged(outputs)) if isinstance(leaf, Tensor)]
    last = next((name for name in names if len(given) == 1 and trail.makes_alone(name, given[0])), None)
    return Wiring(tuple(call.function for call in record.calls), {name: trail.follow(name) for name in names}, last)


class _Trail:
    """A recorded forward pass: who uses what."""

    def __init__(self, calls: Sequence[Recorded], tensors: Mapping[str, Tensor], layers: Iterable[str]) -> None:
        self.calls, self.names = calls, {id(tensor): name for name, tensor in tensors.items()}
        self.layers: dict[int, str] = {}  # number of a call -> the weight that it applies
        self.applied: dict[str, list[int]] = {name: [] for name in layers}
        views = Views(tensors, layers)
        self.uses: dict[int, list[int]] = defaultdict(list)  # of a tensor, by id: the calls keep all of them alive
        self.makes: dict[int, list[int]] = defaultdict(list)
        for number, call in enumerate(calls):
            found = applied(call.function, call.args, call.kwargs, views)
            used = [each for each in map(views.of, call.inputs) if each is not None]
            views.follow(call.function, call.args, call.kwargs, call.result)
            made = views.of(call.result)
            if made is not None:
                self.names[id(call.result)] = made.name
            for each in used if made is None else ():
                self.applied.get(each.name, []).append(number)
            if found is not None:
                self.layers[number] = found.used.name
            results = [leaf for leaf in tree_leaves(call.result) if isinstance(leaf, Tensor)]
            for of in dict.fromkeys(map(id, call.inputs)) if results else ():
                self.uses[of].append(number)
            for of in dict.fromkeys(map(id, results)):
                self.makes[of].append(number)

    def follow(self, name: str) -> Downstream:
        """What becomes of the output of the layer with this weight."""
        if len(self.applied[name]) != 1:
            return Downstream()
        (layer,) = self.applied[name]
        downstream = self._to_next(layer)
        for number, value in self._path(layer):
            call = self.calls[number]
            others = {id(leaf) for leaf in call.inputs if leaf is not value and id(leaf) not in self.names}
            if len(others) > 1 or call.draws or not _suits(call, value):
                break
            other = next(iter(others), None)
            shortcut = None if other is None else self._shortcut(other, number, layer)
            if other is not None and shortcut is None:
                break
            step = _step(call, value, other)
            if _is_affine(step, value, other is not None):
                mean = downstream.mean if downstream.affine.functions else self._mean(call, value)
                downstream = replace(downstream, affine=downstream.affine.then(step, shortcut), mean=mean)
            else:
                if other is None and _is_activation(step, value):
                    downstream = replace(downstream, activation=partial(_alone, step))
                break
        return downstream

    def _to_next(self, layer: int) -> Downstream:
        """The path from a layer to the next one, if nothing else reads the results on it."""
        way = Steps()
        for number, value in self._path(layer):
            call = self.calls[number]
            others = {id(leaf) for leaf in call.inputs if leaf is not value and id(leaf) not in self.names}
            if number in self.layers:
                into = self.layers[number]
                alone = not others and len(self.applied.get(into, ())) == 1
                return Downstream(into=into, way=way) if alone else Downstream()
            other = next(iter(others), None)
            shortcut = None if other is None else self._shortcut(other, number, layer)
            if len(others) > 1 or call.draws or (other is not None and shortcut is None):
                break
            way = way.then(_step(call, value, other), shortcut)
        return Downstream()

    def makes_alone(self, name: str, output: Tensor) -> bool:
        """Whether a tensor is what the layer with this weight returned in its only call."""
        applied = self.applied[name]
        return len(applied) == 1 and self.makes[id(output)] == applied

    def _path(self, layer: int) -> Iterator[tuple[int, Tensor]]:
        """The call that uses a layer's output, the call that uses its result, and so on, while each is the only one."""
        number, value = layer, self.calls[layer].result
        while isinstance(value, Tensor):
            later = [use for use in self.uses[id(value)] if use > number]
            if not later or (len(later) > 1 and self.calls[later[0]].result is not value):
                return
            number = later[0]
            yield number, value
            value = self.calls[number].result

    def _shortcut(self, of: int, before: int, layer: int) -> Shortcut | None:
        """How to compute a tensor that a call reads from results that are there before the layer is called."""
        leaves: dict[int, int] = {}
        replayed: set[int] = set()
        wanted = [(of, before)]
        while wanted:
            of, before = wanted.pop()
            made = max((number for number in self.makes[of] if number < before), default=None)
            if made is None:
                return None
            if made < layer:
                if leaves.setdefault(of, made) != made:
                    return None
                continue
            call = self.calls[made]
            if len(replayed) >= LONGEST or call.draws or made in self.layers:
                return None
            replayed.add(made)
            wanted += [(id(leaf), made) for leaf in call.inputs if id(leaf) not in self.names]
        return Shortcut(tuple(leaves.values()), tuple(leaves), tuple(self.calls[number] for number in sorted(replayed)))

    def _mean(self, call: Recorded, value: Tensor) -> str | None:
        """Name of the running mean of a batch norm."""
        if call.function is not F.batch_norm or call.args[:1] == () or call.args[0] is not value:
            return None
        mean = call.args[1] if len(call.args) > 1 else call.kwargs.get("running_mean")
        name = self.names.get(id(mean))
        return name if name is not None and len(self.uses[id(mean)]) == 1 else None


def _suits(call: Recorded, value: Tensor) -> bool:
    """Whether a call returns a floating-point tensor of its input's shape."""
    return isinstance(call.result, Tensor) and call.result.shape == value.shape and call.result.is_floating_point()


def _step(call: Recorded, value: Tensor, shortcut: int | None) -> Step:
    def step(y: Tensor, s: Tensor | None) -> Tensor:
        result: Tensor = call.again({id(value): y} | ({} if shortcut is None or s is None else {shortcut: s}))
        return result

    return step


def _alone(step: Step, z: Tensor) -> Tensor:
    return step(z, None)


def _is_affine(step: Step, value: Tensor, adds: bool) -> bool:
    """Whether ``step(y, s) = alpha y + beta s + c``, alpha, beta and c of y's shape."""
    zero, one = torch.zeros_like(value), torch.ones_like(value)
    try:
        c = step(zero, zero)
        alpha, beta = step(one, zero) - c, (step(zero, one) - c if adds else zero)
        return all(_close(step(y, s), alpha * y + beta * s + c) for y, s in (_drawn(value, 2), _drawn(value, 2, 3.0)))
    except (RuntimeError, TypeError):
        return False


def _is_activation(step: Step, value: Tensor) -> bool:
    """Whether a step applies one function to each entry, with slopes that a fixed-point iteration can follow."""
    (y,) = _drawn(value, 1, 3.0)
    flipped = y.flatten().flip(0).view_as(y)
    try:
        if not _close(step(flipped, None), step(y, None).flatten().flip(0).view_as(y)):
            return False
        grid = torch.linspace(-8, 8, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
        slopes = step(grid, None).flatten().diff() / grid.flatten().diff()
        return bool((slopes > -0.5).all() and (slopes < 1.6).all())
    except (RuntimeError, TypeError):
        return False


def _drawn(like: Tensor, count: int, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(like.shape, generator=generator) * scale for _ in range(count))
    return tuple(each.to(like) for each in drawn)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    tolerance = min(1e3 * torch.finfo(a.dtype).eps, 0.05) * max(1.0, float(b.abs().max()) if b.numel() else 1.0)
    return bool(((a - b).abs() <= tolerance).all())
