"""Where samples stand in the calibration data, and which of them judge.

Both depend on a sample's number only, not on the batch size. No sample judges what was fitted to it. So samples are
split, not rows: the patches of one image are much alike. Neighbouring samples (frames of a video, sentences of a text)
are alike, too, so they stay together in stretches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lnr_prune.calibration.calls import Call, samples_in
from lnr_prune.runtime.processes import ALONE, Ranks

STRETCHES = 64  # the samples are cut into at most so many
QUARTER = 4  # one stretch in four chooses the ridge of a refit
HALF = 2  # one stretch in two judges what was chosen on the others


@dataclass(frozen=True)
class Place:
    """Where a batch stands in all the calibration data, including that of the other processes.

    Attributes:
        first: Number of its first sample.
        size: Number of its samples.
        samples: Number of samples in all.
        counts: Which positions of the batch count, (samples, positions) bool; None = all.
    """

    first: int
    size: int
    samples: int
    counts: Tensor | None = None

    def start(self, rows: int) -> int:
        """Number of the first of this batch's ``rows`` in a layer, when every sample has equally many."""
        return self.first * rows // max(1, self.size)

    def held(self, rows: int, every: int = QUARTER) -> Tensor:
        """Which of a layer's rows are held out, (rows,) bool.

        Args:
            rows: Number of rows; every sample has equally many.
            every: One in so many stretches of samples is held out.
        """
        length = max(1, -(-self.samples // STRETCHES))
        numbers = self.first + torch.arange(rows) * self.size // max(1, rows)
        return numbers // length % every == every - 1

    def parts(self, rows: int, every: int = QUARTER) -> Iterator[tuple[bool, Tensor]]:
        """Cuts a layer's rows into two parts; yields whether a part is held out, and the indices of its rows."""
        held = self.held(rows, every)
        for part in (False, True):
            index = (held == part).nonzero()[:, 0]
            if len(index):
                yield part, index


Counts = Callable[[Call], Tensor | None]
"""Which positions of a batch count, (samples, positions) bool; None = all."""


def everything(call: Call) -> Tensor | None:
    """All positions of a batch count."""
    return None


def attended(arguments: Mapping[str, Any]) -> Tensor | None:
    """Where a batch is text and no padding, (samples, positions) bool: its ``attention_mask``; None if there is none.

    It is that of an encoder. A decoder's activations are known by another number of positions; if it is the same,
    everything counts.
    """
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point():
        return None
    decoded = [leaf for name, leaf in arguments.items() if name.startswith("decoder_") and isinstance(leaf, Tensor)]
    return None if any(leaf.shape[:2] == mask.shape for leaf in decoded) else mask != 0


def places_of(calls: Sequence[Call], ranks: Ranks = ALONE, counts: Counts = everything) -> Iterator[Place]:
    """Where each of this process's batches stands."""
    sizes = [samples_in(call) for call in calls]
    first, samples = ranks.before(sum(sizes))
    for call, size in zip(calls, sizes, strict=True):
        yield Place(first, size, samples or 0, counts(call))
        first += size


def halves(call: Call, place: Place) -> Iterator[tuple[bool, Call]]:
    """Cuts a call into samples that judge (True) and others; one that cannot be cut goes with its first sample."""
    shared = {leaf.shape[:1] for leaf in tree_leaves(call) if isinstance(leaf, Tensor)}
    if len(shared) != 1 or next(iter(shared)) != (place.size,):
        yield bool(place.held(place.size, HALF)[0]), call
        return
    for part, index in place.parts(place.size, HALF):
        piece: Call = tree_map(
            lambda leaf: leaf[index.to(leaf.device)] if isinstance(leaf, Tensor) else leaf,  # noqa: B023
            call,
        )
        yield part, piece
