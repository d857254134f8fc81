"""Rows of samples, read from the calls of a layer."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from lnr_prune.calibration.moments import full_precision
from lnr_prune.calibration.watch import LayerCall

CHUNK = 2**23  # elements of x that one product sums; the products are added up in float64
ROWS_PER_COLUMN = 64  # about so many times d of a convolution's patches are read


class Reader(Protocol):
    """Turns a layer's call into rows of samples; an adapter does it for its layer."""

    def inputs(self, call: LayerCall, rows: Tensor | None = None) -> Tensor:
        """x, one row per sample, (n, d), or some of the rows."""
        ...

    def outputs(self, call: LayerCall, rows: Tensor | None = None) -> Tensor:
        """y, one row per sample, (n, h), or some of the rows."""
        ...

    def second_moments(self, calls: Sequence[LayerCall]) -> Tensor | None:
        """``sum x x^T`` over all rows of the calls, (d, d) float64, if that is faster than reading x, else None."""
        ...


def rows(
    reader: Reader, layer: LayerCall, samples: int | None, numbers: Tensor, *others: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """x, (n, d), and y, (n, h), of one call, in chunks that fit into memory.

    The many patches of one image are much alike. If the data has more than `ROWS_PER_COLUMN` times d rows, only
    some of them are read, equally many of each sample. Which ones depends on the sample's number only, not on its
    batch. Rows that do not count, such as padding, are left out.

    Args:
        reader: How to read the call.
        layer: The call.
        samples: Number of samples in all the calibration data; None = not known, and every row is read.
        numbers: The numbers of the call's samples, (n,).
        others: More tensors of the output's shape, without a bias; their rows are yielded after x and y.
    """
    if layer.output.numel() == 0:
        return
    if layer.input.device.type == "mps":  # MPS has no float64
        bias = None if layer.bias is None else layer.bias.cpu()
        layer = replace(layer, input=layer.input.cpu(), output=layer.output.cpu(), weight=layer.weight.cpu(), bias=bias)
        others = tuple(other.cpu() for other in others)
    d, positions, wanted = rows_of_sample(reader, layer, samples)
    size = max(1, CHUNK // (d * max(1, wanted)))
    pieces = (torch.split(other, size) for other in (numbers, *others))
    for chunk, of_chunk, *rest in zip(layer.split(size), *pieces, strict=True):
        drawn = None
        if wanted < positions:
            drawn = _positions(positions, wanted, of_chunk).to(layer.input.device)
        if chunk.counts is not None:
            here = _counting(chunk.counts, positions * len(of_chunk)).to(layer.input.device)
            drawn = here.nonzero()[:, 0] if drawn is None else drawn[here[drawn]]
        calls = chunk, *(replace(chunk, output=other, bias=None) for other in rest)
        yield reader.inputs(chunk, drawn), *(reader.outputs(call, drawn) for call in calls)


def all_products(reader: Reader, layers: Sequence[LayerCall], samples: int | None) -> Tensor | None:
    """``sum x x^T`` over calls whose rows are all used, if the reader can compute it without reading them."""
    layers = [layer for layer in layers if layer.output.numel()]
    if not layers or layers[0].input.device.type == "mps":
        return None
    if any(wanted < positions for _, positions, wanted in (rows_of_sample(reader, layer, samples) for layer in layers)):
        return None
    if any(layer.counts is not None and not bool(layer.counts.all()) for layer in layers):
        return None
    d, positions, _ = rows_of_sample(reader, layers[0], samples)
    with full_precision():
        return reader.second_moments(
            [part for layer in layers for part in layer.split(max(1, CHUNK // (d * positions)))]
        )


def rows_of_sample(reader: Reader, layer: LayerCall, samples: int | None) -> tuple[int, int, int]:
    """Number of columns of x, of rows per sample, and of rows per sample that are read."""
    one, row = next(layer.split(1)), torch.zeros(1, dtype=torch.long, device=layer.input.device)
    d, h = reader.inputs(one, row).shape[1], reader.outputs(one, row).shape[1]
    positions = layer.output.numel() // (h * len(layer.input))
    return d, positions, positions if samples is None else min(positions, math.ceil(ROWS_PER_COLUMN * d / samples))


def _counting(counts: Tensor, rows: int) -> Tensor:
    """Which of a call's rows count, (rows,) bool; each entry of ``counts`` stands for equally many."""
    return counts.flatten().repeat_interleave(rows // max(1, counts.numel()))


def _positions(positions: int, wanted: int, numbers: Tensor) -> Tensor:
    """Indices of the rows to read: for each sample a random set of positions, shifted by its number."""
    drawn = torch.randperm(positions, generator=torch.Generator().manual_seed(0))[:wanted]
    moved = (drawn + shifts(positions, numbers)) % positions
    return (torch.arange(len(numbers))[:, None] * positions + moved).reshape(-1)


def shifts(size: int, numbers: Tensor) -> Tensor:
    """How far each sample rotates what was drawn once, (n, 1); it depends on the sample's number only."""
    return (numbers[:, None] * (size * 0.6180339887498949)).long()  # golden ratio: spread evenly
