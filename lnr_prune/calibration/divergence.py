"""How far a network's outputs are from the original's."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lnr_prune.calibration.calls import Call, run
from lnr_prune.calibration.functions.pause import Manner, Pause, Replay, go_on, same_values
from lnr_prune.calibration.functions.prefix import Prefix
from lnr_prune.errors import CalibrationError
from lnr_prune.graph.module import evaluating, named_tensors, unfused_attention
from lnr_prune.runtime.processes import ALONE, Ranks


def output_error(
    model: nn.Module, calls: Sequence[Call], logits: bool | None = False
) -> Callable[[Mapping[str, Tensor]], float]:
    """A function from full-size weights to the `divergence` of the outputs with them from the model's own.

    Only what comes after the first changed weight is computed, see `Prefix`: ask for changes in order of execution.
    """
    original, tensors = [outputs(model, call) for call in calls], named_tensors(model)
    prefixes = [Prefix(model, call, tensors, Manner()) for call in calls]
    in_parts, tried = True, set[int]()

    def changed_outputs(index: int, weights: Mapping[str, Tensor]) -> Tensor | None:
        """The outputs of a batch; None if a pass that goes on does not give what a whole one gives."""
        nonlocal tried
        changed = {id(tensors[name]) for name in weights}
        with evaluating(model), unfused_attention():
            pause = prefixes[index].before(changed)
        if pause is None:
            return original[index]
        if index == 0 and changed != tried:
            tried = changed
            if not same_values(original[0], rest(pause.copied(tensors.values()), {})):
                return None
        return rest(pause, weights)

    def rest(pause: Pause, weights: Mapping[str, Tensor]) -> Tensor:
        with evaluating(model), unfused_attention():
            return as_rows(go_on(model, pause, Replay(pause), Manner(), weights)[1])

    def error(weights: Mapping[str, Tensor]) -> float:
        nonlocal in_parts
        new = {name: value for name, value in weights.items() if not torch.equal(value, tensors[name])}
        found = list[Tensor]()
        for index in range(len(calls)) if in_parts else ():
            rows = None
            with suppress(CalibrationError):  # a whole pass says what is wrong
                rows = changed_outputs(index, new)
            if rows is None:
                in_parts = False
                break
            found.append(rows)
        return divergence(original, found if in_parts else [outputs(model, call, new) for call in calls], logits)

    return error


def agreement(model: nn.Module, calls: Iterable[Call], ranks: Ranks = ALONE) -> Callable[[Mapping[str, Tensor]], float]:
    """A function from full-size weights to the share of all ranks' samples that get the same class as before."""
    given = [(call, outputs(model, call).argmax(1)) for call in calls]
    samples = sum(ranks.all_gather(sum(len(classes) for _, classes in given)))

    def share(weights: Mapping[str, Tensor]) -> float:
        same = sum(int((outputs(model, call, weights).argmax(1) == classes).sum()) for call, classes in given)
        return sum(ranks.all_gather(same)) / samples

    return share


def outputs(model: nn.Module, call: Call, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """All floating-point outputs of a forward pass, (samples, values) if they share their first axis."""
    return as_rows(run(model, call, weights))


def as_rows(found: Any) -> Tensor:
    """All floating-point tensors among a model's outputs, (samples, values) if they share their first axis."""
    real = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
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
