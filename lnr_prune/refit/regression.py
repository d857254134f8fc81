"""Least squares with a ridge towards the original weights, chosen on samples that were held out."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lnr_prune.calibration.moments import SecondMoments
from lnr_prune.lasso.problem import GroupLasso
from lnr_prune.report.rows import LayerReport

RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 1e-12)
"""Ridges to choose from, as fractions of the inputs' mean second moment."""
DEFAULT_RIDGE = 1e-6  # where no sample can be held out
GAIN = 1e-3  # a smaller ridge must lower the divergence on held-out rows by this share
FLOOR = 0.1  # least curvature of a class's logits, relative to the mean


@dataclass(frozen=True)
class LayerFit:
    """How well one layer was refitted.

    Attributes:
        error: ``E||y - M x||^2`` on the calibration data, with x in the pruned network and y in the original one. For
            a layer that was refitted with its maker, ``E||phi(z) - phi(z')||^2``, see `refit_jointly`, or the
            divergence of logits.
        scale: ``E||y||^2``, or ``E||phi(z)||^2``, or the entropy, to compare the error with.
        ridge: The ridge, as a fraction of the inputs' mean second moment.
        samples: Number of samples (rows) it was fitted to.
        columns: Number of columns that were fitted.
        softmax: Whether it was fitted to the probabilities that its outputs, logits, stand for.
    """

    error: float
    scale: float
    ridge: float
    samples: int
    columns: int
    softmax: bool = False

    def row(self, layer: str) -> LayerReport:
        """The layer's row of the report."""
        error = self.error / self.scale if self.scale > 0 else 0.0
        return LayerReport(layer, error, self.ridge, self.samples, self.columns, self.softmax)


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
        held: Moments of held-out samples, on which the ridge is chosen; the last fit is to all samples. None = there
            are none.
        kept: Columns that stay, (d,) bool.
        ridged: Columns that the ridge applies to, (d,) bool.
        W: The layer's own matrix, (h, d).
        ridge: The ridge; default: the best of `RIDGES` on ``held``. It grows if R is singular even with it.

    Returns:
        M, (h, d), and how well it fits.
    """
    ridged, W_kept = ridged[kept], W if bool(kept.all()) else W[:, kept]
    if ridge is None:
        ridge = DEFAULT_RIDGE if held is None else chosen_ridge(fit.at(kept), held.at(kept), ridged, W_kept)
    whole = (fit if held is None else fit + held).at(kept)
    M, ridge = _regressed(whole, ridged, W_kept, ridge)
    fitted = LayerFit(whole.error(M), float(whole.yy) / max(1, whole.count), ridge, whole.count, len(ridged))
    if W_kept is W:
        return M, fitted
    full = torch.zeros_like(W)
    full[:, kept] = M
    return full, fitted


def chosen_ridge(fit: SecondMoments, held: SecondMoments, ridged: Tensor, W: Tensor) -> float:
    """The ridge of `RIDGES`, towards W, with the least error on held-out samples."""
    regress = _regression(fit, ridged, W)
    best, ridge = math.inf, DEFAULT_RIDGE
    for candidate in RIDGES:
        M = regress(candidate)
        error = math.inf if M is None else held.error(M)
        if error > best:
            break
        best, ridge = error, candidate
    return ridge


def _regressed(moments: SecondMoments, ridged: Tensor, W: Tensor, ridge: float) -> tuple[Tensor, float]:
    """M, and the ridge, which grows until there is an M."""
    regress = _regression(moments, ridged, W)
    while (M := regress(ridge)) is None:
        ridge = max(10 * ridge, RIDGES[-1])
    return M, ridge


def _regression(moments: SecondMoments, ridged: Tensor, W: Tensor) -> Callable[[float], Tensor | None]:
    """Ridge -> M, or None where R + ridge is singular to working precision."""
    groups = ridged.long() - 1  # one group, and the columns that are eliminated
    eliminated = GroupLasso((moments.block(groups),), W.new_ones(1)).eliminated
    (block,), complete, R = eliminated.problem.blocks, eliminated.complete, eliminated.problem.blocks[0].R
    W = W if bool(ridged.all()) else W[:, ridged]
    scale = float(R.diagonal().mean()) or 1.0
    residual = torch.addmm(block.B, W, R, alpha=-1)

    def regress(ridge: float) -> Tensor | None:
        A = R.clone()
        A.diagonal().add_(ridge * scale)
        L, info = torch.linalg.cholesky_ex(A)
        if int(info) != 0:
            return None
        (M,) = complete((torch.cholesky_solve(residual.T, L).T.add_(W),))
        return M

    return regress


def softmax_regression(
    x: Tensor, y: Tensor, held: Tensor, M: Tensor, start: Tensor, *, squares: bool = False
) -> Tensor | None:
    """``argmin_M E KL(softmax(y) || softmax(M x)) + ridge E[x^2] ||M - M_0||_F^2``, for logits y.

    The ridge is the best of `RIDGES` on the held-out rows. Smaller and smaller ridges are tried, until the error on
    these rows grows, or falls by less than a thousandth. All fits share one eigendecomposition of ``E[x x^T]``: in its
    coordinates, scaled by the curvature, a small ridge is as quick as a large one.

    Args:
        x: Inputs, (n, d); M is changed only on columns where some of them are not zero.
        y: Logits, (n, h).
        held: Rows that are held out, (n,) bool.
        M: The least-squares matrix on all rows, (h, d); the ridge of the last fit is towards it.
        start: The least-squares matrix on the rows that are not held out; the ridge of all other fits is towards it.
        squares: Whether the squared error on the held-out rows must not grow either. This is for outputs that are not
            known to be logits.

    Returns:
        M, (h, d), or None if no divergence fit is better on the held-out rows than least squares.
    """
    x, y = x.to(M), y.to(M)
    p = y.softmax(1)

    entropy = (p * p.clamp_min(1e-30).log()).sum(1)

    def divergence(logits: Tensor, rows: Tensor) -> Tensor:
        return (entropy[rows] - (p[rows] * logits.log_softmax(1)).sum(1)).mean()

    def held_out(M: Tensor) -> float:
        return float(divergence(x[held] @ M.T, held))

    def squares_of(M: Tensor) -> float:
        return float((y[held] - x[held] @ M.T).square().sum())

    def fitter(tied: Tensor, rows: Tensor) -> Callable[[Tensor, float], Tensor]:
        seen, q = x[rows], p[rows]
        spread, V = torch.linalg.eigh(seen.T @ seen / len(seen))
        spread, V = (part[..., spread > len(x.T) * torch.finfo(x.dtype).eps * spread[-1]] for part in (spread, V))
        z, fixed, scale, curvature = seen @ V, seen @ tied.T, seen.square().mean(), (q * (1 - q)).mean(0)
        curvature = (curvature + FLOOR * curvature.mean())[:, None] * spread

        def fit(begin: Tensor, ridge: float) -> Tensor:
            steep = (curvature + 2 * ridge * scale).sqrt()
            change = ((begin - tied) @ V * steep).requires_grad_()
            optimiser = torch.optim.LBFGS([change], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

            def loss() -> Tensor:
                optimiser.zero_grad()
                N = change / steep
                value: Tensor = divergence(fixed + z @ N.T, rows) + ridge * scale * N.square().sum()
                value.backward()
                return value

            with torch.enable_grad():
                optimiser.step(loss)
            found: Tensor = tied + change.detach() / steep @ V.T
            return found

        return fit

    if not bool(held.any()) or bool(held.all()):
        return None
    found, best, chosen, last = start, held_out(start), math.inf, math.inf
    most = squares_of(start) if squares else math.inf
    fit = fitter(start, ~held)
    for ridge in RIDGES:
        found = fit(found, ridge)
        error = held_out(found)
        if error > last or squares_of(found) > most:
            break
        if error < best:
            best, chosen = error, ridge
        if error > (1 - GAIN) * last:
            break
        last = error
    return None if math.isinf(chosen) else fitter(M, torch.ones_like(held))(M, chosen)
