"""Sequential asymmetric refit: every linear layer, inputs from the pruned network, targets from the original one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lnr_prune import distributed, resume
from lnr_prune.calibration import Calibration, short_example
from lnr_prune.errors import CalibrationError
from lnr_prune.graph import evaluating, named_tensors, unfused_attention
from lnr_prune.held_out import Place, places_of
from lnr_prune.layer_calls import LayerCall
from lnr_prune.multihead import visible_attention
from lnr_prune.onward import Onward, outlook
from lnr_prune.registry import Pair
from lnr_prune.ridge import LayerFit, ridge_regression, softmax_regression
from lnr_prune.statistics import CHUNK, SecondMoments, check_finite, rows
from lnr_prune.streams import Arrival, advance, both_networks

STEP = 1.5  # of the step towards the fixed point behind an activation; with 1 it takes three to get as far


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
        progress: Called with the name of every layer that is reached.

    Raises:
        CalibrationError: If there is no batch, or an activation is not finite.
    """
    tensors, order = named_tensors(model), list(layers)
    weights: dict[str, Tensor] = {}
    fits: dict[str, LayerFit] = {}
    swaps: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad(), evaluating(model), unfused_attention(), visible_attention(model), ExitStack() as stack:
        (example,) = distributed.spread([lambda: short_example(model, data)])
        ahead, calls = outlook(model, layers, example), list(data)
        streams = [stack.enter_context(closing(both_networks(model, call, ahead))) for call in calls]
        places = dict(zip(streams, places_of(calls), strict=True))
        fronts = {stream: arrival for stream in streams if (arrival := next(stream, None)) is not None}
        while True:
            nearest = min((order.index(arrival.name) for arrival in fronts.values()), default=len(order))
            if (nearest := min(distributed.everyone(nearest))) == len(order):
                break
            name = order[nearest]
            here = {stream: fronts[stream] for stream in streams if stream in fronts and fronts[stream].name == name}
            if name not in swaps:
                swaps[name] = {}
                pair = layers[name]
                if progress:
                    progress(pair.consumer.name)
                W = pair.matrix(tensors)
                columns = kept.get(name, W.new_ones(W.shape[1], dtype=torch.bool))
                changed = not bool(columns.all()) or not all(arrival.unchanged for arrival in here.values())
                if any(distributed.everyone(changed)):
                    at = [places[stream] for stream in here]
                    target = partial(_target, pair, ahead.layers[name], list(here.values()), at, len(W), bias)
                    moments, last = (repeated or {}).get(name), logits and name == ahead.last
                    solved = partial(_solved, pair, tensors, target, moments, columns, ridge, last=last)
                    layer = resume.remembered(f"refit of {name}", _Solved, solved)
                    new, intercept, fits[name] = layer.weights, layer.intercept, layer.fit
                    weights |= new
                    swaps[name] = {key: new[full] for key, full in pair.names.items() if full in new}
                    running = ahead.layers[name].mean
                    if intercept is not None and running is not None:
                        mean = tensors[running]
                        weights[running] = (mean.double() - intercept).to(mean)
                        swaps[name]["bias"] = intercept.to(tensors[name])
            for stream in here:
                del fronts[stream]
                if (arrival := advance(stream, swaps[name])) is not None:
                    fronts[stream] = arrival
    return Refit(weights, fits)


@dataclass(frozen=True, eq=False)
class _Solved:
    """A layer's full-size parameters, the intercept for a running mean, and how well they fit."""

    weights: Mapping[str, Tensor]
    intercept: Tensor | None
    fit: LayerFit


def _solved(
    pair: Pair,
    tensors: Mapping[str, Tensor],
    targeted: Callable[[], "Target"],
    moments: SecondMoments | None,
    kept: Tensor,
    ridge: float | None,
    *,
    last: bool,
) -> _Solved:
    """One layer: on the moments of all its calls, if it has several, or for its target; ``last``: that of logits."""
    W, intercept = pair.matrix(tensors), None
    ridged = pair.columns(torch.ones_like(tensors[pair.consumer.weight]), bias=0.0)
    if moments is not None:
        M, fit = ridge_regression(moments.through(W), None, kept, ridged, W, ridge)
    else:
        target = targeted()
        M, intercept, fit = _fitted(pair, target, kept, ridged, W, ridge)
        if last:
            M = _divergence_fitted(pair, target, kept, M)
        M, *intercepts = distributed.shared(*(each for each in (M, intercept) if each is not None))
        intercept = next(iter(intercepts), None)
    return _Solved(pair.write(M, tensors), intercept, fit)


@dataclass(frozen=True, eq=False)
class Target:
    """``z - c - beta s'``, what ``alpha M x`` should be, and phi, to which ``z' = alpha M x + c + beta s'`` comes.

    Attributes:
        calls: Per batch, the call with the pruned network's x and, as output, the target.
        places: Per batch, where it stands.
        offsets: Per batch, ``c + beta s'``.
        alpha: The scale of every row of M, (h,).
        activation: phi; None = the identity.
        mean: Running mean that takes up an intercept; None = there is none.
    """

    calls: Sequence[LayerCall]
    places: Sequence[Place]
    offsets: Sequence[Tensor]
    alpha: Tensor
    activation: Callable[[Tensor], Tensor] | None = None
    mean: str | None = None


def _target(
    pair: Pair, onward: Onward, arrivals: Sequence[Arrival], places: Sequence[Place], h: int, bias: bool
) -> Target:
    calls = [replace(arrival.call, input=arrival.x) for arrival in arrivals]
    known = all(arrival.shortcuts is not None for arrival in arrivals)
    first = [call for call in calls if len(call.input)][:1]  # none where no sample is here
    scales = [_scales(pair, onward, call) if known else None for call in first]
    found = [scale for of_rank in distributed.everyone(scales) for scale in of_rank]
    alpha = next(iter(found), None)
    if alpha is None or any(scale is None for scale in found):
        return Target(calls, places, [], torch.ones(h, dtype=torch.float64))
    targets, offsets = [], []
    for call, arrival in zip(calls, arrivals, strict=True):
        original, pruned = arrival.shortcuts or ([], [])
        offsets.append(onward.affine(torch.zeros_like(call.output), pruned))
        targets.append(replace(call, output=onward.affine(call.output, original) - offsets[-1]))
    takes = bias and pair.consumer.bias is None
    return Target(targets, places, offsets, alpha, onward.activation, onward.mean if takes else None)


def _scales(pair: Pair, onward: Onward, call: LayerCall) -> Tensor | None:
    """``alpha`` of every row of M, (h,), if it is the same at all positions; 0 where it is next to nothing."""
    one = next(call.split(1))
    alpha = pair.outputs(replace(one, output=onward.scale(one.output))).double()
    if not alpha.any() or not torch.allclose(alpha, alpha[:1].expand_as(alpha), rtol=1e-3):
        return None
    return alpha[0].where(alpha[0].abs() > 1e-6 * alpha.abs().max(), 0.0)


def _fitted(
    pair: Pair, target: Target, kept: Tensor, ridged: Tensor, W: Tensor, ridge: float | None
) -> tuple[Tensor, Tensor | None, LayerFit]:
    """M, the intercept where a running mean takes one, and how well they fit."""
    if target.mean is not None:
        W = torch.cat([W, W.new_zeros(len(W), 1)], 1)
        kept, ridged = torch.cat([kept, kept.new_ones(1)]), torch.cat([ridged, ridged.new_zeros(1)])
    alpha = target.alpha[:, None].to(W)
    fit, held = _moments(pair, target, W)
    aM, fitted = ridge_regression(fit, held, kept, ridged, alpha * W, ridge)
    if target.activation is not None:
        whole = fit if held is None else fit + held
        moments = replace(whole, yx=aM @ whole.xx + STEP * _lacking(pair, target, aM))
        aM, _ = ridge_regression(moments, None, kept, ridged, alpha * W, fitted.ridge)
    M = (aM / alpha).where(alpha != 0, W * kept)  # rows that nothing comes of stay
    return (M, None, fitted) if target.mean is None else (M[:, :-1], M[:, -1], fitted)


def _divergence_fitted(pair: Pair, target: Target, kept: Tensor, M: Tensor) -> Tensor:
    parts = [(torch.full((len(x),), part, device=x.device), x, y) for part, x, y in _rows(pair, target)]
    of_all = [rows for of_rank in distributed.everyone(parts) for rows in of_rank]
    held, x, y = (torch.cat(each) for each in zip(*of_all, strict=True))
    return softmax_regression(x * kept, y, held, M)


def _moments(pair: Pair, target: Target, W: Tensor) -> tuple[SecondMoments, SecondMoments | None]:
    """Second moments of the samples to fit on, and of those held out."""
    (h, d), waiting = W.shape, list[list[Any]]([[], []])
    sums = [SecondMoments.zeros(h, d, W.device) for _ in range(2)]

    def add(part: bool) -> None:
        x, y = (torch.cat(each) for each in zip(*waiting[part], strict=True))
        waiting[part] = []
        sums[part] = sums[part].with_rows(x, y)

    for part, *piece in _rows(pair, target):  # products of few rows would cost little less than their addition
        waiting[part].append(piece)
        if (h + d) * sum(len(x) for x, _ in waiting[part]) >= CHUNK:
            add(part)
    for part in (False, True):
        if waiting[part]:
            add(part)
    name = pair.consumer.name
    check_finite(name, sums[0] + sums[1], "the pruned network")
    fit, held = (each.over_ranks() for each in sums)
    if fit.count == 0:
        raise CalibrationError(
            f"layer {name!r} got no samples from {len(target.calls)} batches; leave out empty batches"
        )
    return fit, held if held.count else None


def _lacking(pair: Pair, target: Target, aM: Tensor) -> Tensor:
    """``sum (phi(z) - phi(z')) x^T``."""
    lacking, phi = torch.zeros_like(aM), target.activation or torch.clone
    for _, x, y, offset in _rows(pair, target, *target.offsets):
        difference = phi(y + offset) - phi((x @ aM.to(x).T).to(y) + offset)
        lacking += difference.to(x).T @ x
    (lacking,) = distributed.summed(lacking)
    return lacking


def _rows(pair: Pair, target: Target, *others: Tensor) -> Iterator[tuple[Any, ...]]:
    """Whether held out, x, with a 1 where there is an intercept, y, and the rows of others, one a batch."""
    for index, (call, place) in enumerate(zip(target.calls, target.places, strict=True)):
        count = len(call.input)
        first = place.first * count // max(1, place.size)
        parts = list(place.parts(count))
        sizes = [size for _, size in parts]
        more = [torch.split(others[index], sizes)] if others else []
        for (part, _), piece, *rest in zip(parts, call.split(sizes), *more, strict=True):
            for x, *ys in rows(pair, piece, place.samples, first, *rest):
                yield part, x if target.mean is None else torch.cat([x, x.new_ones(len(x), 1)], 1), *ys
            first += len(piece.input)
