"""Sequential asymmetric refit: every linear layer, inputs from the pruned network, targets from the original one."""

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lnr_prune.calibration import Calibration, Call
from lnr_prune.errors import CalibrationError
from lnr_prune.graph import evaluating, named_tensors, unfused_attention
from lnr_prune.multihead import visible_attention
from lnr_prune.problem import GroupLasso
from lnr_prune.registry import Pair
from lnr_prune.report import LayerReport
from lnr_prune.statistics import LayerCall, SecondMoments, check_finite, rows, watch
from lnr_prune.suspended import Answer, Question, suspended

RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 1e-12)
"""Ridges to choose from, as fractions of the inputs' mean second moment."""
DEFAULT_RIDGE = 1e-6  # where no sample can be held out
HELD_OUT = 4  # one sample of so many is held out to choose the ridge on


@dataclass(frozen=True)
class LayerFit:
    """How well one layer was refitted.

    Attributes:
        error: ``E||y - M x||^2`` on the calibration data: x in the pruned network, y in the original one.
        scale: ``E||y||^2``.
        ridge: The ridge, as a fraction of the inputs' mean second moment.
        samples: Number of samples (rows) it was fitted to.
        columns: Number of columns that were fitted.
    """

    error: float
    scale: float
    ridge: float
    samples: int
    columns: int

    def row(self, layer: str) -> LayerReport:
        """The layer's row of the report."""
        return LayerReport(
            layer, self.error / self.scale if self.scale > 0 else 0.0, self.ridge, self.samples, self.columns
        )


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
    progress: Callable[[str], None] | None = None,
) -> Refit:
    """``argmin_M E||y - M x||^2 + ridge ||M - W||_F^2`` on the kept columns, one layer after the other.

    y comes from the original network and x from the pruned one, in which all earlier layers are refitted
    already: each layer undoes the error that reaches it. Every batch goes through both networks side by side,
    and waits at each layer for the others, so the whole costs two passes over the data however deep the
    network is, and the memory of what is alive at one layer, for all the data.

    Args:
        model: The original model; it is not changed.
        layers: Weight's name -> how to read and write the layer, in order of execution.
        kept: Weight's name -> the columns of x that stay, (d,) bool; default: all of them.
        data: The calibration data.
        repeated: Weight's name -> moments of all its calls in the original network, for layers that are called
            again and again in a forward pass: those are refitted to these at their first call.
        ridge: As a fraction of the inputs' mean second moment; default: the best of `RIDGES` on held-out samples.
        progress: Called with the name of every layer that is reached.

    Raises:
        CalibrationError: If there is no batch, or an activation is not finite.
    """
    tensors, order = named_tensors(model), list(layers)
    weights: dict[str, Tensor] = {}
    fits: dict[str, LayerFit] = {}
    done: set[str] = set()
    with torch.no_grad(), evaluating(model), unfused_attention(), visible_attention(model), ExitStack() as stack:
        streams = [stack.enter_context(closing(_both_networks(model, call, layers))) for call in data]
        if not streams:
            raise CalibrationError("the calibration data holds no batch; give at least one batch of inputs")
        fronts = {stream: arrival for stream in streams if (arrival := next(stream, None)) is not None}
        while fronts:
            name = min((arrival.name for arrival in fronts.values()), key=order.index)
            here = {stream: arrival for stream, arrival in fronts.items() if arrival.name == name}
            if name not in done:
                done.add(name)
                pair = layers[name]
                if progress:
                    progress(pair.consumer.name)
                W = pair.matrix(tensors)
                columns = kept.get(name, W.new_ones(W.shape[1], dtype=torch.bool))
                if not (bool(columns.all()) and all(map(_unchanged, here.values()))):
                    if repeated and name in repeated:
                        fit, held = repeated[name].through(W), None
                    else:
                        fit, held = _moments(pair, list(here.values()), data.samples)
                    ridged = pair.columns(torch.ones_like(tensors[name]), bias=0.0)
                    M, fits[name] = ridge_regression(fit, held, columns, ridged, W, ridge)
                    weights |= pair.write(M, tensors)
            swapped = {key: weights[full] for key, full in layers[name].names.items() if full in weights}
            for stream in here:
                del fronts[stream]
                if (arrival := _send(stream, swapped)) is not None:
                    fronts[stream] = arrival
    return Refit(weights, fits)


@dataclass(frozen=True, eq=False)
class Arrival:
    """A batch that has come to a layer.

    Attributes:
        name: Name of the layer's weight.
        call: The call in the original network, done.
        x: The layer's input in the pruned network, which is about to be called.
    """

    name: str
    call: LayerCall
    x: Tensor


def _both_networks(
    model: nn.Module, call: Call, names: Iterable[str]
) -> Generator[Arrival, Mapping[str, Tensor], None]:
    """Runs the original and the pruned network side by side; at every layer it waits for the pruned one's weights."""

    def original(ask: Callable[[tuple[str, LayerCall]], None]) -> None:
        watch(model, call, names, see=lambda name, layer: ask((name, layer)))

    def pruned(ask: Callable[[tuple[str, Tensor]], Mapping[str, Tensor]]) -> None:
        watch(model, call, names, swap=lambda name, x: ask((name, x)))

    with closing(suspended(original)) as first, closing(suspended(pruned)) as second:
        seen, swapped = next(first, None), next(second, None)
        while seen is not None and swapped is not None:
            new = yield Arrival(*seen, swapped[1])
            seen, swapped = _send(first, None), _send(second, new)


def _send(stream: Generator[Question, Answer, None], answer: Answer) -> Question | None:
    try:
        return stream.send(answer)
    except StopIteration:
        return None


def _unchanged(arrival: Arrival) -> bool:
    return torch.equal(arrival.call.input, arrival.x)


def _moments(
    pair: Pair, arrivals: Sequence[Arrival], samples: int | None
) -> tuple[SecondMoments, SecondMoments | None]:
    """Second moments of the samples to fit on, and of those held out: every fourth batch, or a fourth of each."""
    sums: list[SecondMoments | None] = [None, None]
    first = 0
    for index, arrival in enumerate(arrivals):
        call = replace(arrival.call, input=arrival.x)
        count = len(call.input)
        cut = count - count // HELD_OUT
        if len(arrivals) >= HELD_OUT:
            cut = 0 if index % HELD_OUT == HELD_OUT - 1 else count
        for part, piece in enumerate(call.split([cut, count - cut])):
            for x, y in rows(pair, piece, samples, first):
                total = sums[part]
                sums[part] = SecondMoments.of(x, y) if total is None else total.with_rows(x, y)
            first += len(piece.input)
    name, (fit, held) = pair.consumer.name, sums
    if fit is None:
        raise CalibrationError(f"layer {name!r} got no samples from {len(arrivals)} batches; leave out empty batches")
    check_finite(name, fit if held is None else fit + held, "the pruned network")
    return fit, held


def ridge_regression(
    fit: SecondMoments,
    held: SecondMoments | None,
    kept: Tensor,
    ridged: Tensor,
    W: Tensor,
    ridge: float | None = None,
) -> tuple[Tensor, LayerFit]:
    """``argmin_M E||y - M x||^2 + ridge * mean(diag R) * ||M - W||_F^2``, M zero on columns that are not kept.

    Columns that are kept but not ridged (a bias) are eliminated first, exactly.

    Args:
        fit: Moments of the samples to fit on.
        held: Moments of others, on which the ridge is chosen; the last fit is to all of them. None = there are none.
        kept: Columns that stay, (d,) bool.
        ridged: Columns that the ridge holds, (d,) bool.
        W: The layer's own matrix, (h, d).
        ridge: The ridge; default: the best of `RIDGES` on ``held``. It grows where R is singular with it.

    Returns:
        M, (h, d), and how well it fits.
    """
    if ridge is None and held is not None:
        regress, columns = _regression(fit, kept, ridged, W), kept.nonzero()[:, 0]
        best, ridge, held_kept = math.inf, DEFAULT_RIDGE, held.at(columns)
        for candidate in RIDGES:
            M = regress(candidate)
            error = math.inf if M is None else held_kept.error(M)
            if error > best:
                break
            best, ridge = error, candidate
    ridge = DEFAULT_RIDGE if ridge is None else ridge
    whole = fit if held is None else fit + held
    regress = _regression(whole, kept, ridged, W)
    while (M := regress(ridge)) is None:
        ridge = max(10 * ridge, RIDGES[-1])
    full = torch.zeros_like(W)
    full[:, kept] = M
    return full, LayerFit(whole.error(full), float(whole.yy) / whole.count, ridge, whole.count, int(kept.sum()))


def _regression(moments: SecondMoments, kept: Tensor, ridged: Tensor, W: Tensor) -> Callable[[float], Tensor | None]:
    """Ridge -> M on the kept columns, or None where R + ridge is singular to working precision."""
    groups = ridged[kept].long() - 1  # one group, and the columns that are eliminated
    block = moments.at(kept.nonzero()[:, 0]).block(groups)
    eliminated = GroupLasso((block,), W.new_ones(1)).eliminated
    (block,) = eliminated.problem.blocks
    W = W[:, kept & ridged]
    scale = float(block.R.diagonal().mean()) or 1.0
    residual = block.B - W @ block.R

    def regress(ridge: float) -> Tensor | None:
        R = block.R.clone()
        R.diagonal().add_(ridge * scale)
        L, info = torch.linalg.cholesky_ex(R)
        if int(info) != 0:
            return None
        (M,) = eliminated.complete((W + torch.cholesky_solve(residual.T, L).T,))
        return M

    return regress
