"""The least squares that fits a layer to its target."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lnr_prune.calibration.gather import check_finite
from lnr_prune.calibration.moments import SecondMoments
from lnr_prune.calibration.rows import CHUNK, all_products, rows_of_sample
from lnr_prune.refit.regression import DEFAULT_RIDGE, LayerFit, ridge_regression, softmax_regression
from lnr_prune.refit.target import RefitLayer, Rows, Target, pieces_of, rows_of

KEPT = 2**26  # rows of up to so many elements are kept while a layer is fitted
PROBABLE = 2**25  # elements of the rows whose logits are fitted by divergence: some thousands of 10,000 classes
LARGEST = 2**23  # entries of a matrix that is fitted by divergence; it takes 40 times its memory
STEP = 1.5  # lengthens the step towards the fixed point behind an activation; with 1, it takes three steps


def fitted(
    layer: RefitLayer, target: Target, ridge: float | None, *, softmax: bool | None = False
) -> tuple[Tensor, LayerFit]:
    """M, and how well it fits.

    Args:
        layer: The layer.
        target: What it is fitted to.
        ridge: The ridge; None = chosen on held-out samples.
        softmax: Whether the target is logits, see `softmax_regression`; None = only if that fits better, and not worse
            by squares.
    """
    W, stays, ridged = layer.matrix({}), layer.stays(), layer.ridged()
    alpha = W.new_ones(len(W), 1) if target.affine is None else target.affine.alpha[:, None].to(W)
    read = _reader(layer, target, again=target.downstream.activation is not None or softmax is not False)
    fit, held = _moments(layer, target, W, read())
    if fit.count == 0:  # an expert that no row reaches
        return W * stays, LayerFit(0.0, 0.0, DEFAULT_RIDGE if ridge is None else ridge, 0, int(stays.sum()))
    aM, found = ridge_regression(fit, held, stays, ridged, alpha * W, ridge)
    if target.downstream.activation is not None:
        whole = fit if held is None else fit + held
        moments = replace(whole, yx=aM @ whole.xx + STEP * _lacking(target, aM, read()))
        aM, _ = ridge_regression(moments, None, stays, ridged, alpha * W, found.ridge)
    M = (aM / alpha).where(alpha != 0, W * stays)  # rows that nobody reads stay
    if softmax is not False:
        probable = _divergence_fitted(layer, target, M, found.ridge, read(), found.samples, squares=softmax is None)
        if probable is not None:
            return probable[0], replace(found, error=probable[1], softmax=True)
    return M, found


def _reader(layer: RefitLayer, target: Target, *, again: bool) -> Callable[[], Iterable[Rows]]:
    """Reads the target's rows; if they are few enough to be kept, only once."""
    call = next((call for call in target.calls if len(call.input)), None)
    if call is not None and again:
        d, _, wanted = rows_of_sample(layer.adapted, call, max(place.samples for place in target.places))
        count = wanted * sum(len(call.input) for call in target.calls)
        if count * (d + 2 * len(layer.adapted.matrix(layer.tensors))) <= KEPT:
            kept = list(rows_of(layer, target))
            return lambda: kept
    return partial(rows_of, layer, target)


def fitted_to_all_calls(layer: RefitLayer, moments: SecondMoments, ridge: float | None) -> tuple[Tensor, LayerFit]:
    """M for a layer that is called several times, from the moments of all its calls in the original network."""
    W = layer.matrix({})
    return ridge_regression(moments.through(W), None, layer.stays(), layer.ridged(), W, ridge)


def _some(read: Iterable[Rows], elements: int) -> Iterator[tuple[bool, Tensor, Tensor]]:
    """Rows of x and y that have no more than `PROBABLE` elements together: one in so many, of each part."""
    every, seen = -(-elements // PROBABLE), [0, 0]
    for part, x, y, _ in read:
        some = slice(-seen[part] % every, None, every)
        seen[part] += len(x)
        yield part, *((x, y) if every == 1 else (x[some].clone(), y[some].clone()))


def _divergence_fitted(
    layer: RefitLayer, target: Target, M: Tensor, ridge: float, read: Iterable[Rows], rows: int, *, squares: bool
) -> tuple[Tensor, float] | None:
    """M fitted again, for a target of logits, by the divergence of their softmax, see `softmax_regression`.

    If there are too many rows, one in so many is used; M stays as it is if it is too large, see `PROBABLE` and
    `LARGEST`.

    Returns:
        M and ``E||y - M x||^2``, or None if this serves nobody better.
    """
    h, d = M.shape
    if h * d > LARGEST:
        return None
    parts = [(torch.full((len(x),), part, device=x.device), x, y) for part, x, y in _some(read, rows * (h + d))]
    of_all = [rows for of_rank in target.ranks.all_gather(parts) for rows in of_rank]
    held, x, y = (torch.cat(each) for each in zip(*of_all, strict=True))
    stays = layer.stays()
    seen = SecondMoments.of(x[~held], y[~held])
    if seen.count == 0:
        return None
    start, _ = ridge_regression(seen, None, stays, layer.ridged(), layer.matrix({}), ridge)
    found = softmax_regression(x * stays, y, held, M, start, squares=squares)
    if found is None:
        return None
    return found, float((y - (x * stays).to(found) @ found.T).square().sum(1).mean())


def _moments(
    layer: RefitLayer, target: Target, W: Tensor, read: Iterable[Rows]
) -> tuple[SecondMoments, SecondMoments | None]:
    """Second moments of the samples to fit on, and of those held out."""
    (h, d), waiting, known = W.shape, list[list[Any]]([[], []]), [0, 0]
    sums = [SecondMoments.zeros(h, d, W.device) for _ in range(2)]
    products = dict[bool, Tensor]()
    for part, piece, samples, *_ in pieces_of(target):
        xx = all_products(layer.adapted, [piece], samples)
        if xx is None:  # of all pieces, or of none
            products.clear()
            break
        products[part] = products[part] + xx if part in products else xx
    for part, xx in products.items():
        known[part] = len(xx)
        sums[part].xx[: len(xx), : len(xx)] += xx

    def add(part: bool) -> None:
        x, y = (torch.cat(each) for each in zip(*waiting[part], strict=True))
        waiting[part] = []
        sums[part] = sums[part].with_rows(x, y, known[part])

    for part, x, y, _ in read:  # for few rows, adding the product costs as much as computing it
        waiting[part].append((x, y))
        if (h + d) * sum(len(of_x) for of_x, _ in waiting[part]) >= CHUNK:
            add(part)
    for part in (False, True):
        if waiting[part]:
            add(part)
    name = layer.adapted.consumer.name
    for moments in sums:
        check_finite(name, moments, "the pruned network")
    fit, held = (each.over_ranks(target.ranks) for each in sums)
    if fit.count == 0:
        return held, None
    return fit, held if held.count else None


def _lacking(target: Target, aM: Tensor, read: Iterable[Rows]) -> Tensor:
    """``sum (phi(z) - phi(z')) x^T``."""
    lacking, phi = torch.zeros_like(aM), target.downstream.activation or torch.clone
    for _, x, y, offset in read:
        difference = phi(y + offset) - phi((x @ aM.to(x).T).to(y) + offset)
        lacking += difference.to(x).T @ x
    (lacking,) = target.ranks.all_sum(lacking)
    return lacking
