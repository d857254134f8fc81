"""Error curves: what every group costs the network's outputs, at every size."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lnr_prune import distributed, resume
from lnr_prune.backward import Elimination, backward
from lnr_prune.calibration import Call, run, samples_in
from lnr_prune.problem import debias
from lnr_prune.supports import Reading

SAMPLES = 256  # on which outputs are compared, unless more are asked for
SHARES = (1 / 2, 1 / 4, 1 / 8)  # of the channels, where it is
RIDGE = 1e-4


def error_curves(
    tensors: Mapping[str, Tensor],
    turns: Iterable[Mapping[str, Reading]],
    error: Callable[[Mapping[str, Tensor]], float],
    progress: Callable[[str], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Elimination]]:
    """Relative squared error of the network's outputs when one group keeps 0, 1, ... n of its channels.

    Backward elimination gives the shape: the error of the group's consumers at every size. What that error
    means for the outputs, ``E||f(x) - f'(x)||^2 / E||f(x) - E f(x)||^2``, is measured at the `SHARES` of
    its channels, with all other groups whole, and the curve goes through these points. So errors of
    different layers compare, and their sum estimates the whole network's.

    Args:
        tensors: The original model's.
        turns: Name of a group -> the group and its consumers' second moments, some groups at a time.
        error: Full-size weights -> `output_error` with them. Processes that prune together measure it on the same
            samples, and share out the groups.
        progress: Called with every group's name.

    Returns:
        Name of a group -> its curve, (n + 1,) float64; and name -> its backward elimination.
    """

    def measure(name: str, reading: Reading) -> tuple[Tensor, Elimination]:
        if progress:
            progress(name)
        problem = reading.problem(tensors)
        elimination, measured = backward(problem), {}
        for size in sorted({max(1, int(share * problem.n_groups)) for share in SHARES}):
            M = debias(problem, elimination.support(size), RIDGE)
            weights: dict[str, Tensor] = {}
            for pair, M_c in zip(reading.pairs, M, strict=True):
                weights |= pair.write(M_c, {**tensors, **weights})
            measured[size] = error(weights)
        return through(elimination.errors, measured), elimination

    curves, eliminations = dict[str, Tensor](), dict[str, Elimination]()
    for readings in turns:
        tasks = {name: partial(measure, name, reading) for name, reading in readings.items()}
        done = resume.spread("curve of", tuple[Tensor, Elimination], tasks)
        for name, (curve, elimination) in zip(readings, done, strict=True):
            curves[name], eliminations[name] = curve, elimination
    return curves, eliminations


def through(shape: Tensor, measured: Mapping[int, float]) -> Tensor:
    """A curve that falls as the shape does and goes through the measured points: linear in the logarithms of both.

    Args:
        shape: Errors at 0, 1, ... n channels, (n + 1,); what is left at n counts as none.
        measured: Number of channels -> error.
    """
    errors, tiny = (shape - shape[-1]).cpu().numpy(), np.finfo(np.float64).tiny
    logarithms = np.log(np.maximum(errors, tiny))
    points = sorted((logarithms[size], math.log(max(error, tiny))) for size, error in measured.items())
    scale = np.interp(logarithms, [x for x, _ in points], [y - x for x, y in points])  # beyond them: proportional
    curve = errors * np.exp(scale)
    return torch.from_numpy(np.maximum.accumulate(curve[::-1])[::-1].copy())


def output_error(
    model: nn.Module, calls: Sequence[Call], logits: bool = False
) -> Callable[[Mapping[str, Tensor]], float]:
    """Full-size weights -> `divergence` of the outputs with them from the model's own."""
    original = [outputs(model, call) for call in calls]
    return lambda weights: divergence(original, [outputs(model, call, weights) for call in calls], logits)


def outputs(model: nn.Module, call: Call, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Everything real-valued that a forward pass gives, (samples, values) where outputs share their first axis."""
    leaves = [leaf for leaf in tree_leaves(run(model, call, weights)) if isinstance(leaf, Tensor)]
    real = [leaf for leaf in leaves if leaf.is_floating_point()]
    if not real:
        return torch.zeros(1, 0)
    if len({leaf.shape[:1] for leaf in real}) == 1 and all(leaf.dim() > 1 for leaf in real):
        return torch.cat([leaf.flatten(1) for leaf in real], 1)
    return torch.cat([leaf.reshape(1, -1) for leaf in real], 1)


def divergence(original: list[Tensor], pruned: list[Tensor], logits: bool = False) -> float:
    """``E||f(x) - f'(x)||^2 / E||f(x) - E f(x)||^2`` of outputs, one (n, values) tensor a batch, in float64.

    Of logits, ``E KL(p || p') / E KL(p || E p)`` of their softmax. Values that are infinite in either (masked
    scores) do not count.
    """
    if logits:
        p, q = (torch.cat(batches).double().log_softmax(1) for batches in (original, pruned))
        spread = _kl(p, p.exp().mean(0).log())
        return _kl(p, q) / spread if spread > 0 else 0.0
    error = sum(_squares(a.double() - b.double()) for a, b in zip(original, pruned, strict=True))
    alike = len({batch.shape[1:] for batch in original}) == 1
    count = sum(map(len, original))
    mean = sum(batch.double().sum(0) for batch in original) / count if alike and count > 1 else 0.0
    spread = sum(_squares(batch.double() - mean) for batch in original)
    return error / spread if spread > 0 else 0.0


def check_logits(model: nn.Module, example: Call) -> None:
    """Refuses a model whose output cannot be the logits of classes.

    Raises:
        ValueError: If it is not one tensor (samples, classes).
    """
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(run(model, example)) if isinstance(leaf, Tensor)]
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise ValueError(
            f"logits=True needs a model whose output is one tensor (samples, classes), got "
            f"{', '.join(map(str, shapes)) or 'no tensor'}; leave logits out, or wrap the model"
        )


def _squares(difference: Tensor) -> float:
    return float(difference.nan_to_num_(0.0, 0.0, 0.0).square_().sum())


def _kl(p: Tensor, q: Tensor) -> float:
    """Mean KL divergence of log probabilities."""
    return float((p.exp() * (p - q)).nan_to_num(0.0, 0.0, 0.0).sum(1).mean())


def some(data: Iterable[Call], samples: int = SAMPLES) -> list[Call]:
    """The first batches, the first rank's before the second's, until they hold so many samples."""
    calls, sizes = list[Call](), list[int]()
    for call in data:
        calls.append(call)
        sizes.append(samples_in(call))
        if sum(sizes) >= samples:
            break
    chosen, count = list[Call](), 0
    for source, of_rank in enumerate(distributed.everyone(sizes)):
        for index, size in enumerate(of_rank):
            if count < samples:
                mine = calls[index] if distributed.rank() == source else ((), {})
                chosen.append(distributed.everyone(mine)[source])
                count += size
    return chosen
