"""The contract of an adapter."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lnr_prune.calibration.adapter import AdaptedLayer, Adapter, adapters, find
from lnr_prune.calibration.watch import LayerCall, watch
from lnr_prune.errors import AdapterError
from lnr_prune.graph.groups import ChannelGroup, find_groups
from lnr_prune.graph.module import named_tensors
from lnr_prune.graph.owners import along
from lnr_prune.graph.weights import tensor_named
from lnr_prune.prune import prune
from lnr_prune.selection.amount import Keep


def check_adapter(adapter: Adapter, model: nn.Module, example: Tensor) -> None:
    """Checks everything that lnr-prune relies on in an adapter, in float64, on one model.

    This is checked for every consumer of the model that the adapter matches: no other adapter matches it;
    ``y = x M^T`` holds for the layer's own matrix; samples do not depend on one another; every channel has
    columns; writing M back gives the same layer, and zeroing a channel's columns zeroes exactly its input
    weights; pruning the model equals masking it.

    Args:
        adapter: A registered adapter.
        model: A model with at least one channel group that the adapter reads.
        example: A batch of inputs, at least two samples.

    Raises:
        AdapterError: At the first broken promise; the message says which.
    """
    if adapters().get(adapter.name) is not adapter:
        raise AdapterError(f"adapter {adapter.name!r} is not registered; call lnr_prune.register(adapter) first")
    model, example = copy.deepcopy(model).double().eval(), example.double()
    found = list(_matching(adapter, model, example))
    if not found:
        raise AdapterError(f"adapter {adapter.name!r} matches no consumer of the model; give a model that it is for")
    for group, pair in found:
        if find(pair.consumer) is not adapter:
            raise AdapterError(f"adapter {adapter.name!r} matches {pair.consumer.name!r}, but another one fits it")
        _check_pair(group, pair, model, example)
    for group, pair in found:
        pruned = prune(model, [example], Keep({group.name: 0.5}), bias=pair.consumer.bias is not None)
        masked = functional_call(model, dict(pruned.masked), (example,))
        _require(torch.allclose(pruned.model(example), masked), pair, "the pruned model does not equal the masked one")


def _matching(adapter: Adapter, model: nn.Module, example: Tensor) -> Iterator[tuple[ChannelGroup, AdaptedLayer]]:
    for group in find_groups(model, (example,), {}).groups:
        for consumer in group.consumers:
            for variant in dict.fromkeys((consumer.bias, None)):
                candidate = replace(consumer, bias=variant)
                if adapter.matches(candidate):
                    yield group, AdaptedLayer(candidate, adapter)


def _check_pair(group: ChannelGroup, pair: AdaptedLayer, model: nn.Module, example: Tensor) -> None:
    calls: list[LayerCall] = []
    name = pair.consumer.weight
    watch(model, ((example,), {}), [name], see=lambda _, call: calls.append(call))
    tensors = named_tensors(model)
    M = pair.matrix(tensors)
    for call in calls:
        x, y = pair.inputs(call), pair.outputs(call)
        shapes = f"x {tuple(x.shape)}, y {tuple(y.shape)}, M {tuple(M.shape)}"
        fit = x.dim() == y.dim() == M.dim() == 2 and len(x) == len(y) and (y.shape[1], x.shape[1]) == M.shape
        _require(fit, pair, f"expected x (n, d), y (n, h), M (h, d), got {shapes}")
        _require(torch.allclose(x @ M.T, y), pair, "y = x M^T does not hold for the layer's own matrix")
        parts = torch.cat([pair.inputs(part) for part in call.split(1)])
        _require(torch.equal(parts, x), pair, "inputs() of a batch differs from inputs() of its samples in turn")
        some = torch.arange(len(x) - 1, -1, -2)
        _require(torch.equal(pair.inputs(call, some), x[some]), pair, "inputs(rows) must be these rows of inputs()")
        _require(torch.equal(pair.outputs(call, some), y[some]), pair, "outputs(rows) must be these rows of outputs()")
        moments = pair.second_moments(list(call.split(1)))
        _require(moments is None or torch.allclose(moments, x.T @ x), pair, "second_moments() is not sum x x^T")
    whole = tensor_named(tensors, name)
    groups = pair.adapter.groups(pair.consumer, whole)
    every = torch.arange(group.size)
    legal = groups.shape == M.shape[1:] and bool((groups < group.size).all()) and bool(torch.isin(every, groups).all())
    _require(legal, pair, f"groups() must give each of the {M.shape[1]} columns a channel, and every channel a column")
    written = pair.write(M, tensors)
    same = all(torch.allclose(value, tensor_named(tensors, key)) for key, value in written.items())
    _require(same, pair, "write(matrix()) does not give the layer back")
    for channel in (0, group.size - 1):
        kept = along(pair.consumer.channels != channel, pair.consumer.dim, whole.shape)
        expected = {**tensors, name: whole.detach() * kept}
        written = pair.write(M * (groups != channel), tensors)
        zeroed = all(torch.allclose(value, expected[key]) for key, value in written.items())
        _require(zeroed, pair, "zeroing a channel's columns must zero its input weights, and nothing else")


def _require(condition: bool, pair: AdaptedLayer, message: str) -> None:
    if not condition:
        raise AdapterError(f"adapter {pair.adapter.name!r} on layer {pair.consumer.name!r}: {message}")
