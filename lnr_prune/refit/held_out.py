"""Which samples are held out to choose the ridge on, by their number among all: no batch size moves them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lnr_prune.calibration.calls import Call, samples_in
from lnr_prune.runtime.processes import ALONE, Ranks

HELD_OUT = 4  # one stretch of samples of so many
STRETCHES = 64  # that all samples make; neighbours may be much alike


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

    def parts(self, rows: int) -> Iterator[tuple[bool, int]]:
        """Whether the first of a layer's rows, evenly many a sample, are held out, and how many; then the next ones.

        It depends on the sample's number alone, not on the batch that it came in.
        """
        stretches = min(STRETCHES, self.samples)
        numbers = self.first + torch.arange(rows) * self.size // max(1, rows)
        held, counts = (numbers * stretches // self.samples % HELD_OUT == HELD_OUT - 1).unique_consecutive(
            return_counts=True
        )
        yield from zip(map(bool, held), map(int, counts), strict=True)


def places_of(calls: Sequence[Call], ranks: Ranks = ALONE) -> Iterator[Place]:
    """Where each of this process's batches stands."""
    sizes = [samples_in(call) for call in calls]
    first, samples = ranks.before(sum(sizes))
    for size in sizes:
        yield Place(first, size, samples or 0)
        first += size
