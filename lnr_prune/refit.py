"""Sequential asymmetric refit: every linear layer, inputs from the pruned network, targets from the original one."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lnr_prune import distributed, resume
from lnr_prune.calibration import Calibration, short_example
from lnr_prune.graph import evaluating, named_tensors, unfused_attention
from lnr_prune.held_out import places_of
from lnr_prune.multihead import visible_attention
from lnr_prune.registry import Pair
from lnr_prune.ridge import LayerFit
from lnr_prune.statistics import SecondMoments
from lnr_prune.streams import Stream, advance, both_networks
from lnr_prune.tandem import Before, Passed, in_tandem
from lnr_prune.target import Layer, Target, divergence_fitted, fitted, fitted_to_all_calls, target_of
from lnr_prune.trail import outlook


@dataclass(frozen=True, eq=False)
class Refit:
    """What `refit` returns.

    Attributes:
        weights: Full-size parameters (name -> tensor) of the layers that changed; columns that are not kept are zero.
        layers: Weight's name -> how well that layer was fitted.
    """

    weights: Mapping[str, Tensor]
    layers: Mapping[str, LayerFit]


def refit(
    model: nn.Module,
    layers: Mapping[str, Pair],
    kept: Mapping[str, Tensor],
    data: Calibration,
    *,
    repeated: Mapping[str, SecondMoments] | None = None,
    ridge: float | None = None,
    bias: bool = True,
    logits: bool = False,
    tandem: int = 0,
    rows: Mapping[str, Tensor] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Refit:
    """``argmin_M E||phi(z) - phi(z'(M x))||^2 + ridge ||M - W||_F^2`` on the kept columns, one layer after the other.

    z is what the original network makes of the layer's output y before it is mixed with others: scaled and
    shifted, ``z = alpha y + c + beta s``, where s is a shortcut that it is added to, and phi the activation that
    follows; see `Onward`. z' is what the pruned network makes of M x, with the pruned network's x and s, in which all
    earlier layers are refitted already: each layer undoes the error that reaches it, and that of the shortcut.
    Without phi this is a least squares; with it, one step of the fixed-point iteration whose next target is
    ``z' + phi(z) - phi(z')``, prolonged by `STEP`. Where a layer without a bias is followed by a batch norm, the
    intercept goes into its running mean.

    Every batch goes through both networks side by side, and waits at each layer for the others, so the whole costs
    two passes over the data however deep the network is, and the memory of what is alive at one layer, for all the
    data. Processes that prune together reach the layers in the same order, each with the batches of its own shard, and
    solve the same equations.

    Args:
        model: The original model; it is not changed.
        layers: Weight's name -> how to read and write the layer, in order of execution.
        kept: Weight's name -> the columns of x that stay, (d,) bool; default: all of them.
        data: The calibration data.
        repeated: Weight's name -> moments of all its calls in the original network, for layers that are called
            again and again in a forward pass: those are refitted to these at their first call.
        ridge: As a fraction of the inputs' mean second moment; default: the best of `RIDGES` on held-out samples.
        bias: Whether running means may take up intercepts.
        logits: Whether the network's output is logits: the layer that gives them is then fitted to their softmax,
            see `softmax_regression`.
        tandem: Iterations in which a layer is refitted once more, together with the one that makes its inputs for it
            alone, see `in_tandem`; 0 = none.
        rows: Weight's name -> the rows of y that something comes of, (h,) bool, for layers whose rows do not all stay.
        progress: Called with the name of every layer that is reached.

    Raises:
        CalibrationError: If there is no batch, or an activation is not finite.
    """
    tensors, order = named_tensors(model), list(layers)
    weights: dict[str, Tensor] = {}
    fits: dict[str, LayerFit] = {}
    called: dict[str, Mapping[str, Tensor]] = {}  # with which arguments, in the pruned network
    with torch.no_grad(), evaluating(model), unfused_attention(), visible_attention(model), ExitStack() as stack:
        (example,) = distributed.spread([lambda: short_example(model, data)])
        ahead, calls = outlook(model, layers, example), list(data)
        streams = [stack.enter_context(closing(both_networks(model, call, ahead))) for call in calls]
        places = dict(zip(streams, places_of(calls), strict=True))
        fronts = {stream: arrival for stream in streams if (arrival := next(stream, None)) is not None}
        makers = {onward.into: name for name, onward in ahead.layers.items() if tandem and onward.into is not None}
        passed: dict[str, dict[Stream, Passed]] = {}  # the makers

        def layer_of(name: str) -> Layer:
            takes = bias and layers[name].consumer.bias is None
            alive = None if rows is None else rows.get(name)
            return Layer(layers[name], tensors, kept.get(name), alive, ahead.layers[name].mean if takes else None)

        while True:
            nearest = min((order.index(arrival.name) for arrival in fronts.values()), default=len(order))
            if (nearest := min(distributed.everyone(nearest))) == len(order):
                break
            name = order[nearest]
            here = {each: fronts.pop(each) for each in streams if each in fronts and fronts[each].name == name}
            maker, inputs = makers.get(name, ""), dict[Stream, Tensor]()
            if name not in called:
                called[name] = {}
                if progress:
                    progress(layers[name].consumer.name)
                layer, through = layer_of(name), passed.pop(maker, {})
                changed = not layer.whole or not all(arrival.unchanged for arrival in here.values())
                if any(distributed.everyone(changed)):
                    at = [places[each] for each in here]
                    target = partial(target_of, layer.pair, ahead.layers[name], list(here.values()), at)
                    before = None
                    if all(distributed.everyone(here.keys() <= through.keys())) and maker in called:
                        first = layer_of(maker)
                        N = first.matrix(weights, called[maker].get("bias"))
                        before = Before(first, N, [through[each] for each in here], tandem)
                    moments, last = (repeated or {}).get(name), logits and name == ahead.last
                    solved = partial(_solved, layer, target, before, moments, ridge, last=last)
                    found = resume.remembered(f"refit of {name}", _Solved, solved)
                    weights |= found.weights
                    called |= found.called
                    fits[name] = found.fit
                    if maker in found.called:  # what it made is not what the layer reads now
                        inputs = {each: through[each].onwards(called[maker]) for each in here}
            if name in makers.values():
                way = ahead.layers[name].way
                passed[name] = {
                    each: Passed.of(arrival, way) for each, arrival in here.items() if arrival.beside is not None
                }
            for stream in here:
                new = {**called[name], "input": inputs[stream]} if stream in inputs else called[name]
                if (arrival := advance(stream, new)) is not None:
                    fronts[stream] = arrival
    return Refit(weights, fits)


@dataclass(frozen=True, eq=False)
class _Solved:
    """Parameters and running means by full name; the arguments of one layer, or two, by name; and how well they fit."""

    weights: Mapping[str, Tensor]
    called: Mapping[str, Mapping[str, Tensor]]
    fit: LayerFit


def _solved(
    layer: Layer,
    targeted: Callable[[], Target],
    before: Before | None,
    moments: SecondMoments | None,
    ridge: float | None,
    *,
    last: bool,
) -> _Solved:
    """One layer: on the moments of all its calls, if it has several, or for its target; ``last``: that of logits."""
    if moments is not None:
        M, fit = fitted_to_all_calls(layer, moments, ridge)
        return _written(fit, (layer, M))
    target = targeted()
    M, fit = fitted(layer, target, ridge)
    if last:
        M = divergence_fitted(layer, target, M)
    (M,) = distributed.shared(M)
    found = None if before is None else in_tandem(before, layer, M, target, logits=last)
    if before is None or found is None:
        return _written(fit, (layer, M))
    N, M, error, scale = found
    return _written(replace(fit, error=error, scale=scale), (before.layer, N), (layer, M))


def _written(fit: LayerFit, *matrices: tuple[Layer, Tensor]) -> _Solved:
    called = {layer.name: layer.arguments(M) for layer, M in matrices}
    written = [layer.parameters(called[layer.name]) for layer, _ in matrices]
    return _Solved({name: value for of in written for name, value in of.items()}, called, fit)
