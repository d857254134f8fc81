"""How far a network's outputs are from the original's.

Outputs are compared row by row. A row is a sample; or a token, if the outputs are logits of tokens, or a mask says
which tokens count. The outputs of a language model are large: of 512 tokens and 50,000 words they take 100 megabytes.
So only a few hundred rows at a time are converted to float64, and only the first outputs of the original network are
kept. For the others, a pass waits in front of its last layer, which is then called again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lnr_prune.calibration.calls import Call, run
from lnr_prune.calibration.functions.ending import before_last
from lnr_prune.calibration.functions.pause import Manner, Pause, Replay, go_on, same_values
from lnr_prune.calibration.functions.prefix import Prefix
from lnr_prune.calibration.outputs import judged, named_logits
from lnr_prune.calibration.places import Counts, everything
from lnr_prune.calibration.watch import on_axes, without
from lnr_prune.errors import CalibrationError
from lnr_prune.graph.module import evaluating, named_tensors, unfused_attention
from lnr_prune.runtime.processes import ALONE, Ranks

CHUNK = 2**23  # elements of outputs that are converted to float64 together
HELD = 2**24  # elements of the original's outputs that are kept


def output_error(
    model: nn.Module, calls: Sequence[Call], logits: bool | None = False, counts: Counts = everything
) -> Callable[[Mapping[str, Tensor]], float]:
    """A function from full-size weights to the `divergence` of the outputs with them from the model's own.

    Only what comes after the first changed weight is computed, see `Prefix`: ask for changes in order of execution.

    Args:
        model: The model.
        calls: The calls whose outputs are compared.
        logits: Whether the outputs are logits.
        counts: Which positions of a call count.
    """
    tensors, original = named_tensors(model), _Original(model, calls, logits, counts)
    prefixes = [Prefix(model, call, tensors, Manner()) for call in calls]
    in_parts, tried = True, set[int]()

    def in_part(index: int, weights: Mapping[str, Tensor]) -> Tensor | None:
        """The outputs of a batch; None if a pass that goes on does not give what a whole one gives."""
        nonlocal tried
        changed = {id(tensors[name]) for name in weights}
        with suppress(CalibrationError):  # a whole pass says what is wrong
            with evaluating(model), unfused_attention():
                pause = prefixes[index].before(changed)
            if pause is None:
                return original[index]
            if index == 0 and changed != tried:
                tried = changed
                if not same_values(original[0], original.rest(0, pause.copied(tensors.values()))):
                    return None
            return original.rest(index, pause, weights)
        return None

    def total(changed: Callable[[int], Tensor | None]) -> float | None:
        error = 0.0
        for index in range(len(calls)):
            rows = changed(index)
            if rows is None:
                return None
            error += _apart(original[index], rows, logits)
        return original.spread.relative(error)

    def error(weights: Mapping[str, Tensor]) -> float:
        nonlocal in_parts
        new = {name: value for name, value in weights.items() if not torch.equal(value, tensors[name])}
        found = total(lambda index: in_part(index, new)) if in_parts else None
        in_parts = found is not None
        return found if found is not None else total(lambda index: original.whole(index, new)) or 0.0

    return error


def agreement(
    model: nn.Module, calls: Iterable[Call], counts: Counts = everything, ranks: Ranks = ALONE
) -> Callable[[Mapping[str, Tensor]], float]:
    """A function from full-size weights to the share of all samples, or tokens, with the same class as before."""

    def classes_of(call: Call, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        return outputs(model, call, weights, True, counts).argmax(1)

    given = [(call, classes_of(call)) for call in calls]
    samples = sum(ranks.all_gather(sum(len(classes) for _, classes in given)))

    def share(weights: Mapping[str, Tensor]) -> float:
        same = sum(int((classes_of(call, weights) == classes).sum()) for call, classes in given)
        return sum(ranks.all_gather(same)) / samples

    return share


class _Original:
    """The outputs of the original network, and how much they vary.

    Attributes:
        spread: How much they vary.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call], logits: bool | None, counts: Counts) -> None:
        self._model, self._calls, self._logits, self._counts = model, calls, logits, counts
        self._tensors, self.spread = named_tensors(model).values(), _Spread(logits)
        self._held, left = list[Tensor | Pause | None](), HELD
        for index in range(len(calls)):
            rows = self.whole(index)
            self.spread.add(rows)
            self._held.append(rows if rows.numel() <= left else self._waiting(index, rows))
            left -= rows.numel() if self._held[-1] is rows else 0

    def __getitem__(self, index: int) -> Tensor:
        """The outputs of a batch."""
        held = self._held[index]
        if isinstance(held, Pause):
            return self.rest(index, held.copied(self._tensors))
        return self.whole(index) if held is None else held

    def whole(self, index: int, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The outputs of a batch from a whole pass, with these weights in place of the model's own."""
        call = self._calls[index]
        return as_rows(run(self._model, call, weights), self._logits, self._counts(call))

    def rest(self, index: int, pause: Pause, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The outputs of a batch from a pass that goes on."""
        with evaluating(self._model), unfused_attention():
            found = go_on(self._model, pause, Replay(pause), Manner(), weights)[1]
        return as_rows(found, self._logits, self._counts(self._calls[index]))

    def _waiting(self, index: int, rows: Tensor) -> Pause | None:
        """A pass that waits in front of the last layer; None if it would not give these outputs."""
        with suppress(CalibrationError):
            with evaluating(self._model), unfused_attention():
                pause = before_last(self._model, self._calls[index], self._tensors)
            if pause is not None and same_values(rows, self.rest(index, pause.copied(self._tensors))):
                return pause
        return None


def outputs(
    model: nn.Module,
    call: Call,
    weights: Mapping[str, Tensor] | None = None,
    logits: bool | None = False,
    counts: Counts = everything,
) -> Tensor:
    """The outputs of a forward pass, see `as_rows`."""
    return as_rows(run(model, call, weights), logits, counts(call))


def as_rows(found: Any, logits: bool | None = False, mask: Tensor | None = None) -> Tensor:
    """What is compared of a model's outputs: all floating-point tensors, or the logits alone if they are named so.

    Args:
        found: The outputs.
        logits: Whether they are logits, with the classes on the last axis.
        mask: What counts, (samples, positions) bool; None = everything.

    Returns:
        (tokens, values) if the outputs are one tensor that the mask fits, or logits of tokens. Otherwise (samples,
        values) if they share their first axis, else one row; values that the mask leaves out are then NaN.
    """
    real = [leaf for leaf in tree_leaves(judged(found)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not real:
        return torch.zeros(1, 0)
    masks = [None if mask is None or mask.dim() >= leaf.dim() else on_axes(mask, leaf.shape) for leaf in real]
    if len(real) == 1 and real[0].dim() > 1:
        (leaf,), (on,) = real, masks
        if on is not None:
            leaf = leaf.flatten(0, on.dim() - 1)[on.flatten().to(leaf.device)]
        return leaf.flatten(0, -2) if logits or (named_logits(found) and real[0].dim() == 3) else leaf.flatten(1)
    real = [leaf if on is None else without(leaf, ~on, torch.nan) for leaf, on in zip(real, masks, strict=True)]
    if len({leaf.shape[:1] for leaf in real}) == 1 and all(leaf.dim() > 1 for leaf in real):
        return torch.cat([leaf.flatten(1) for leaf in real], 1)
    return torch.cat([leaf.reshape(1, -1) for leaf in real], 1)


def divergence(original: Iterable[Tensor], pruned: Iterable[Tensor], logits: bool | None = False) -> float:
    """``E||f(x) - f'(x)||^2 / E||f(x) - E f(x)||^2`` of outputs, one (n, values) tensor per batch, in float64.

    For logits, it is ``E KL(p || p') / E KL(p || E p)`` of their softmax. Values that are NaN or infinite in either
    output (masked scores) do not count.
    """
    spread, error = _Spread(logits), 0.0
    for ours, theirs in zip(original, pruned, strict=True):
        spread.add(ours)
        error += _apart(ours, theirs, logits)
    return spread.relative(error)


def check_logits(model: nn.Module, example: Call, logits: bool | None) -> bool | None:
    """Whether the outputs are logits: what the user says; None if the user does not say, and they could be.

    Raises:
        ValueError: If the user says that they are, but there is no single tensor (samples, ..., classes).
    """
    leaves = [leaf for leaf in tree_leaves(judged(run(model, example))) if isinstance(leaf, Tensor)]
    shapes = [tuple(leaf.shape) for leaf in leaves]
    fits = len(shapes) == 1 and len(shapes[0]) >= 2 and leaves[0].is_floating_point()
    if logits and not fits:
        raise ValueError(
            "logits=True needs a model whose output, or its entry 'logits', is one tensor (samples, ..., classes), got "
            f"{', '.join(map(str, shapes)) or 'no tensor'}; leave logits out, or wrap the model"
        )
    return None if logits is None and fits and len(shapes[0]) == 2 and shapes[0][1] > 1 else bool(logits)


class _Spread:
    """``sum ||f(x) - E f(x)||^2`` of the original's outputs, or ``sum KL(p || E p)``, batch by batch.

    Means and sums of squares of the batches are joined as by Chan, Golub and LeVeque, "Algorithms for computing the
    sample variance", 1983. Outputs of different lengths have no mean; then it is ``sum ||f(x)||^2``.
    """

    def __init__(self, logits: bool | None) -> None:
        self._logits, self._rows, self._squares, self._alike = logits, 0, 0.0, True
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, batch: Tensor) -> None:
        """Adds the rows of a batch."""
        self._rows += len(batch)
        for rows in _chunks(batch):
            values = rows.log_softmax(1) if self._logits else rows
            finite = values.isfinite()
            values = values.where(finite, 0.0)
            if self._logits:
                p = values.exp() * finite
                self._squares += float((p * values).sum())  # less than zero: the entropy
                new = p.sum(0), p.new_zeros(()), p.new_zeros(())
            else:
                self._squares += float(values.square().sum())
                count = finite.sum(0)
                mean = values.sum(0) / count.clamp_min(1)
                new = mean, ((values - mean) * finite).square().sum(0), count
            self._alike &= self._sums is None or self._sums[0].shape == new[0].shape
            if self._alike:
                self._sums = new if self._sums is None else self._joined(self._sums, new)

    def _joined(
        self, a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._logits:
            return a[0] + b[0], a[1], a[2]
        count, apart = a[2] + b[2], b[0] - a[0]
        share = b[2] / count.clamp_min(1)
        return a[0] + apart * share, a[1] + b[1] + apart.square() * a[2] * share, count

    def relative(self, error: float) -> float:
        """A sum of errors of all rows, relative to the spread."""
        total = self._squares
        if self._sums is not None and self._logits:
            total -= float((self._sums[0] * (self._sums[0] / self._rows).log()).nan_to_num(0.0).sum())
        elif self._sums is not None and self._alike and self._rows > 1:
            total = float(self._sums[1].sum())
        return error / total if total > 0 else 0.0


def _apart(original: Tensor, changed: Tensor, logits: bool | None) -> float:
    """``sum ||f(x) - f'(x)||^2`` over the rows, or ``sum KL(p || p')``."""
    error = 0.0
    for ours, theirs in zip(_chunks(original), _chunks(changed), strict=True):
        if logits:
            p, q = ours.log_softmax(1), theirs.log_softmax(1)
            error += float((p.exp() * (p - q)).nan_to_num(0.0, 0.0, 0.0).sum())
        else:
            error += float((ours - theirs).nan_to_num_(0.0, 0.0, 0.0).square_().sum())
    return error


def _chunks(rows: Tensor) -> Iterator[Tensor]:
    """Some rows at a time, in float64."""
    return (part.double() for part in rows.split(max(1, CHUNK // max(1, rows.shape[1]))))
