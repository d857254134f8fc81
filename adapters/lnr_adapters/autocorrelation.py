"""Second moments of overlapping patches: sums of products of images with shifted copies of themselves."""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor

Offset = tuple[int, ...]
Span = tuple[int, int]
Term = tuple[int, tuple[Offset, tuple[Span, ...]]]
"""A sign, a shift, and a span along every axis."""


def autocorrelation(images: Sequence[Tensor], offsets: Sequence[Offset], positions: Sequence[int]) -> Tensor:
    """``sum x x^T`` over all patches x of images that are zero outside.

    Take the entries o + s and o + t of the patch at position o. The sum of ``X(o + s) X(o + t)^T`` over all o is the
    sum of ``X(q) X(q + t - s)^T`` over all q = o + s. So it is the same for all pairs with the same shift t - s, except
    near the border, which s or t does not reach. For 3 x 3 patches, this takes 13 sums over whole images, and some over
    their edges, instead of 81.

    Args:
        images: Batches, (n, channels, sizes...), all of the same sizes; at least one.
        offsets: Offsets of a patch's entries from its position, along each axis.
        positions: Number of positions along each axis, from 0.

    Returns:
        (channels * entries, channels * entries), float64.
    """
    pairs = list(_pairs(offsets, positions, images[0].shape[2:]))
    wanted = dict.fromkeys(key for _, _, terms in pairs for _, key in terms)
    sums: dict[tuple[Offset, tuple[Span, ...]], Tensor] = {}
    for batch in images:
        wide = batch.to(torch.promote_types(batch.dtype, torch.float32))  # bfloat16 would round the products
        X = wide.movedim(1, -1).contiguous()
        for shift, box in wanted:
            moved = [(a + by, b + by) for (a, b), by in zip(box, shift, strict=True)]
            term = (_entries(X, box).T @ _entries(X, moved)).double()
            sums[shift, box] = sums[shift, box] + term if (shift, box) in sums else term
    nothing = torch.zeros_like(next(iter(sums.values())))
    xx = nothing.new_empty(len(nothing), len(offsets), len(nothing), len(offsets))
    for i, j, terms in pairs:
        block = sum((sign * sums[key] for sign, key in terms), nothing)
        xx[:, i, :, j], xx[:, j, :, i] = block, block.T
    return xx.flatten(2).flatten(0, 1)


def sums_of_entries(images: Sequence[Tensor], offsets: Sequence[Offset], positions: Sequence[int]) -> Tensor:
    """``sum x`` over all patches, (channels * entries,), float64."""
    X = torch.stack([batch.double().sum(0) for batch in images]).sum(0).movedim(0, -1)[None]
    reached = [
        [_span(0, size, a, count) for a, count, size in zip(offset, positions, X.shape[1:-1], strict=True)]
        for offset in offsets
    ]
    return torch.stack([_entries(X, box).sum(0) for box in reached], 1).flatten()


def _entries(X: Tensor, box: Sequence[Span]) -> Tensor:
    """The entries in a box, (n, channels), of images (n, sizes..., channels)."""
    index = (slice(None), *(slice(a, b) for a, b in box))
    return X[index].flatten(0, -2)


def _pairs(
    offsets: Sequence[Offset], positions: Sequence[int], sizes: Sequence[int]
) -> Iterator[tuple[int, int, list[Term]]]:
    """Pairs of entries of a patch, and the terms that their products add up to."""
    for i, s in enumerate(offsets):
        for j, t in enumerate(offsets[i:], i):
            shift = tuple(b - a for a, b in zip(s, t, strict=True))
            axes = []
            for a, by, count, size in zip(s, shift, positions, sizes, strict=True):
                first = max(0, -by)
                last = max(first, min(size, size - by))  # where both are inside
                start, end = _span(first, last, a, count)
                edges = [(-1, span) for span in ((first, start), (end, last)) if span[0] < span[1]]
                axes.append([(1, (first, last)), *edges])
            yield i, j, [_term(shift, of_axes) for of_axes in product(*axes)]


def _span(first: int, last: int, offset: int, count: int) -> Span:
    """What an entry reaches between first and last."""
    start = min(max(first, offset), last)
    return start, max(start, min(last, offset + count))


def _term(shift: Offset, of_axes: Sequence[tuple[int, Span]]) -> Term:
    return prod(sign for sign, _ in of_axes), (shift, tuple(span for _, span in of_axes))
