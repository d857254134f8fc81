"""How far a network's outputs are from the original's."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lnr_prune.calibration.calls import Call, run


def output_error(
    model: nn.Module, calls: Sequence[Call], logits: bool | None = False
) -> Callable[[Mapping[str, Tensor]], float]:
    """A function from full-size weights to the `divergence` of the outputs with them from the model's own."""
    original = [outputs(model, call) for call in calls]
    return lambda weights: divergence(original, [outputs(model, call, weights) for call in calls], logits)


def outputs(model: nn.Module, call: Call, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """All floating-point outputs of a forward pass, (samples, values) if they share their first axis."""
    leaves = [leaf for leaf in tree_leaves(run(model, call, weights)) if isinstance(leaf, Tensor)]
    real = [leaf for leaf in leaves if leaf.is_floating_point()]
    if not real:
        return torch.zeros(1, 0)
    if len({leaf.shape[:1] for leaf in real}) == 1 and all(leaf.dim() > 1 for leaf in real):
        return torch.cat([leaf.flatten(1) for leaf in real], 1)
    return torch.cat([leaf.reshape(1, -1) for leaf in real], 1)


def divergence(original: list[Tensor], pruned: list[Tensor], logits: bool | None = False) -> float:
    """``E||f(x) - f'(x)||^2 / E||f(x) - E f(x)||^2`` of outputs, one (n, values) tensor per batch, in float64.

    For logits, it is ``E KL(p || p') / E KL(p || E p)`` of their softmax. Values that are NaN or infinite in either
    output (masked scores) do not count.
    """
    if logits:
        p, q = (torch.cat(batches).double().log_softmax(1) for batches in (original, pruned))
        spread = _kl(p, p.exp().mean(0).log())
        return _kl(p, q) / spread if spread > 0 else 0.0
    error = sum(_squares(a.double() - b.double()) for a, b in zip(original, pruned, strict=True))
    alike = len({batch.shape[1:] for batch in original}) == 1
    count = sum(map(len, original))
    mean: Tensor | float = 0.0
    if alike and count > 1:
        counts = sum(batch.isfinite().sum(0) for batch in original)
        mean = sum(batch.double().nan_to_num(0.0, 0.0, 0.0).sum(0) for batch in original) / torch.as_tensor(counts)
    spread = sum(_squares(batch.double() - mean) for batch in original)
    return error / spread if spread > 0 else 0.0


def check_logits(model: nn.Module, example: Call, logits: bool | None) -> bool | None:
    """Whether the outputs are logits: what the user says; None if the user does not say, and they could be.

    Raises:
        ValueError: If the user says that they are, but the output is not one tensor (samples, classes).
    """
    leaves = [leaf for leaf in tree_leaves(run(model, example)) if isinstance(leaf, Tensor)]
    shapes = [tuple(leaf.shape) for leaf in leaves]
    fits = len(shapes) == 1 and len(shapes[0]) == 2 and leaves[0].is_floating_point()
    if logits and not fits:
        raise ValueError(
            f"logits=True needs a model whose output is one tensor (samples, classes), got "
            f"{', '.join(map(str, shapes)) or 'no tensor'}; leave logits out, or wrap the model"
        )
    return None if logits is None and fits and shapes[0][1] > 1 else bool(logits)


def _squares(difference: Tensor) -> float:
    return float(difference.nan_to_num_(0.0, 0.0, 0.0).square_().sum())


def _kl(p: Tensor, q: Tensor) -> float:
    """Mean KL divergence of log probabilities."""
    return float((p.exp() * (p - q)).nan_to_num(0.0, 0.0, 0.0).sum(1).mean())
