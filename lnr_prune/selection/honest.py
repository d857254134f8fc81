"""Selection with few samples: a ridge towards the original weights, and errors on held-out samples.

With fewer samples than columns, every support looks perfect on the samples that it was fitted to. So elimination and
lasso use moments with a ridge towards the original matrix. The ridge is the best one on the other half of the samples,
and curves of errors are measured on that half, too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lnr_prune.calibration.reading import Reading
from lnr_prune.lasso.backward import Elimination
from lnr_prune.lasso.problem import GroupLasso, debias
from lnr_prune.lasso.prox import Matrices
from lnr_prune.refit.regression import DEFAULT_RIDGE, chosen_ridge

SHARE = 1 / 2  # the ridge is chosen on this share of the channels, those with the most energy
EIGHTHS = tuple(k / 8 for k in range(1, 8))  # shares of the channels at which the held-out error is computed


def ridges_of(reading: Reading, tensors: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Per consumer, the ridge towards its own matrix that is best on held-out samples.

    It is chosen with half of the channels left: those with the largest ``||W_g||^2 E[x_g^2]``.
    """
    return tuple(_ridge(reading, index, tensors) for index in range(len(reading.layers)))


def _ridge(reading: Reading, index: int, tensors: Mapping[str, Tensor]) -> float:
    layer, halves = reading.layers[index], reading.moments[index]
    if halves.held.count == 0 or halves.fit.count == 0:
        return DEFAULT_RIDGE
    W, groups = layer.matrix(tensors), layer.groups(tensors)
    energy = W.square().sum(0) * halves.fit.xx.diagonal()
    of_group = W.new_zeros(reading.group.size + 1).index_add_(0, groups.where(groups >= 0, reading.group.size), energy)
    largest = of_group[:-1].argsort(descending=True)[: max(1, int(SHARE * reading.group.size))]
    kept = torch.isin(groups, largest) | (groups < 0)
    fitted, judged = (part.through(W).at(kept) for part in (halves.fit, halves.held))
    return chosen_ridge(fitted, judged, reading.ridged(layer, tensors)[kept], W[:, kept])


def held_out_error(reading: Reading, tensors: Mapping[str, Tensor], coefficients: Matrices) -> float:
    """``E||y - M x||^2 / E||y||^2`` of the consumers on the samples that judge; on the others if there are none."""
    error = scale = 0.0
    for layer, halves, M in zip(reading.layers, reading.moments, coefficients, strict=True):
        moments = (halves.held if halves.held.count else halves.fit).through(layer.matrix(tensors))
        if not moments.count:  # an expert that no row reaches
            continue
        error += moments.error(M)
        scale += float(moments.yy) / moments.count
    return error / scale if scale > 0 else 0.0


def held_out_errors(
    reading: Reading, tensors: Mapping[str, Tensor], elimination: Elimination, problem: GroupLasso
) -> dict[int, float]:
    """Number of channels -> `held_out_error` of those that elimination leaves, fitted by the same problem."""
    sizes = sorted({max(1, int(share * reading.group.size)) for share in EIGHTHS})
    return {size: held_out_error(reading, tensors, debias(problem, elimination.support(size))) for size in sizes}
