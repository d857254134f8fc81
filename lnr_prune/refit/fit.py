"""The least squares that fits a layer to its target."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lnr_prune.calibration.gather import check_finite
from lnr_prune.calibration.moments import SecondMoments
from lnr_prune.calibration.rows import CHUNK, all_products
from lnr_prune.errors import CalibrationError
from lnr_prune.refit.regression import LayerFit, ridge_regression, softmax_regression
from lnr_prune.refit.target import RefitLayer, Target, pieces_of, rows_of

STEP = 1.5  # lengthens the step towards the fixed point behind an activation; with 1, it takes three steps


def fitted(layer: RefitLayer, target: Target, ridge: float | None) -> tuple[Tensor, LayerFit]:
    """M, and how well it fits; a ridge of None is chosen on held-out samples."""
    W, stays, ridged = layer.matrix({}), layer.stays(), layer.ridged()
    alpha = W.new_ones(len(W), 1) if target.affine is None else target.affine.alpha[:, None].to(W)
    fit, held = _moments(layer, target, W)
    aM, found = ridge_regression(fit, held, stays, ridged, alpha * W, ridge)
    if target.downstream.activation is not None:
        whole = fit if held is None else fit + held
        moments = replace(whole, yx=aM @ whole.xx + STEP * _lacking(layer, target, aM))
        aM, _ = ridge_regression(moments, None, stays, ridged, alpha * W, found.ridge)
    return (aM / alpha).where(alpha != 0, W * stays), found  # rows that nobody reads stay


def fitted_to_all_calls(layer: RefitLayer, moments: SecondMoments, ridge: float | None) -> tuple[Tensor, LayerFit]:
    """M for a layer that is called several times, from the moments of all its calls in the original network."""
    W = layer.matrix({})
    return ridge_regression(moments.through(W), None, layer.stays(), layer.ridged(), W, ridge)


def divergence_fitted(
    layer: RefitLayer, target: Target, M: Tensor, ridge: float, *, squares: bool
) -> tuple[Tensor, float] | None:
    """M fitted again, for a target of logits, by the divergence of their softmax, see `softmax_regression`.

    Returns:
        M and ``E||y - M x||^2``, or None if this serves nobody better.
    """
    parts = [(torch.full((len(x),), part, device=x.device), x, y) for part, x, y, _ in rows_of(layer, target)]
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


def _moments(layer: RefitLayer, target: Target, W: Tensor) -> tuple[SecondMoments, SecondMoments | None]:
    """Second moments of the samples to fit on, and of those held out."""
    (h, d), waiting, known = W.shape, list[list[Any]]([[], []]), [0, 0]
    sums = [SecondMoments.zeros(h, d, W.device) for _ in range(2)]
    for part in (False, True):
        calls = [piece for held, piece, *_ in pieces_of(target) if held == part]
        xx = all_products(layer.adapted, calls, max((place.samples for place in target.places), default=0))
        if xx is not None:
            known[part] = len(xx)
            sums[part].xx[: len(xx), : len(xx)] += xx

    def add(part: bool) -> None:
        x, y = (torch.cat(each) for each in zip(*waiting[part], strict=True))
        waiting[part] = []
        sums[part] = sums[part].with_rows(x, y, known[part])

    for part, *piece, _ in rows_of(layer, target):  # for few rows, adding the product costs as much as computing it
        waiting[part].append(piece)
        if (h + d) * sum(len(x) for x, _ in waiting[part]) >= CHUNK:
            add(part)
    for part in (False, True):
        if waiting[part]:
            add(part)
    name = layer.adapted.consumer.name
    for moments in sums:
        check_finite(name, moments, "the pruned network")
    fit, held = (each.over_ranks(target.ranks) for each in sums)
    if fit.count == 0:
        raise CalibrationError(
            f"layer {name!r} got no samples from {len(target.calls)} batches; leave out empty batches"
        )
    return fit, held if held.count else None


def _lacking(layer: RefitLayer, target: Target, aM: Tensor) -> Tensor:
    """``sum (phi(z) - phi(z')) x^T``."""
    lacking, phi = torch.zeros_like(aM), target.downstream.activation or torch.clone
    for _, x, y, offset in rows_of(layer, target):
        difference = phi(y + offset) - phi((x @ aM.to(x).T).to(y) + offset)
        lacking += difference.to(x).T @ x
    (lacking,) = target.ranks.all_sum(lacking)
    return lacking
