"""What a layer's output should be in the pruned network.

Say that in the original network ``z = alpha y + c + beta s``, as behind a batch norm and a shortcut s, and that an
activation phi follows. In the pruned network, the shortcut already has an error: it is s' instead of s. The layer gets
its input x there, and we choose its matrix M. We want ``z' = z``, that is

    alpha M x + c + beta s'  =  alpha y + c + beta s,    so    alpha M x  ~  alpha y + beta (s - s'),

and the right-hand side is the `Target`: the layer's own output, plus what the shortcut lacks. For example with
``alpha = 1, beta = 1``, an original output of 2.0 and a shortcut that has fallen from 1.0 to 0.7, the layer is fitted
to 2.3. If s is not known before the layer is called, or z is not computed in the same way at all positions, the target
is plain y. `RefitLayer` reads and writes a layer's matrix, with one more column if a running mean can take up an
intercept. The least squares is in ``fit``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lnr_prune.calibration.adapter import AdaptedLayer
from lnr_prune.calibration.places import Place
from lnr_prune.calibration.rows import rows
from lnr_prune.calibration.watch import LayerCall
from lnr_prune.graph.weights import tensor_named
from lnr_prune.refit.downstream import Downstream
from lnr_prune.refit.side_by_side import Arrival
from lnr_prune.runtime.processes import ALONE, Ranks

Rows = tuple[bool, Tensor, Tensor, Tensor]
"""Whether rows are held out, x, what alpha M x should be, and the rest of z'."""


@dataclass(frozen=True, eq=False)
class Affine:
    """``z = alpha (y + b) + c + beta_1 s_1 + ...`` in every row, the same at all positions; b is a bias that stays.

    Attributes:
        alpha: (h,); 0 where it is negligible.
        betas: The beta of every shortcut, (h,).
        constant: ``alpha b + c``, (h,); if c varies over the positions, only ``alpha b``.
        varying: c of one sample, (1, ...), if it varies; else None.
    """

    alpha: Tensor
    betas: tuple[Tensor, ...]
    constant: Tensor
    varying: Tensor | None

    def of_rows(self, y: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``alpha y + beta (s - s')`` and ``alpha b + c + beta s'``, from rows of y, s, s', and c if it varies."""
        count = len(self.betas)
        target, offset = self.alpha.to(y) * y, self.constant.to(y).expand_as(y)
        for beta, original, pruned in zip(self.betas, others[:count], others[count : 2 * count], strict=True):
            target, offset = target + beta.to(y) * (original - pruned), offset + beta.to(y) * pruned
        return target, offset if self.varying is None else offset + others[-1]


@dataclass(frozen=True, eq=False)
class Target:
    """``alpha y + beta (s - s')``, what ``alpha M x`` should be, so that ``phi(z)`` and ``phi(z')`` are alike.

    Attributes:
        calls: Per batch, the call with the pruned network's x and the original's output y.
        places: Per batch, where it stands.
        downstream: What becomes of an output.
        shortcuts: Per batch, s and s'.
        affine: How z is computed from y and s; None = z is y.
        ranks: The processes that hold the rest of the batches.
    """

    calls: Sequence[LayerCall]
    places: Sequence[Place]
    downstream: Downstream = Downstream()  # noqa: RUF009  (it is frozen)
    shortcuts: Sequence[tuple[list[Tensor], list[Tensor]]] = ()
    affine: Affine | None = None
    ranks: Ranks = ALONE

    def others(self, batch: int) -> list[Tensor]:
        """The shortcuts s and s' of a batch, and c if it varies."""
        if self.affine is None:
            return []
        c = self.affine.varying
        original, pruned = self.shortcuts[batch]
        return [*original, *pruned, *([] if c is None else [c.expand_as(self.calls[batch].output)])]


@dataclass(frozen=True, eq=False)
class RefitLayer:
    """A layer whose matrix M has one more column, an intercept, if a running mean can take it up.

    Attributes:
        adapted: How to read and write the layer.
        tensors: The original model's tensors.
        kept: Columns of the layer's own matrix that stay, (d,) bool; None = all.
        alive: Rows that are still read, (h,) bool; None = all.
        mean: Name of the running mean; None = there is no such column.
    """

    adapted: AdaptedLayer
    tensors: Mapping[str, Tensor]
    kept: Tensor | None = None
    alive: Tensor | None = None
    mean: str | None = None

    @property
    def name(self) -> str:
        """The name of its weight."""
        return self.adapted.consumer.weight

    @property
    def whole(self) -> bool:
        """Whether it has lost no column."""
        return self.kept is None or bool(self.kept.all())

    def matrix(self, weights: Mapping[str, Tensor], intercept: Tensor | None = None) -> Tensor:
        """M, with these parameters instead of the original ones, and this intercept instead of zero."""
        M = self.adapted.matrix({**self.tensors, **weights})
        if self.mean is None:
            return M
        return torch.cat([M, (M.new_zeros(len(M)) if intercept is None else intercept.to(M))[:, None]], 1)

    def stays(self) -> Tensor:
        """Columns of M that are not zero, (d,) bool."""
        kept = self._columns(bias=1.0) if self.kept is None else self.kept
        return kept if self.mean is None else torch.cat([kept, kept.new_ones(1)])

    def ridged(self) -> Tensor:
        """Columns of M that a ridge applies to: all but the bias and the intercept, (d,) bool."""
        ridged = self._columns(bias=0.0)
        return ridged if self.mean is None else torch.cat([ridged, ridged.new_zeros(1)])

    def _columns(self, bias: float) -> Tensor:
        return self.adapted.columns(torch.ones_like(tensor_named(self.tensors, self.name)), bias=bias)

    def inputs(self, x: Tensor) -> Tensor:
        """X, (n, d), with a column of ones if there is an intercept."""
        return x if self.mean is None else torch.cat([x, x.new_ones(len(x), 1)], 1)

    def arguments(self, M: Tensor) -> dict[str, Tensor]:
        """The "weight" and the "bias" to call it with, so that its matrix is M."""
        new = self.adapted.write(M if self.mean is None else M[:, :-1], self.tensors)
        given = {key: new[name] for key, name in self.adapted.names.items() if name in new}
        return given if self.mean is None else {**given, "bias": M[:, -1].to(given["weight"])}

    def parameters(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters, and the running mean, with the effect of these arguments: full name -> value."""
        new = {name: arguments[key] for key, name in self.adapted.names.items() if key in arguments}
        if self.mean is not None:
            mean = self.tensors[self.mean]
            new[self.mean] = (mean.double() - arguments["bias"].double()).to(mean)
        return new


def target_of(
    adapted: AdaptedLayer,
    downstream: Downstream,
    arrivals: Sequence[Arrival],
    places: Sequence[Place],
    ranks: Ranks = ALONE,
) -> Target:
    """What a layer is fitted to: z, if all of it is known, else y.

    Args:
        adapted: The layer.
        downstream: What becomes of its output.
        arrivals: The batches that have come to it.
        places: Where they stand.
        ranks: The processes that hold the rest of the batches.
    """
    pairs = zip(arrivals, places, strict=True)
    calls = [replace(arrival.call, input=arrival.x).counting(place.counts) for arrival, place in pairs]
    shortcuts = [arrival.shortcuts for arrival in arrivals if arrival.shortcuts is not None]
    known = len(shortcuts) == len(calls)
    first = [call for call in calls if len(call.input)][:1]  # none if this process has no samples
    mine = [_affine(adapted, downstream, call) if known else None for call in first]
    found = [affine for of_rank in ranks.all_gather(mine) for affine in of_rank]
    if not found or any(affine is None for affine in found):
        return Target(calls, places, ranks=ranks)
    return Target(calls, places, downstream, shortcuts, found[0], ranks)


def _affine(adapted: AdaptedLayer, downstream: Downstream, call: LayerCall) -> Affine | None:
    """How z is computed from y; None if that differs between positions, or z does not depend on y."""
    one = replace(next(call.split(1)), bias=None)
    zero, count = torch.zeros_like(one.output), len([shortcut for shortcut in downstream.affine.shortcuts if shortcut])
    try:
        c = downstream.affine(zero, [zero] * count)
    except RuntimeError:  # a reshape on the way fixes the recorded batch's size
        return None
    if c.shape != zero.shape:
        return None

    def everywhere(values: Tensor) -> Tensor | None:
        rows = adapted.outputs(replace(one, output=values)).double()
        return rows[0] if torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-3) else None

    units = torch.eye(1 + count).unbind()  # y is 1, or one of the shortcuts is
    slopes = [everywhere(downstream.affine(zero + y, [zero + s for s in added]) - c) for y, *added in units]
    known = [slope for slope in slopes if slope is not None]
    if len(known) < len(slopes) or not bool(known[0].any()):
        return None
    (alpha, *betas), constant = known, everywhere(c)
    alpha = alpha.where(alpha.abs() > 1e-6 * alpha.abs().max(), 0.0)
    stays = -alpha * adapted.outputs(replace(one, output=zero, bias=call.bias))[0].double()
    if constant is None:
        return Affine(alpha, tuple(betas), stays, c)
    return Affine(alpha, tuple(betas), stays + constant, None)


def rows_of(layer: RefitLayer, target: Target) -> Iterator[Rows]:
    """Reads the rows of all batches."""
    for part, piece, samples, numbers, others in pieces_of(target):
        for x, y, *rest in rows(layer.adapted, piece, samples, numbers, *others):
            aimed = (y, torch.zeros_like(y)) if target.affine is None else target.affine.of_rows(y, rest)
            yield part, layer.inputs(x), *aimed


def pieces_of(target: Target) -> Iterator[tuple[bool, LayerCall, int, Tensor, tuple[Tensor, ...]]]:
    """Cuts the calls into samples that are held out (True) and samples to fit on.

    Yields which, the piece, the number of samples in all, the numbers of the piece's, and the piece of `others`.
    """
    for batch, (call, place) in enumerate(zip(target.calls, target.places, strict=True)):
        others = target.others(batch)
        for part, index in place.parts(len(call.input)):
            whole = len(index) == len(call.input)
            of_piece = tuple(each if whole else each[index.to(each.device)] for each in others)
            yield part, call.at(index), place.samples, place.start(len(call.input)) + index, of_piece
