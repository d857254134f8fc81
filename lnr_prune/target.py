"""What a layer's output should be in the pruned network, and the least squares that bring it there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lnr_prune import distributed
from lnr_prune.errors import CalibrationError
from lnr_prune.held_out import Place
from lnr_prune.layer_calls import LayerCall
from lnr_prune.onward import Onward
from lnr_prune.registry import Pair
from lnr_prune.ridge import LayerFit, ridge_regression, softmax_regression
from lnr_prune.statistics import CHUNK, SecondMoments, check_finite, rows
from lnr_prune.streams import Arrival

STEP = 1.5  # of the step towards the fixed point behind an activation; with 1 it takes three to get as far


@dataclass(frozen=True, eq=False)
class Target:
    """``z - c - beta s'``, what ``alpha M x`` should be, and phi, to which ``z' = alpha M x + c + beta s'`` comes.

    Attributes:
        calls: Per batch, the call with the pruned network's x and, as output, the target.
        places: Per batch, where it stands.
        offsets: Per batch, ``c + beta s'``; none where it is zero.
        affine: Per batch, an output y -> ``alpha y + c + beta s'``; none where it is y.
        alpha: The scale of every row of M, (h,); None = 1.
        activation: phi; None = the identity.
    """

    calls: Sequence[LayerCall]
    places: Sequence[Place]
    offsets: Sequence[Tensor] = ()
    affine: Sequence[Callable[[Tensor], Tensor]] = ()
    alpha: Tensor | None = None
    activation: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose matrix M has one more column, an intercept, where a running mean can take it up.

    Attributes:
        pair: How to read and write the layer.
        tensors: The original model's.
        kept: Columns of the layer's own matrix that stay, (d,) bool; None = all.
        alive: Rows that something comes of, (h,) bool; None = all.
        mean: Name of the running mean; None = there is no such column.
    """

    pair: Pair
    tensors: Mapping[str, Tensor]
    kept: Tensor | None = None
    alive: Tensor | None = None
    mean: str | None = None

    @property
    def name(self) -> str:
        """Of its weight."""
        return self.pair.consumer.weight

    @property
    def whole(self) -> bool:
        """Whether it has lost no column."""
        return self.kept is None or bool(self.kept.all())

    def matrix(self, weights: Mapping[str, Tensor], intercept: Tensor | None = None) -> Tensor:
        """M, with these parameters instead of the original ones, and this intercept instead of zero."""
        M = self.pair.matrix({**self.tensors, **weights})
        if self.mean is None:
            return M
        return torch.cat([M, (M.new_zeros(len(M)) if intercept is None else intercept.to(M))[:, None]], 1)

    def stays(self) -> Tensor:
        """Columns of M that are not zero, (d,) bool."""
        kept = self._columns(bias=1.0) if self.kept is None else self.kept
        return kept if self.mean is None else torch.cat([kept, kept.new_ones(1)])

    def ridged(self) -> Tensor:
        """Columns of M that a ridge holds: all but the bias and the intercept, (d,) bool."""
        ridged = self._columns(bias=0.0)
        return ridged if self.mean is None else torch.cat([ridged, ridged.new_zeros(1)])

    def _columns(self, bias: float) -> Tensor:
        return self.pair.columns(torch.ones_like(self.tensors[self.name]), bias=bias)

    def inputs(self, x: Tensor) -> Tensor:
        """X, (n, d), with a 1 where there is an intercept."""
        return x if self.mean is None else torch.cat([x, x.new_ones(len(x), 1)], 1)

    def arguments(self, M: Tensor) -> dict[str, Tensor]:
        """The "weight" and the "bias" to call it with, so that its matrix is M."""
        new = self.pair.write(M if self.mean is None else M[:, :-1], self.tensors)
        given = {key: new[name] for key, name in self.pair.names.items() if name in new}
        return given if self.mean is None else {**given, "bias": M[:, -1].to(given["weight"])}

    def parameters(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's parameters, and the running mean, that do what these arguments do: full name -> value."""
        new = {name: arguments[key] for key, name in self.pair.names.items() if key in arguments}
        if self.mean is not None:
            mean = self.tensors[self.mean]
            new[self.mean] = (mean.double() - arguments["bias"].double()).to(mean)
        return new


def target_of(pair: Pair, onward: Onward, arrivals: Sequence[Arrival], places: Sequence[Place]) -> Target:
    """What a layer is fitted to: z, where all is known of it, else y.

    Args:
        pair: The layer.
        onward: What becomes of its output.
        arrivals: The batches that have come to it.
        places: Where they stand.
    """
    calls = [replace(arrival.call, input=arrival.x) for arrival in arrivals]
    known = all(arrival.shortcuts is not None for arrival in arrivals)
    first = [call for call in calls if len(call.input)][:1]  # none where no sample is here
    scales = [_scales(pair, onward, call) if known else None for call in first]
    found = [scale for of_rank in distributed.everyone(scales) for scale in of_rank]
    alpha = next(iter(found), None)
    if alpha is None or any(scale is None for scale in found):
        return Target(calls, places)
    targets, offsets, affine = [], [], []
    for call, arrival in zip(calls, arrivals, strict=True):
        original, pruned = arrival.shortcuts or ([], [])
        affine.append(partial(onward.affine, added=pruned))
        offsets.append(affine[-1](torch.zeros_like(call.output)))
        targets.append(replace(call, output=onward.affine(call.output, original) - offsets[-1]))
    return Target(targets, places, offsets, affine, alpha, onward.activation)


def _scales(pair: Pair, onward: Onward, call: LayerCall) -> Tensor | None:
    """``alpha`` of every row of M, (h,), if it is the same at all positions; 0 where it is next to nothing."""
    one = next(call.split(1))
    alpha = pair.outputs(replace(one, output=onward.scale(one.output))).double()
    if not alpha.any() or not torch.allclose(alpha, alpha[:1].expand_as(alpha), rtol=1e-3):
        return None
    return alpha[0].where(alpha[0].abs() > 1e-6 * alpha.abs().max(), 0.0)


def fitted(layer: Layer, target: Target, ridge: float | None) -> tuple[Tensor, LayerFit]:
    """M, and how well it fits; a ridge of None is chosen on samples that are held out."""
    W, stays, ridged = layer.matrix({}), layer.stays(), layer.ridged()
    alpha = W.new_ones(len(W), 1) if target.alpha is None else target.alpha[:, None].to(W)
    fit, held = _moments(layer, target, W)
    aM, found = ridge_regression(fit, held, stays, ridged, alpha * W, ridge)
    if target.activation is not None:
        whole = fit if held is None else fit + held
        moments = replace(whole, yx=aM @ whole.xx + STEP * _lacking(layer, target, aM))
        aM, _ = ridge_regression(moments, None, stays, ridged, alpha * W, found.ridge)
    return (aM / alpha).where(alpha != 0, W * stays), found  # rows that nothing comes of stay


def fitted_to_all_calls(layer: Layer, moments: SecondMoments, ridge: float | None) -> tuple[Tensor, LayerFit]:
    """M for a layer that is called again and again, on the moments of all its calls in the original network."""
    W = layer.matrix({})
    return ridge_regression(moments.through(W), None, layer.stays(), layer.ridged(), W, ridge)


def divergence_fitted(layer: Layer, target: Target, M: Tensor) -> Tensor:
    """M once more, where the target is logits: by the divergence of their softmax."""
    parts = [(torch.full((len(x),), part, device=x.device), x, y) for part, x, y in _rows(layer, target)]
    of_all = [rows for of_rank in distributed.everyone(parts) for rows in of_rank]
    held, x, y = (torch.cat(each) for each in zip(*of_all, strict=True))
    return softmax_regression(x * layer.stays(), y, held, M)


def _moments(layer: Layer, target: Target, W: Tensor) -> tuple[SecondMoments, SecondMoments | None]:
    """Second moments of the samples to fit on, and of those held out."""
    (h, d), waiting = W.shape, list[list[Any]]([[], []])
    sums = [SecondMoments.zeros(h, d, W.device) for _ in range(2)]

    def add(part: bool) -> None:
        x, y = (torch.cat(each) for each in zip(*waiting[part], strict=True))
        waiting[part] = []
        sums[part] = sums[part].with_rows(x, y)

    for part, *piece in _rows(layer, target):  # products of few rows would cost little less than their addition
        waiting[part].append(piece)
        if (h + d) * sum(len(x) for x, _ in waiting[part]) >= CHUNK:
            add(part)
    for part in (False, True):
        if waiting[part]:
            add(part)
    name = layer.pair.consumer.name
    check_finite(name, sums[0] + sums[1], "the pruned network")
    fit, held = (each.over_ranks() for each in sums)
    if fit.count == 0:
        raise CalibrationError(
            f"layer {name!r} got no samples from {len(target.calls)} batches; leave out empty batches"
        )
    return fit, held if held.count else None


def _lacking(layer: Layer, target: Target, aM: Tensor) -> Tensor:
    """``sum (phi(z) - phi(z')) x^T``."""
    lacking, phi = torch.zeros_like(aM), target.activation or torch.clone
    for _, x, y, offset in _rows(layer, target, *target.offsets):
        difference = phi(y + offset) - phi((x @ aM.to(x).T).to(y) + offset)
        lacking += difference.to(x).T @ x
    (lacking,) = distributed.summed(lacking)
    return lacking


def _rows(layer: Layer, target: Target, *others: Tensor) -> Iterator[tuple[Any, ...]]:
    """Whether held out, x, with a 1 where there is an intercept, y, and the rows of others, one a batch."""
    for index, (call, place) in enumerate(zip(target.calls, target.places, strict=True)):
        count = len(call.input)
        first = place.first * count // max(1, place.size)
        parts = list(place.parts(count))
        sizes = [size for _, size in parts]
        more = [torch.split(others[index], sizes)] if others else []
        for (part, _), piece, *rest in zip(parts, call.split(sizes), *more, strict=True):
            for x, *ys in rows(layer.pair, piece, place.samples, first, *rest):
                yield part, layer.inputs(x), *ys
            first += len(piece.input)
