"""Error curves: what every group costs the network's outputs, at every size."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lnr_prune.calibration.reading import Reading, fit
from lnr_prune.graph.groups import ChannelGroup
from lnr_prune.lasso.backward import Elimination, backward
from lnr_prune.lasso.problem import debias
from lnr_prune.runtime.work import Work
from lnr_prune.selection.honest import held_out_errors, ridges_of

SHARES = (1 / 2, 1 / 8)  # shares of the channels at which the error is measured


def error_curves(
    tensors: Mapping[str, Tensor],
    passes: Iterable[Sequence[Reading]],
    error: Callable[[Mapping[str, Tensor]], float],
    work: Work = Work(),
) -> tuple[dict[ChannelGroup, Tensor], dict[ChannelGroup, Elimination]]:
    """Relative squared error of the network's outputs when one group keeps 0, 1, ... n of its channels.

    Backward elimination on one half of the samples gives nested supports. The other half gives the error of the group's
    consumers at every size, see `held_out_errors`. What that error means for the outputs,
    ``E||f(x) - f'(x)||^2 / E||f(x) - E f(x)||^2``, is measured on samples of the other half, too: at the `SHARES` of
    the group's channels, with all other groups whole. The curve goes through these points. So errors of different
    layers can be compared, their sum estimates the whole network's error, and nothing is judged by what it was fitted
    to.

    Args:
        tensors: The original model's tensors.
        passes: Groups with their consumers' second moments, some at a time.
        error: Full-size weights -> `output_error` with them. Processes that prune together measure it on the same
            samples, and share out the groups.
        work: The processes, the progress, and where curves are kept.

    Returns:
        Group -> its curve, (n + 1,) float64; and group -> its backward elimination.
    """

    def measure(reading: Reading) -> tuple[Tensor, Elimination]:
        work.step(f"measuring {reading.group.name}")
        problem = reading.problem(tensors, part=fit, ridges=ridges_of(reading, tensors))
        elimination, measured = backward(problem), {}
        shape = through(elimination.errors, held_out_errors(reading, tensors, elimination, problem))
        for size in sorted({max(1, int(share * problem.n_groups)) for share in SHARES}):
            M = debias(problem, elimination.support(size))
            weights: dict[str, Tensor] = {}
            for layer, M_c in zip(reading.layers, M, strict=True):
                weights |= layer.write(M_c, {**tensors, **weights})
            measured[size] = error(weights)
        return through(shape, measured), elimination

    curves, eliminations = dict[ChannelGroup, Tensor](), dict[ChannelGroup, Elimination]()
    for readings in passes:
        tasks = {reading.group.name: partial(measure, reading) for reading in readings}
        done = work.share_out("curve of", tuple[Tensor, Elimination], tasks)
        for reading, (curve, elimination) in zip(readings, done, strict=True):
            curves[reading.group], eliminations[reading.group] = curve, elimination
    return curves, eliminations


def through(shape: Tensor, measured: Mapping[int, float]) -> Tensor:
    """A curve that falls like ``shape`` and goes through the measured points: linear in the logarithms of both.

    Args:
        shape: Errors at 0, 1, ... n channels, (n + 1,); the error at n is subtracted from all.
        measured: Number of channels -> error.
    """
    errors, tiny = (shape - shape[-1]).cpu().numpy(), np.finfo(np.float64).tiny
    logarithms = np.log(np.maximum(errors, tiny))
    points = sorted((logarithms[size], math.log(max(error, tiny))) for size, error in measured.items())
    scale = np.interp(logarithms, [x for x, _ in points], [y - x for x, y in points])  # beyond them: proportional
    curve = errors * np.exp(scale)
    return torch.from_numpy(np.maximum.accumulate(curve[::-1])[::-1].copy())
