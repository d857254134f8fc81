"""Where samples stand among all, and which of them judge: by their number, so no batch size moves them.

What judges is never what was fitted. So samples are split, not rows: the patches of an image are much alike, and so are
neighbouring samples (frames of a video, sentences of a text), which stay together in stretches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lnr_prune.calibration.calls import Call, samples_in
from lnr_prune.runtime.processes import ALONE, Ranks

STRETCHES = 64  # that all samples make, at most
QUARTER = 4  # of these, one in four chooses the ridge of a refit
HALF = 2  # one in two judges what was chosen on the others


@dataclass(frozen=True)
class Place:
    """Where a batch stands in all the calibration data, the other processes' included.

    Attributes:
        first: Number of its first sample.
        size: Number of its samples.
        samples: Number of all samples.
    """

    first: int
    size: int
    samples: int

    def start(self, rows: int) -> int:
        """Number of the first of a layer's rows, evenly many a sample."""
        return self.first * rows // max(1, self.size)

    def parts(self, rows: int, every: int = QUARTER) -> Iterator[tuple[bool, int]]:
        """Whether the first of a layer's rows, evenly many a sample, are held out, and how many; then the next ones.

        Args:
            rows: Number of rows.
            every: One stretch of samples of so many is held out.
        """
        length = max(1, -(-self.samples // STRETCHES))
        numbers = self.first + torch.arange(rows) * self.size // max(1, rows)
        held, counts = (numbers // length % every == every - 1).unique_consecutive(return_counts=True)
        yield from zip(map(bool, held), map(int, counts), strict=True)


def places_of(calls: Sequence[Call], ranks: Ranks = ALONE) -> Iterator[Place]:
    """Where each of this process's batches stands."""
    sizes = [samples_in(call) for call in calls]
    first, samples = ranks.before(sum(sizes))
    for size in sizes:
        yield Place(first, size, samples or 0)
        first += size


def halves(call: Call, place: Place) -> Iterator[tuple[bool, Call]]:
    """A call cut into samples that judge (True) and others; one that cannot be cut goes with its first sample."""
    parts = list(place.parts(place.size, HALF))
    shared = {leaf.shape[:1] for leaf in tree_leaves(call) if isinstance(leaf, Tensor)}
    if len(shared) != 1 or next(iter(shared)) != (place.size,):
        yield parts[0][0], call
        return
    first = 0
    for part, count in parts:
        piece: Call = tree_map(
            lambda leaf: leaf[first : first + count] if isinstance(leaf, Tensor) else leaf,  # noqa: B023
            call,
        )
        yield part, piece
        first += count
